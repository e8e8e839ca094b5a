"""Writing a synthetic dataset: determined by its settings, atomic, never over something else."""

import json
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest

from ccgpu.train.scenes.files import file_in, varied_size, write_synthetic

SMALL = (64, 96)


def write_number(root: Path, split: str, index: int, size: tuple[int, int], key: tuple[int, int]) -> None:
    file_in(root / split, f"{index}.txt").write_text(f"{size} {np.random.default_rng((*key, index)).random()}")


def write_numbers(root: Path | str, splits: dict[str, int], size: tuple[int, int] = SMALL, seed: int = 0) -> Path:
    return write_synthetic(root, splits, size, seed, layout="numbers", write=write_number)


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.*"))}


def test_write_synthetic_is_a_function_of_seed_split_and_index(tmp_path: Path) -> None:
    first = files_of(write_numbers(tmp_path / "first", {"train": 2, "val": 2}))
    again = files_of(write_numbers(tmp_path / "again", {"val": 1, "train": 3}))
    other = files_of(write_numbers(tmp_path / "other", {"train": 1}, seed=1))
    assert {name: data for name, data in first.items() if name in again and name != "synthetic.json"} == {
        name: again[name] for name in ("train/0.txt", "train/1.txt", "val/0.txt")
    }
    assert first["train/0.txt"] != other["train/0.txt"]
    assert len({data for name, data in first.items() if name != "synthetic.json"}) == 4
    assert json.loads(first["synthetic.json"])["splits"] == {"train": 2, "val": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "first", "other"]


def test_write_synthetic_keeps_what_it_wrote_before(tmp_path: Path) -> None:
    root = write_numbers(tmp_path / "synthetic", {"train": 1})
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert write_numbers(str(root), {"train": 1}) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_write_synthetic_never_overwrites_something_else(tmp_path: Path) -> None:
    root = write_numbers(tmp_path / "synthetic", {"train": 1})
    with pytest.raises(ValueError, match=r"root must be empty or hold the images .*'seed': 1.* got .*'seed': 0"):
        write_numbers(root, {"train": 1}, seed=1)
    with pytest.raises(ValueError, match=r"'layout': 'other'.* got .*'layout': 'numbers'"):
        write_synthetic(root, {"train": 1}, SMALL, 0, layout="other", write=write_number)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    for other in (tmp_path / "mine", tmp_path / "mine" / "notes.txt"):
        with pytest.raises(ValueError, match="got no synthetic images in"):
            write_numbers(other, {"train": 1})
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    assert len(files_of(write_numbers(tmp_path / "empty", {"train": 1}))) == 2


def test_write_synthetic_leaves_nothing_after_a_failure(tmp_path: Path) -> None:
    def full_disk(root: Path, split: str, index: int, size: tuple[int, int], key: tuple[int, int]) -> None:
        if index == 1:
            raise OSError(28, "No space left on device")
        write_number(root, split, index, size, key)

    with pytest.raises(OSError, match="No space left"):
        write_synthetic(tmp_path / "synthetic", {"train": 2}, SMALL, 0, layout="numbers", write=full_disk)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_may_write_the_same_dataset(tmp_path: Path) -> None:
    def overtaken(root: Path, split: str, index: int, size: tuple[int, int], key: tuple[int, int]) -> None:
        write_number(root, split, index, size, key)
        if not (tmp_path / "synthetic").exists():
            (tmp_path / "other").mkdir()
            write_numbers(tmp_path / "other" / "synthetic", {"train": 1}).rename(tmp_path / "synthetic")

    root = write_synthetic(tmp_path / "synthetic", {"train": 1}, SMALL, 0, layout="numbers", write=overtaken)
    assert len(files_of(root)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "synthetic"]


def test_write_synthetic_removes_what_killed_processes_left(tmp_path: Path) -> None:
    root = tmp_path / "synthetic"
    dead, alive, another = (tmp_path / f".{name}.partial" for name in ("synthetic.11", "synthetic.12", "others.13"))
    for folder in (dead, alive, another):
        file_in(folder / "train", "0.txt").touch()
        file_in(folder, "lock").touch()
    with filelock.FileLock(alive / "lock"):
        write_numbers(root, {"train": 1})
        assert sorted(path.name for path in tmp_path.iterdir()) == [another.name, alive.name, "synthetic"]
    assert sorted(files_of(root)) == ["synthetic.json", "train/0.txt"]
    write_numbers(root, {"train": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == [another.name, "synthetic"]


def test_write_synthetic_is_locked_while_it_writes(tmp_path: Path) -> None:
    def look(root: Path, split: str, index: int, size: tuple[int, int], key: tuple[int, int]) -> None:
        write_number(root, split, index, size, key)
        (partial,) = tmp_path.iterdir()
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(partial / "lock", timeout=0).acquire()

    write_synthetic(tmp_path / "synthetic", {"train": 1}, SMALL, 0, layout="numbers", write=look)


def test_write_synthetic_leaves_nothing_where_it_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Permission denied"):
        write_numbers(tmp_path / "synthetic", {"train": 1})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"splits": {}}, "splits must name at least one split"),
        ({"splits": {"train": 0}}, r"1 or more images, got \{'train': 0\}"),
        ({"splits": {"../val": 1}}, "splits must name"),
        ({"size": (16, 96)}, r"size must be \(height, width\) of 32 or more, got \(16, 96\)"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
    ],
)
def test_write_synthetic_refuses_bad_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_numbers(tmp_path / "synthetic", **{"splits": {"train": 1}, **arguments})
    assert list(tmp_path.iterdir()) == []


def test_varied_sizes_stay_within_the_size_asked_for() -> None:
    sizes = {varied_size((100, 200), np.random.default_rng(seed)) for seed in range(50)}
    assert len(sizes) > 20
    assert all(80 <= height <= 100 and 160 <= width <= 200 for height, width in sizes)
    assert varied_size((32, 33), np.random.default_rng(0)) >= (32, 32)
