"""The split of a folder: its own, or a share by a hash of the names; fixed once it is saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from ccgpu.train.data.folder.layout import Layout, find_layout
from ccgpu.train.data.folder.split import Split, split_of, whole_of


def layout_of(root: Path, *names: str, below: str = "") -> Layout:
    for name in names:
        for folder, suffix in (("images", ".jpg"), ("masks", ".png")):
            path = root / below / folder / f"{name}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return find_layout(root)


def split(layout: Layout, share: float = 0.2) -> Split:
    pairs = {part: layout.match(part)[0] for part in layout.parts if part != "test"}
    return split_of(layout, pairs, share)


@pytest.mark.parametrize(("number", "share", "held_out"), [(2, 0.01, 1), (2, 0.99, 1), (10, 0.2, 2), (10, 0.35, 4)])
def test_a_share_is_held_out_and_at_least_one_on_either_side(
    number: int, share: float, held_out: int, tmp_path: Path
) -> None:
    names = [f"{index}" for index in range(number)]
    found = split(layout_of(tmp_path, *names), share).names
    assert found is not None
    assert len(found["val"]) == held_out
    assert sorted([*found["train"], *found["val"]]) == names


def test_the_choice_depends_on_the_names_alone(tmp_path: Path) -> None:
    names = [f"{index}" for index in range(20)]
    one, other = split(layout_of(tmp_path / "a", *names)), split(layout_of(tmp_path / "b", *reversed(names)))
    assert one.names == other.names


def test_one_image_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold 2 images with masks or more, .*got 1"):
        split(layout_of(tmp_path, "a"))


def test_the_folders_own_split_is_taken(tmp_path: Path) -> None:
    layout_of(tmp_path, "a", "b", below="train")
    layout = layout_of(tmp_path, "a", below="val")
    found = split(layout)
    assert found.names == {"train": ["a", "b"], "val": ["a"]}
    assert "--val-share is not used" in found.said
    (pair,) = found.choose(layout, "val")
    assert pair.image == tmp_path / "val/images/a.jpg"


def test_a_saved_split_stays_and_its_missing_files_are_told(tmp_path: Path) -> None:
    names = [f"{index}" for index in range(10)]
    layout = layout_of(tmp_path, *names)
    saved = Split.from_plain(split(layout).as_plain())
    before = {part: saved.choose(layout, part) for part in ("train", "val")}
    assert saved.new(layout) == []
    layout = layout_of(tmp_path, *(f"new{index}" for index in range(30)))
    assert {part: saved.choose(layout, part) for part in ("train", "val")} == before
    assert len(saved.new(layout)) == 30
    before["val"][0].image.unlink()
    with pytest.raises(FileNotFoundError, match="got 1 of 2 for val missing; put them back") as caught:
        saved.choose(layout, "val")
    assert f"  {before['val'][0].name}" in str(caught.value)
    assert saved.choose(layout, "train") == before["train"]


def test_another_folder_is_evaluated_by_its_split_or_whole(tmp_path: Path) -> None:
    layout = layout_of(tmp_path / "flat", "a", "b")
    assert whole_of(layout).said == "all of it, because it has no val split"
    assert [pair.name for pair in whole_of(layout).choose(layout, "val")] == ["a", "b"]
    layout_of(tmp_path / "split", "a", below="train")
    layout = layout_of(tmp_path / "split", "b", below="val")
    assert whole_of(layout).said == "its val split"
    assert [pair.name for pair in whole_of(layout).choose(layout, "val")] == ["b"]
