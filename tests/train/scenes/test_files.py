import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ccgpu.models.labels import IGNORE
from ccgpu.train import ade20k, camvid, cityscapes, lip
from ccgpu.train.data.clips import training_clips
from ccgpu.train.data.pairs import Pair, check_pairs, read_pair
from ccgpu.train.scenes.files import file_in, varied_size, write_synthetic

MODULES = [ade20k, camvid, cityscapes, lip]
SMALL = (64, 96)


def name_of(module: Any) -> str:
    return module.DATASET.name if isinstance(module, ModuleType) else ""


def write_number(root: Path, split: str, index: int, size: tuple[int, int], key: tuple[int, int]) -> None:
    file_in(root / split, f"{index}.txt").write_text(f"{size} {np.random.default_rng((*key, index)).random()}")


def draw(root: Path | str, splits: dict[str, int], size: tuple[int, int] = SMALL, seed: int = 0) -> Path:
    return write_synthetic(root, splits, size, seed, layout="numbers", write=write_number)


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.*"))}


def test_write_synthetic_is_a_function_of_seed_split_and_index(tmp_path: Path) -> None:
    first = files_of(draw(tmp_path / "first", {"train": 2, "val": 2}))
    again = files_of(draw(tmp_path / "again", {"val": 1, "train": 3}))
    other = files_of(draw(tmp_path / "other", {"train": 1}, seed=1))
    assert {name: data for name, data in first.items() if name in again and name != "synthetic.json"} == {
        name: again[name] for name in ("train/0.txt", "train/1.txt", "val/0.txt")
    }
    assert first["train/0.txt"] != other["train/0.txt"]
    assert len({data for name, data in first.items() if name != "synthetic.json"}) == 4
    assert json.loads(first["synthetic.json"])["splits"] == {"train": 2, "val": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "first", "other"]


def test_write_synthetic_keeps_what_it_wrote_before(tmp_path: Path) -> None:
    root = draw(tmp_path / "drawn", {"train": 1})
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert draw(str(root), {"train": 1}) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_write_synthetic_never_overwrites_something_else(tmp_path: Path) -> None:
    root = draw(tmp_path / "drawn", {"train": 1})
    with pytest.raises(ValueError, match=r"root must be empty or hold the images .*'seed': 1.* got .*'seed': 0"):
        draw(root, {"train": 1}, seed=1)
    with pytest.raises(ValueError, match=r"'layout': 'other'.* got .*'layout': 'numbers'"):
        write_synthetic(root, {"train": 1}, SMALL, 0, layout="other", write=write_number)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    for other in (tmp_path / "mine", tmp_path / "mine" / "notes.txt"):
        with pytest.raises(ValueError, match="got no synthetic images in"):
            draw(other, {"train": 1})
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    assert len(files_of(draw(tmp_path / "empty", {"train": 1}))) == 2


def test_write_synthetic_leaves_nothing_after_a_failure(tmp_path: Path) -> None:
    def full_disk(root: Path, split: str, index: int, size: tuple[int, int], key: tuple[int, int]) -> None:
        if index == 1:
            raise OSError(28, "No space left on device")
        write_number(root, split, index, size, key)

    with pytest.raises(OSError, match="No space left"):
        write_synthetic(tmp_path / "drawn", {"train": 2}, SMALL, 0, layout="numbers", write=full_disk)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_may_draw_the_same(tmp_path: Path) -> None:
    def overtaken(root: Path, split: str, index: int, size: tuple[int, int], key: tuple[int, int]) -> None:
        write_number(root, split, index, size, key)
        if not (tmp_path / "drawn").exists():
            (tmp_path / "other").mkdir()
            draw(tmp_path / "other" / "drawn", {"train": 1}).rename(tmp_path / "drawn")

    root = write_synthetic(tmp_path / "drawn", {"train": 1}, SMALL, 0, layout="numbers", write=overtaken)
    assert len(files_of(root)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drawn", "other"]


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
        draw(tmp_path / "drawn", **{"splits": {"train": 1}, **arguments})
    assert list(tmp_path.iterdir()) == []


def test_varied_sizes_stay_within_the_size_asked_for() -> None:
    sizes = {varied_size((100, 200), np.random.default_rng(seed)) for seed in range(50)}
    assert len(sizes) > 20
    assert all(80 <= height <= 100 and 160 <= width <= 200 for height, width in sizes)
    assert varied_size((32, 33), np.random.default_rng(0)) >= (32, 32)


def synthetic_pairs(module: ModuleType, root: Path, number: int, size: tuple[int, int] = SMALL) -> list[Pair]:
    """The images of a drawn split, checked."""
    split = module.DATASET.recipe.get("train_split", ("train",))[0]
    pairs = module.find_pairs(module.DATASET.write_synthetic(root, {split: number}, size, 3), split)
    check_pairs(pairs)
    assert len(pairs) == number
    return pairs


def shares(module: ModuleType, pairs: list[Pair]) -> dict[str, float]:
    """Share of each class in the labels of pairs; all images are decoded."""
    labels = module.DATASET.labels
    counts = np.zeros(256)
    for pair in pairs:
        image, label = read_pair(pair, labels)
        assert image.shape == (*label.shape, 3)
        assert image.std() > 10
        counts += np.bincount(label.ravel(), minlength=256)
    assert counts[IGNORE] < 0.3 * counts.sum()
    return dict(zip(labels.names, counts[: labels.num_classes] / counts.sum(), strict=True))


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_synthetic_data_is_read_back_and_comes_again_from_the_same_seed(module: ModuleType, tmp_path: Path) -> None:
    pairs = synthetic_pairs(module, tmp_path / "first", 2)
    again = synthetic_pairs(module, tmp_path / "again", 2)
    split = module.DATASET.recipe.get("train_split", ("train",))[0]
    other = module.find_pairs(module.DATASET.write_synthetic(tmp_path / "other", {split: 2}, SMALL, 4), split)
    for pair, same, different in zip(pairs, again, other, strict=True):
        assert pair.label is not None
        assert same.label is not None
        assert pair.image.read_bytes() == same.image.read_bytes()
        assert pair.label.read_bytes() == same.label.read_bytes()
        assert pair.image.read_bytes() != different.image.read_bytes()
    unlabelled = module.find_pairs(tmp_path / "first", split, False)
    assert [(pair.image, pair.label) for pair in unlabelled] == [(pair.image, None) for pair in pairs]


def test_synthetic_ade20k_has_many_classes_and_images_of_many_sizes(tmp_path: Path) -> None:
    pairs = synthetic_pairs(ade20k, tmp_path / "drawn", 12, (128, 192))
    found = {name for name, share in shares(ade20k, pairs).items() if share > 2e-4}
    assert len(found) >= 20
    assert {"streetlight", "plant", "skyscraper", "van", "minibike", "signboard", "box"} <= found
    assert len({Image.open(pair.image).size for pair in pairs}) > 8
    assert {pair.image.suffix for pair in pairs} == {".jpg"}


def test_synthetic_camvid_is_videos_with_gaps_and_has_all_classes(tmp_path: Path) -> None:
    pairs = synthetic_pairs(camvid, tmp_path / "drawn", 14)
    assert min(shares(camvid, pairs).values()) > 5e-4
    videos: dict[str, list[int]] = {}
    for pair in pairs:
        name, frame = camvid.frame_of(pair.name)
        videos.setdefault(name, []).append(frame)
        label = Image.open(pair.label)  # type: ignore[arg-type]
        assert (label.mode, label.getpalette()[:33]) == ("P", camvid.LABELS.colours.ravel().tolist())
    assert videos == {
        "synthetic00": [0, 30, 60, 90, 120, 150, 240, 270, 300, 330],
        "synthetic01": [0, 30, 60, 90],
    }
    assert len(training_clips(pairs, 4, camvid.frame_of)) == 3 + 1 + 1  # no clip across the gap


def test_synthetic_lip_has_all_parts_and_grey_images(tmp_path: Path) -> None:
    pairs = synthetic_pairs(lip, tmp_path / "drawn", 30, (128, 80))
    found = shares(lip, pairs)
    assert {name: share for name, share in found.items() if share < 5e-4} == {}
    assert 0.4 < found["background"] < 0.8
    modes = [Image.open(pair.image).mode for pair in pairs]
    assert 1 <= modes.count("L") <= 10
    assert set(modes) == {"L", "RGB"}
