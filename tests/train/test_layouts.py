"""The folder layouts of the datasets: files found by name, on a few made-up files and on the real ones."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from ccgpu.train import ade20k, camvid, cityscapes, lip
from ccgpu.train.data.clips import evaluation_clips, training_clips
from ccgpu.train.data.reading import read_pair
from tests.train.dataset_files import check

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def found(module: ModuleType, root: Path, split: str, labelled: bool = True) -> list[tuple[str, str, str | None]]:
    """Return name, image and label file of each pair, relative to the root."""
    return [
        (pair.name, pair.image.relative_to(root).as_posix(), pair.label and pair.label.relative_to(root).as_posix())
        for pair in module.find_pairs(root, split, labelled)
    ]


def test_cityscapes_has_a_folder_for_each_city(tmp_path: Path) -> None:
    for city in ("b", "a"):
        touch(tmp_path, f"leftImg8bit/val/{city}/{city}_1_leftImg8bit.png", f"leftImg8bit/val/{city}/README.txt")
        touch(
            tmp_path, f"gtFine/val/{city}/{city}_1_gtFine_labelIds.png", f"gtFine/val/{city}/{city}_1_gtFine_color.png"
        )
    assert found(cityscapes, tmp_path, "val") == [
        (
            f"{city}_1",
            f"leftImg8bit/val/{city}/{city}_1_leftImg8bit.png",
            f"gtFine/val/{city}/{city}_1_gtFine_labelIds.png",
        )
        for city in ("a", "b")
    ]


@pytest.mark.parametrize(
    ("split", "folder"), [("train_extra", "train_extra"), ("train_coarse", "train"), ("val_coarse", "val")]
)
def test_coarse_labels_of_cityscapes_lie_in_a_folder_of_their_own(split: str, folder: str, tmp_path: Path) -> None:
    image, label = f"leftImg8bit/{folder}/a/a_1_leftImg8bit.png", f"gtCoarse/{folder}/a/a_1_gtCoarse_labelIds.png"
    touch(tmp_path, image, label, f"gtFine/{folder}/a/a_1_gtFine_labelIds.png", label.replace("labelIds", "color"))
    assert found(cityscapes, tmp_path, split) == [("a_1", image, label)]
    assert found(cityscapes, tmp_path, split, False) == [("a_1", image, None)]
    (tmp_path / label).unlink()
    with pytest.raises(FileNotFoundError, match=rf"got 1 of 1 without.*\n.*{label}"):
        cityscapes.find_pairs(tmp_path, split)


def test_the_damaged_image_of_train_extra_is_left_out_with_its_label_file(tmp_path: Path) -> None:
    damaged = f"troisdorf/{cityscapes.DAMAGED}"
    for name in ("troisdorf/troisdorf_000000_000072", damaged):
        touch(tmp_path, f"leftImg8bit/train_extra/{name}_leftImg8bit.png")
        touch(tmp_path, f"gtCoarse/train_extra/{name}_gtCoarse_labelIds.png")
    for labelled in (True, False):
        assert [pair.name for pair in cityscapes.find_pairs(tmp_path, "train_extra", labelled)] == [
            "troisdorf_000000_000072"
        ]
    (tmp_path / f"leftImg8bit/train_extra/{damaged}_leftImg8bit.png").unlink()  # as the dataset's page says
    assert len(cityscapes.find_pairs(tmp_path, "train_extra")) == 1


@pytest.mark.parametrize("above", ["", "ADEChallengeData2016/"])
def test_ade20k_is_found_in_its_folder_and_from_above(above: str, tmp_path: Path) -> None:
    touch(
        tmp_path, f"{above}images/training/a.jpg", f"{above}annotations/training/a.png", f"{above}images/testing/t.jpg"
    )
    assert found(ade20k, tmp_path, "training") == [
        ("a", f"{above}images/training/a.jpg", f"{above}annotations/training/a.png")
    ]
    assert found(ade20k, tmp_path, "testing", False) == [("t", f"{above}images/testing/t.jpg", None)]
    with pytest.raises(FileNotFoundError, match=r"find_pairs: label files must lie in .*testing"):
        ade20k.find_pairs(tmp_path, "testing")


@pytest.mark.parametrize("folders", [("", ""), ("TrainVal_images/", "TrainVal_parsing_annotations/")])
def test_lip_is_found_side_by_side_and_in_the_folders_of_its_archives(folders: tuple[str, str], tmp_path: Path) -> None:
    images, labels = folders
    touch(tmp_path, f"{images}val_images/7_1.jpg", f"{labels}val_segmentations/7_1.png", "test_images/t.jpg")
    assert found(lip, tmp_path, "val") == [("7_1", f"{images}val_images/7_1.jpg", f"{labels}val_segmentations/7_1.png")]
    assert found(lip, tmp_path, "test", False) == [("t", "test_images/t.jpg", None)]
    with pytest.raises(FileNotFoundError, match=r"find_pairs: images must lie in .*train_images"):
        lip.find_pairs(tmp_path, "train")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_camvid_is_found_as_png_and_as_jpg(suffix: str, tmp_path: Path) -> None:
    touch(tmp_path, f"test/a_2.{suffix}", f"test/a_10.{suffix}", "testannot/a_2.png", "testannot/a_10.png", "test.txt")
    assert found(camvid, tmp_path, "test") == [
        (name, f"test/{name}.{suffix}", f"testannot/{name}.png") for name in ("a_10", "a_2")
    ]


def test_frame_of_reads_video_and_number() -> None:
    names = ("0001TP_006690", "0006R0_f00930", "0016E5_08001", "Seq05VD_f00000", "my_video_12")
    assert [camvid.frame_of(name) for name in names] == [
        *(("0001TP", 6690), ("0006R0", 930), ("0016E5", 8001), ("Seq05VD", 0), ("my_video", 12))
    ]
    for name in ("0001TP", "0001TP_", "0001TP_6x", "_12"):
        with pytest.raises(ValueError, match=f"frame_of: name must be VIDEO_NUMBER, got '{name}'"):
            camvid.frame_of(name)


def real(folder: str) -> Path:
    if not (SHARED / folder).is_dir():
        pytest.skip(f"the real data is not here: {SHARED / folder}")
    return SHARED / folder


@pytest.mark.parametrize(
    ("module", "folder", "sizes"),
    [
        (ade20k, "samples/ade20k", {"training": 3, "validation": 3}),
        (lip, "samples/lip", {"train": 1, "val": 1}),
        (camvid, "camvid", {"train": 367, "val": 101, "test": 233}),
    ],
)
def test_real_files_are_found_checked_and_read(module: ModuleType, folder: str, sizes: dict[str, int]) -> None:
    labels = module.DATASET.labels
    for split, number in sizes.items():
        pairs = module.find_pairs(real(folder), split)
        check(pairs[::10], labels)
        assert len(pairs) == number
        for pair in pairs[:3]:
            image, label = read_pair(pair, labels)
            assert image.shape == (*label.shape, 3)
            classes = set(np.unique(label).tolist())
            assert classes <= {*range(labels.num_classes), 255}
            assert len(classes) > 4


def test_real_lip_has_a_grey_image() -> None:
    (pair,) = lip.find_pairs(real("samples/lip"), "val")
    assert Image.open(pair.image).mode == "L"


def test_real_camvid_is_videos() -> None:
    root = real("camvid")
    videos = {
        split: {camvid.frame_of(pair.name)[0] for pair in camvid.find_pairs(root, split)} for split in ("train", "val")
    }
    assert videos == {"train": {"0001TP", "0006R0", "0016E5"}, "val": {"0016E5"}}
    pairs = camvid.find_pairs(root, "val")
    assert len(training_clips(pairs, 5, camvid.frame_of)) == 97  # one stretch of 101 frames
    clips = evaluation_clips(camvid.find_pairs(root, "test"), 5, camvid.frame_of)
    assert sum(len(clip) - first for clip, first in clips) == 233


@pytest.mark.parametrize(("module", "closed"), [(camvid, "train"), (cityscapes, "town")], ids=["camvid", "cityscapes"])
def test_a_folder_that_cannot_be_read_is_an_error(
    module: ModuleType, closed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images and label files in an unreadable folder would otherwise be left out without a word."""
    for file in ("train/a_1.png", "trainannot/a_1.png"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    for kind, ending in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
        for town in ("town", "city"):
            (tmp_path / kind / "train" / town).mkdir(parents=True)
            (tmp_path / kind / "train" / town / f"{town}_1_{ending}.png").touch()
    entries = Path.iterdir

    def iterdir(path: Path) -> Iterator[Path]:
        if path.name == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return entries(path)

    assert module.find_pairs(tmp_path, "train")
    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(PermissionError):
        module.find_pairs(tmp_path, "train")


@pytest.mark.parametrize(
    "file",
    [
        "images/ADE/training/urban/street/ADE_train_00000001.jpg",
        "ADE20K_2021_17_01/images/ADE/training/urban/street/ADE_train_00000001.jpg",
        "index_ade20k.mat",
    ],
)
def test_full_ade20k_is_told_apart(tmp_path: Path, file: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(FileNotFoundError, match=r"must be ADEChallengeData2016 .*, got the full ADE20K in .*download"):
        ade20k.find_pairs(tmp_path, "training")
