"""The cache of facts: what did not change is not decoded again, and a damaged cache never matters."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ccgpu.train.data.checking import File, files_of
from ccgpu.train.data.facts import Facts, facts_of
from ccgpu.train.data.facts_cache import cache_path, read_cache, stamp_of, write_cache
from tests.train.dataset_files import write_pair


def write(tmp_path: Path) -> tuple[Path, dict[File, Facts], dict[File, tuple[int, int, int] | None]]:
    """Write two pairs and the cache of their facts."""
    files = files_of([write_pair(tmp_path / "data", name) for name in ("a", "bc")])
    stamps = {file: stamp_of(file[0]) for file in files}
    facts = {file: facts_of(file[0], is_label=file[1]) for file in files}
    path = tmp_path / "caches" / "data.json"
    write_cache(path, facts, stamps)
    return path, facts, stamps


def test_facts_survive(tmp_path: Path) -> None:
    path, facts, stamps = write(tmp_path)
    assert all((found.mask is not None) == is_label for (_, is_label), found in facts.items())
    assert all(sum(found.mask.pixels.values()) == 48 for found in facts.values() if found.mask is not None)
    assert read_cache(path, stamps) == facts
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_file_that_changed_is_not_taken_from_the_cache(tmp_path: Path) -> None:
    path, facts, stamps = write(tmp_path)
    first, *others = facts
    before = first[0].stat()
    time.sleep(0.02)  # a tick of the file system's clock
    first[0].write_bytes(first[0].read_bytes())
    os.utime(first[0], ns=(before.st_atime_ns, before.st_mtime_ns))  # size and time as before
    assert read_cache(path, {file: stamp_of(file[0]) for file in facts}) == {file: facts[file] for file in others}
    assert read_cache(path, {**stamps, first: None}) == {file: facts[file] for file in others}


def test_files_of_other_splits_stay_and_problems_are_not_stored(tmp_path: Path) -> None:
    path, facts, stamps = write(tmp_path)
    other, broken, large = ((tmp_path / name, False) for name in ("other.png", "broken.png", "large.png"))
    more = {other: Facts(size=(2, 3)), broken: Facts(problem="empty file"), large: Facts(decoded=False)}
    marks = dict.fromkeys(more, (1, 2, 3))
    write_cache(path, more, marks)
    assert read_cache(path, {**stamps, **marks}) == {**facts, other: more[other]}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 0}', '{"version": 1, "files": []}'])
def test_a_damaged_cache_is_an_error_to_be_told_and_is_replaced(tmp_path: Path, content: str) -> None:
    path, facts, stamps = write(tmp_path)
    path.write_text(content)
    with pytest.raises(ValueError, match="damaged, or of another version"):
        read_cache(path, stamps)
    write_cache(path, facts, stamps)
    assert read_cache(path, stamps) == facts


def test_a_byte_that_changed_anywhere_is_an_error(tmp_path: Path) -> None:
    """Many such changes would read as other facts: another number of pixels, another size."""
    path, _, stamps = write(tmp_path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="damaged, or of another version"):
            read_cache(path, stamps)


def test_a_cache_that_cannot_be_renamed_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path, facts, stamps = write(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        write_cache(path, facts, stamps)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_cache_path_is_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CCGPU_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_path(tmp_path).parent == tmp_path / "xdg" / "ccgpu" / "datasets"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_path(tmp_path).parent == tmp_path / "home" / ".cache" / "ccgpu" / "datasets"
    monkeypatch.setenv("HOME", "nowhere")
    with pytest.raises(OSError, match="there is no home folder"):
        cache_path(tmp_path)
    monkeypatch.setenv("CCGPU_CACHE_DIR", str(tmp_path / "own"))
    assert cache_path(tmp_path).parent == tmp_path / "own" / "datasets"
    assert cache_path(tmp_path) == cache_path(tmp_path / "x" / "..") != cache_path(tmp_path / "x")
