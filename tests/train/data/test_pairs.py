"""Images and label files of a dataset, found by name; what is missing or odd is named."""

import re
from pathlib import Path

import pytest

from ccgpu.train.data.pairs import Pair, find_by_name
from tests.train.dataset_files import find, write_pair


def test_find_by_name_lists_images_of_every_suffix_by_name(tmp_path: Path) -> None:
    names = (("b", ".JPG"), ("a", ".jpeg"), ("c.d_e", ".png"), ("B", ".jpg"))
    pairs = [write_pair(tmp_path, name, suffix=suffix) for name, suffix in names]
    for stray in ("images/._b.jpg", "images/Thumbs.db", "labels/.hidden.png", "labels/b.txt", "images/notes.txt"):
        (tmp_path / stray).touch()
    expected = sorted(pairs, key=lambda pair: pair.name)
    assert find(tmp_path) == expected
    assert find(tmp_path, labelled=False) == [Pair(pair.image, None, pair.name) for pair in expected]


def test_find_by_name_joins_subfolders_and_long_suffixes(tmp_path: Path) -> None:
    for file in (
        "left/train/ulm/ulm_1_left.png",
        "left/train/aachen/aachen_2_left.png",
        "left/train/aachen/aachen_1_right.png",
        "left/train/ulm_3_left.png",
        "fine/train/ulm/ulm_1_ids.png",
        "fine/train/ulm/ulm_1_color.png",
        "fine/train/aachen/aachen_2_ids.png",
        "left/train/.trash/ulm_4_left.png",
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    images, labels = tmp_path / "left/train", tmp_path / "fine/train"
    assert find_by_name("f", images, labels, ("_left.png",), "_ids.png", depth=1) == [
        Pair(images / "aachen/aachen_2_left.png", labels / "aachen/aachen_2_ids.png", "aachen_2"),
        Pair(images / "ulm/ulm_1_left.png", labels / "ulm/ulm_1_ids.png", "ulm_1"),
    ]
    (labels / "ulm/ulm_1_ids.png").rename(labels / "aachen/ulm_1_ids.png")
    with pytest.raises(FileNotFoundError, match="got 2 of 3 without"):
        find_by_name("f", images, labels, ("_left.png",), "_ids.png", depth=1)


def test_find_by_name_says_which_folder_is_missing_and_which_there_are(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for folder, missing in ((tmp_path, "data"), (root, "images"), (root, "labels")):
        with pytest.raises(FileNotFoundError, match=f"find_pairs: .* got no folder '{missing}' in {folder};"):
            find(root)
        (root if folder == tmp_path else root / missing).mkdir()
    (root / ".cache").mkdir()
    with pytest.raises(FileNotFoundError, match=r"got no folder 'test' in .*Folders there:\n  images\n  labels$"):
        find_by_name("find_pairs", root / "test", None)
    for labels in (root / "labels", None):
        with pytest.raises(FileNotFoundError, match=r"split must hold images, got none named \*\(.png\|.jpg\|"):
            find_by_name("find_pairs", root / "images", labels)
    with pytest.raises(FileNotFoundError, match=rf"got none .* in {root}/images/\*;"):
        find_by_name("find_pairs", root / "images", None, depth=1)


def test_find_by_name_names_files_without_partner(tmp_path: Path) -> None:
    pairs = [write_pair(tmp_path, f"{index:02d}") for index in range(15)]
    assert pairs[0].label is not None
    pairs[0].label.unlink()
    pairs[1].image.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        find(tmp_path)
    message = str(caught.value)
    assert "got 2 of 15 without" in message
    assert f"{pairs[0].image} has no label file" in message
    assert f"{pairs[1].label} has no image" in message
    assert len(find(tmp_path, labelled=False)) == 14
    for pair in pairs[2:13]:
        pair.image.unlink()
    with pytest.raises(FileNotFoundError, match=r"(?s)got 13 of 15 without.*\.\.\. and 3 more"):
        find(tmp_path)


def test_find_by_name_refuses_two_files_of_one_name(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "a", suffix=".jpg")
    write_pair(tmp_path, "a", suffix=".png")
    with pytest.raises(ValueError, match=r"images must have different names, got 1 names twice.*\n.*a.jpg and a.png"):
        find(tmp_path)
    (tmp_path / "images/a.png").unlink()
    (tmp_path / "labels/a.PNG").touch()
    with pytest.raises(ValueError, match="label files must have different names"):
        find(tmp_path)
    assert find(tmp_path, labelled=False) == [Pair(pair.image, None, "a")]


def test_find_by_name_names_the_file_it_looked_for_and_near_misses(tmp_path: Path) -> None:
    images, labels = tmp_path / "images", tmp_path / "labels"
    for file in ("images/0.jpg", "images/1.jpg", "images/2.jpg", "images/a.jpg", "images/10.jpg"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    labels.mkdir()
    for name in ("0.tif", "1_mask.png", "1_mask.txt", "1.jpg", "1.gif", "1.bmp", "A.png", "100.png"):
        (labels / name).touch()
    with pytest.raises(FileNotFoundError) as caught:
        find(tmp_path)
    lines = str(caught.value).splitlines()[1:]
    assert lines == [
        f"  {images}/0.jpg has no label file {labels}/0.png, but there is 0.tif",
        f"  {images}/1.jpg has no label file {labels}/1.png, but there is 1.bmp, 1.gif, 1.jpg and 2 more",
        f"  {images}/10.jpg has no label file {labels}/10.png",
        f"  {images}/2.jpg has no label file {labels}/2.png",
        f"  {images}/a.jpg has no label file {labels}/a.png, but there is A.png",
        f"  {labels}/100.png has no image {images}/100.*",
        f"  {labels}/1_mask.png has no image {images}/1_mask.*",
        f"  {labels}/A.png has no image {images}/A.*, but there is a.jpg",
    ]


def test_find_by_name_finds_near_misses_in_other_folders(tmp_path: Path) -> None:
    images, labels = tmp_path / "images", tmp_path / "labels"
    for file in ("images/ulm/u_i.png", "images/bonn/b_i.png", "labels/bonn/u_ids.png", "labels/bonn/b_trainIds.png"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (labels / "ulm").mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        find_by_name("f", images, labels, ("_i.png",), "_ids.png", depth=1)
    lines = str(caught.value).splitlines()[1:]
    assert lines == [
        f"  {images}/bonn/b_i.png has no label file {labels}/bonn/b_ids.png, but there is b_trainIds.png",
        f"  {images}/ulm/u_i.png has no label file {labels}/ulm/u_ids.png, but there is {labels}/bonn/u_ids.png",
        f"  {labels}/bonn/u_ids.png has no image {images}/bonn/u_i.png, but there is {images}/ulm/u_i.png",
    ]


def test_find_by_name_sees_through_the_forms_of_unicode(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    for file in (f"images/{composed}.jpg", f"labels/{decomposed}.png"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    with pytest.raises(FileNotFoundError) as caught:
        find(tmp_path)
    # The two names look the same, so the message must say in which way they are not.
    expected = f"{composed}.jpg has no label file .*, but there is {decomposed}.png \\(its accents are written as other"
    assert re.search(expected, str(caught.value))


def test_find_by_name_tells_of_folders_where_images_should_be(tmp_path: Path) -> None:
    for file in ("images/city/a.png", "labels/a.png"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    with pytest.raises(
        FileNotFoundError, match=r"must hold images, got none named .* in \S*images, but the folders city/; "
    ):
        find(tmp_path)
