"""Layouts of folders: every spelling is found and named, what is ambiguous or missing is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ccgpu.train.data.folder.layout import find_layout


def touch(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


@pytest.mark.parametrize(
    ("files", "shown"),
    [
        (("images/a.jpg", "masks/a.png"), "images/ with masks/"),
        (("JPEGImages/a.jpg", "SegmentationClass/a.png"), "JPEGImages/ with SegmentationClass/"),
        (("IMG/a.jpg", "Annotations/a.png"), "IMG/ with Annotations/"),
        (
            ("train/images/a.jpg", "train/labels/a.png", "Valid/imgs/b.jpg", "Valid/mask/b.png"),
            "train: train/images/ with train/labels/; val: Valid/imgs/ with Valid/mask/",
        ),
        (
            (
                "images/training/a.jpg",
                "masks/training/a.png",
                "images/val/b.jpg",
                "masks/val/b.png",
                "images/test/c.jpg",
            ),
            "train: images/training/ with masks/training/; val: images/val/ with masks/val/; "
            "test: images/test/ without masks",
        ),
        (
            ("train/images/a.jpg", "train/masks/a.png", "test/images/c.jpg"),
            "train: train/images/ with train/masks/; test: test/images/ without masks",
        ),
    ],
)
def test_every_layout_is_found(files: tuple[str, ...], shown: str, tmp_path: Path) -> None:
    layout = find_layout(touch(tmp_path, *files))
    assert str(layout) == shown
    part = "all" if "all" in layout.parts else "train"
    pairs, problems = layout.match(part)
    assert problems == []
    assert [(pair.image.name, pair.label.name if pair.label else None) for pair in pairs] == [("a.jpg", "a.png")]


@pytest.mark.parametrize("ending", ["_mask.png", "-Label.PNG", ".jpg.png"])
def test_masks_beside_their_images(ending: str, tmp_path: Path) -> None:
    touch(tmp_path, *(name for image in "abc" for name in (f"{image}.jpg", f"{image}{ending}")), "runs/b/c.jpg")
    layout = find_layout(tmp_path)
    assert str(layout) == "images and masks in ./"
    pairs, problems = layout.match("all")
    assert problems == []
    assert [(pair.image.name, pair.label.name) for pair in pairs if pair.label is not None] == [
        (f"{image}.jpg", f"{image}{ending}") for image in "abc"
    ]
    assert [pair.name for pair in layout.match("all", labelled=False)[0]] == ["a", "b", "c"]
    touch(tmp_path, "d.jpg", "e_mask.png")
    _, problems = layout.match("all")
    assert "got 2 of 5 without" in problems[0]
    assert f"{tmp_path / 'd.jpg'} has no label file {tmp_path / 'd_mask.*'}\n" in problems[0]
    touch(tmp_path, "a_seg.png")
    assert "label files must have different names" in layout.match("all")[1][0]


def test_splits_with_masks_beside_their_images(tmp_path: Path) -> None:
    touch(tmp_path, "train/a.jpg", "train/a_mask.png", "valid/b.jpg", "valid/b_mask.png", "test/c.jpg")
    layout = find_layout(tmp_path)
    assert (
        str(layout) == "train: images and masks in train/; val: images and masks in valid/; test: test/ without masks"
    )
    assert [pair.name for pair in layout.match("val")[0]] == ["b"]
    touch(tmp_path / "named", "data/a.jpg", "data/a_mask.png")
    assert str(find_layout(tmp_path / "named", "data", "data")) == "images and masks in data/"


def test_subfolders_are_a_part_of_the_name(tmp_path: Path) -> None:
    files = (
        "images/ulm/1.jpg",
        "images/bonn/1.JPG",
        "images/2.tif",
        "masks/ulm/1.png",
        "masks/bonn/1.bmp",
        "masks/2.gif",
    )
    pairs, problems = find_layout(touch(tmp_path, *files)).match("all")
    assert problems == []
    assert [pair.name for pair in pairs] == ["2", "bonn/1", "ulm/1"]
    assert [pair.label.name for pair in pairs if pair.label] == ["2.gif", "1.bmp", "1.png"]


def test_masks_may_have_an_ending_where_no_mask_has_the_name_itself(tmp_path: Path) -> None:
    files = ["images/a.jpg", "images/b.jpg", "images/c_mask.jpg", "images/d.jpg"]
    files += ["masks/a_mask.png", "masks/b-GT.png", "masks/c_mask.png", "masks/d.png"]
    pairs, problems = find_layout(touch(tmp_path, *files)).match("all")
    assert problems == []
    assert {pair.name: pair.label.name for pair in pairs if pair.label} == {
        "a": "a_mask.png",
        "b": "b-GT.png",
        "c_mask": "c_mask.png",
        "d": "d.png",
    }
    touch(tmp_path, "masks/d_mask.png", "masks/a_seg.png")
    _, problems = find_layout(tmp_path).match("all")
    text = "\n".join(problems)
    assert "got 1 names twice" in text
    assert "a_mask.png and a_seg.png" in text
    assert "d_mask.png has no image" in text


def test_all_problems_of_names_are_told_together(tmp_path: Path) -> None:
    files = ["images/a.jpg", "images/a.png", "images/b.jpg", "masks/a.png", "masks/c.png", "masks/b.txt"]
    _, problems = find_layout(touch(tmp_path, *files)).match("all")
    text = "\n".join(problems)
    assert "images must have different names, got 1 names twice" in text
    assert "b.jpg has no label file" in text
    assert "but there is b.txt" in text
    assert "c.png has no image" in text


def test_so_many_problems_are_listed_or_all(tmp_path: Path) -> None:
    layout = find_layout(touch(tmp_path, "masks/x.png", *(f"images/{index}.jpg" for index in range(15))))
    assert "... and 6 more" in layout.match("all")[1][0]
    assert layout.match("all", whole=True)[1][0].count("has no label file") == 15


@pytest.mark.parametrize(
    ("files", "kind", "message"),
    [
        (("images/a.jpg", "masks/a.png", "labels/a.png"), ValueError, "got labels/ and masks/; name one with --masks"),
        (
            ("images/a.jpg", "masks/a.png", "train/images/a.jpg", "train/masks/a.png"),
            ValueError,
            "got images/, masks/, train/; move one kind elsewhere",
        ),
        (("images/a.jpg", "other/a.png"), FileNotFoundError, r"got images alone; add a folder of masks \(masks/"),
        (("photos/a.jpg", "drawings/a.png"), FileNotFoundError, "got the folders: drawings/, photos/; .*--images"),
        (("val/images/a.jpg", "val/masks/a.png"), FileNotFoundError, "must have a split to train on, got val"),
        (("images/train/a.jpg", "masks/a.png"), FileNotFoundError, "must have the same splits, got train in one"),
        (
            ("images/train/a.jpg", "masks/train/a.png", "masks/val/b.png"),
            FileNotFoundError,
            "must have the same splits, got val in one",
        ),
    ],
)
def test_what_is_ambiguous_or_missing_is_told(
    files: tuple[str, ...], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        find_layout(touch(tmp_path, *files))


def test_flags_name_the_folders(tmp_path: Path) -> None:
    touch(tmp_path, "photos/a.jpg", "masks/a.png", "labels/a.png", "photos/val/x.txt")
    assert str(
        find_layout(touch(tmp_path / "b", "photos/a.jpg", "labels/a.png", "masks/a.png"), "Photos", "labels")
    ) == ("photos/ with labels/")


def test_images_beside_the_splits_are_told(tmp_path: Path) -> None:
    layout = find_layout(touch(tmp_path, "images/train/a.jpg", "images/b.jpg", "masks/train/a.png"))
    assert layout.left_out == (f"1 images in {tmp_path / 'images'} itself, beside its splits, are left out",)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape("--data must be a folder, got")):
        find_layout(touch(tmp_path, "a.zip") / "a.zip")
