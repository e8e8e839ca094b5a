"""Pascal VOC: its folders and lists, as people have them, and the training command on synthetic images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ccgpu.train import voc
from ccgpu.train.data.reading import read_pair
from tests.train.training import SMALL, TINY, told


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def lists(root: Path, **splits: str) -> None:
    folder = root / "ImageSets" / "Segmentation"
    folder.mkdir(parents=True, exist_ok=True)
    for split, text in splits.items():
        (folder / f"{split}.txt").write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Five images: a and b to train on, c to evaluate on, d and e with augmented masks alone."""
    touch(tmp_path, *(f"JPEGImages/{name}.jpg" for name in "abcdet"), *(f"SegmentationClass/{n}.png" for n in "abc"))
    touch(tmp_path, *(f"SegmentationClassAug/{name}.png" for name in "acde"))
    lists(tmp_path, train="b\na\n", val="c\n", trainval="a\nb\nc\n", test="t\n")
    return tmp_path


def found(root: Path, split: str, labelled: bool = True) -> dict[str, str | None]:
    """Return name -> folder of the label file."""
    pairs = voc.find_pairs(root, split, labelled)
    assert all(pair.image.name == f"{pair.name}.jpg" for pair in pairs)
    assert all(pair.label is None or pair.label.name == f"{pair.name}.png" for pair in pairs)
    return {pair.name: None if pair.label is None else pair.label.parent.name for pair in pairs}


def test_splits_are_those_of_the_lists_and_aug_is_the_rest(root: Path) -> None:
    own, augmented = "SegmentationClass", "SegmentationClassAug"
    assert [*found(root, "train").items()] == [("a", own), ("b", own)]  # by name, whatever the list's order
    assert found(root, "val") == {"c": own}
    assert found(root, "trainval") == dict.fromkeys("abc", own)
    assert found(root, "aug") == dict.fromkeys("de", augmented)
    assert found(root, "test", False) == {"t": None}
    lists(root, aug="e\n", trainaug="a\nb\nd\n")
    assert found(root, "aug") == {"e": augmented}
    assert found(root, "trainaug") == {"a": augmented, "b": own, "d": augmented}


@pytest.mark.parametrize("above", ["VOC2012", "VOCdevkit/VOC2012"])
def test_the_folder_may_be_one_above(above: str, tmp_path: Path) -> None:
    touch(tmp_path / above, "JPEGImages/a.JPG", "SegmentationClass/a.png")
    lists(tmp_path / above, train="a")
    (pair,) = voc.find_pairs(tmp_path, "train")
    assert pair.image == tmp_path / above / "JPEGImages/a.JPG"


@pytest.mark.parametrize(
    "text",
    [
        "a\n\nb  \n",
        "/JPEGImages/a.jpg /SegmentationClass/a.png\n/JPEGImages/b.jpg /SegmentationClass/b.png\n",
        "a 1\nb -1\na 1\n",
        "\ufeffa\r\nb\r\n",
        "JPEGImages\\a.jpg\nb.jpg",
    ],
)
def test_lists_may_hold_paths_columns_and_blank_lines(text: str, root: Path) -> None:
    lists(root, train=text)
    assert [*found(root, "train")] == ["a", "b"]


def test_a_name_with_dots_is_taken_whole(root: Path) -> None:
    touch(root, "JPEGImages/a.v2.jpg", "SegmentationClass/a.v2.png")
    lists(root, train="a.v2\n")
    assert [*found(root, "train")] == ["a.v2"]


@pytest.mark.parametrize(
    ("remove", "split", "message"),
    [
        ("JPEGImages/d.jpg", "aug", r"1 missing of 2 images.*\n  no image .*JPEGImages/d\.jpg"),
        ("SegmentationClass/b.png", "train", r"got 1 missing of 2.*\n  no label file .*SegmentationClass/b\.png"),
        ("ImageSets/Segmentation/val.txt", "val", "got 'val'.* Lists there: test train trainval"),
        ("nothing", "minival", "got 'minival'.* Lists there: test train trainval val"),
        ("nothing", "test", "whose masks are not public; ccgpu evaluate --split test --unlabelled"),
    ],
)
def test_what_is_missing_is_named(remove: str, split: str, message: str, root: Path) -> None:
    (root / remove).unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match=message):
        voc.find_pairs(root, split)


def test_folders_that_are_missing_are_named(root: Path, tmp_path: Path) -> None:
    (root / "SegmentationClassAug").rename(root / "other")
    with pytest.raises(FileNotFoundError, match=r"SegmentationClassAug\.zip.*--train-split train trains on VOC's"):
        voc.find_pairs(root, "aug")
    with pytest.raises(FileNotFoundError, match=r"got 'aug'.*Lists there"):
        voc.find_pairs(root, "aug", False)
    assert [*found(root, "train")] == ["a", "b"]
    (root / "JPEGImages").rename(root / "images")
    with pytest.raises(FileNotFoundError, match=r"images must lie in .*, got no folder 'JPEGImages'.*\n  ImageSets"):
        voc.find_pairs(root, "train")


def test_a_folder_that_is_none_of_voc_is_told_with_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "VOC2007").mkdir()
    with pytest.raises(FileNotFoundError, match=r"got no folder 'ImageSets' in .*\n  VOC2007"):
        voc.find_pairs(tmp_path, "train")


def test_augmented_masks_one_folder_too_deep_are_told(root: Path) -> None:
    (root / "SegmentationClassAug").rename(root / "inner")
    (root / "SegmentationClassAug").mkdir()
    (root / "inner").rename(root / "SegmentationClassAug/SegmentationClassAug")
    with pytest.raises(FileNotFoundError, match=r"'aug' must lie in .*Aug, got none; move them there"):
        voc.find_pairs(root, "aug")


def test_hidden_files_of_macos_are_no_masks(root: Path) -> None:
    touch(root, "SegmentationClassAug/._d.png", "JPEGImages/._d.jpg", "ImageSets/Segmentation/._val.txt")
    assert [*found(root, "aug")] == ["d", "e"]
    with pytest.raises(FileNotFoundError, match=r"Lists there: test train trainval val$"):
        voc.find_pairs(root, "minival")


def test_an_empty_list_is_no_split(root: Path) -> None:
    lists(root, train="\n \n")
    with pytest.raises(ValueError, match=r"must name images, got none in .*train\.txt"):
        voc.find_pairs(root, "train")


def test_colours_are_those_of_the_development_kit() -> None:
    """VOClabelcolormap: bits 0, 3, ... of the id are the high bits of red, 1, 4, ... of green, 2, 5, ... of blue."""
    for index, colour in enumerate(voc.LABELS.colours.tolist()):
        bits = f"{index:09b}"[::-1]
        assert colour == [int("".join(bits[channel::3]).ljust(8, "0"), 2) for channel in range(3)]
    assert voc.LABELS.names[15] == "person"
    assert voc.LABELS.to_train[[0, 20, 255]].tolist() == [0, 20, 255]


def test_synthetic_masks_are_palette_files_of_many_classes(tmp_path: Path) -> None:
    data = voc.write_scenes(tmp_path / "data", {"train": 4, "aug": 4, "val": 3}, (96, 144), 3)
    assert [len(voc.find_pairs(data, split)) for split in ("train", "aug", "val")] == [4, 4, 3]
    pairs = [pair for split in ("train", "aug") for pair in voc.find_pairs(data, split)]
    classes: set[int] = set()
    for pair in pairs:
        assert pair.label is not None
        mask = Image.open(pair.label)
        palette = mask.getpalette()
        assert mask.mode == "P"
        assert palette is not None
        assert palette[:63] == voc.LABELS.colours.ravel().tolist()
        assert palette[-3:] == [224, 224, 192]
        classes |= {*np.unique(read_pair(pair, voc.LABELS)[1]).tolist()}
    names = {voc.LABELS.names[value] for value in classes - {255}}
    assert {"background", "person", "bicycle", "motorbike", "car", "bus", "train"} <= names
    assert 255 in classes
    first, augmented = pairs[0].image, pairs[4].image
    assert first.read_bytes() != augmented.read_bytes()


def test_masks_of_colours_are_told_with_what_to_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = voc.write_scenes(tmp_path / "data", {"train": 2, "aug": 1, "val": 1}, (64, 96), 3)
    for path in (data / "SegmentationClass").iterdir():
        Image.open(path).convert("RGB").save(path)
    assert voc.main([*TINY, *SMALL["voc"], "--data", str(data), "--out", str(tmp_path / "run")]) == 2
    lines = told_last(capsys)
    assert "a mask of colours, not one of ids" in lines[0]
    assert lines[-1].startswith("label files: use the palette files of SegmentationClass/")
    assert "SegmentationClassRaw/" in lines[-1]


def told_last(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines of the last error, from the first problem on."""
    lines = capsys.readouterr().err.splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith("train: ")) + 1 :]


def test_synthetic_images_are_shared_among_the_splits_to_train_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert voc.main([*TINY, *SMALL["voc"], "--scenes", "5", "2", "--out", str(out), "--iterations", "1"]) == 0
    assert [len(voc.find_pairs(out / "scenes", split)) for split in ("train", "aug", "val")] == [3, 2, 2]
    capsys.readouterr()
    assert voc.main([*TINY, *SMALL["voc"], "--scenes", "1", "2", "--out", str(tmp_path / "other")]) == 2
    assert "--scenes must be 2 images or more to train on, one for each of train aug, got 1" in told(capsys, "train")


def test_an_image_of_two_splits_is_trained_on_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = voc.write_scenes(tmp_path / "data", {"train": 3, "val": 2}, (64, 96), 3)
    lists(data, trainval="".join((data / "ImageSets/Segmentation" / f"{s}.txt").read_text() for s in ("train", "val")))
    flags = ["--data", str(data), "--train-split", "train", "trainval", "--iterations", "1", "--device", "cpu"]
    assert voc.main([*TINY, *SMALL["voc"], *flags, "--out", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr()
    assert "note: 3 images are in several of train trainval; each is trained on once" in shown.out + shown.err
    assert ", 5 images for training" in shown.out + shown.err
