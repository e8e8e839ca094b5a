"""Train CCNet on Pascal VOC 2012 with the augmented training set: `ccgpu train voc --data PATH`.

1464 images for training and 1449 for validation, with 20 kinds of objects and the background; the masks of 9118 more
training images are those of the Semantic Boundaries Dataset (Hariharan et al., ICCV 2011), so that the splits "train"
and "aug" together are the 10582 images that papers train on. The paper has no VOC experiment: crop, batch, schedule and
sizes are those of mmsegmentation's CCNet (512x512, 16, 20000 steps, weight decay 0.0005, images of short side 512), the
network is the paper's; `--preset mmseg-voc` trains as mmsegmentation does in all. Without `--data` the images are
synthetic street scenes (`scenes/streets.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ccgpu.models.labels import Labels
from ccgpu.train import command
from ccgpu.train.data.listed import files_by_name, find_listed, read_list
from ccgpu.train.data.pairs import Pair
from ccgpu.train.dataset import Dataset
from ccgpu.train.presets import DEMO, MMSEGMENTATION
from ccgpu.train.scenes.canvas import by_id, void_borders
from ccgpu.train.scenes.files import Key, file_in, varied_size, write_synthetic
from ccgpu.train.scenes.streets import draw_scene

VOID = 255
LABELS = Labels(
    names=(
        *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
        *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
    ),
    colours=np.array(
        [
            *([0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [128, 0, 128], [0, 128, 128]),
            *([128, 128, 128], [64, 0, 0], [192, 0, 0], [64, 128, 0], [192, 128, 0], [64, 0, 128], [192, 0, 128]),
            *([64, 128, 128], [192, 128, 128], [0, 64, 0], [128, 64, 0], [0, 192, 0], [128, 192, 0], [0, 64, 128]),
        ],
        dtype=np.uint8,
    ),
    ids=tuple(range(21)),
    void=(VOID,),
    hint="use the palette files of SegmentationClass/ as they are in VOC's archive, or the grey ones of "
    "SegmentationClassRaw/, which some tools make of them; files of colours are copies that a program changed",
)
"""Colours as in VOC's development kit (VOClabelcolormap)."""

_ROOTS = ("VOC2012", "VOCdevkit/VOC2012")  # where the dataset lies in folders of its archives
_LISTS = "ImageSets/Segmentation"
_MASKS, _AUGMENTED = "SegmentationClass", "SegmentationClassAug"
_VOID_COLOUR = (224, 224, 192)  # of the borders, in the palettes of VOC's masks
# Name of a thing in synthetic scenes -> its class; everything else is background.
_CLASS_OF = {
    **{name: name for name in ("bicycle", "bus", "car", "person", "train")},
    "motorcycle": "motorbike",
    "rider": "person",
}
# Id in a synthetic scene -> id in the label files.
_LABEL_IDS = by_id({thing: LABELS.names.index(name) for thing, name in _CLASS_OF.items()}, 0).astype(np.uint8)


def find_pairs(root: Path, split: str, labelled: bool = True) -> list[Pair]:
    """Return the images of a split, sorted by name.

        root/ImageSets/Segmentation/SPLIT.txt      "train", "val", "trainval", ...: a name in each line
        root/JPEGImages/NAME.jpg
        root/SegmentationClass/NAME.png
        root/SegmentationClassAug/NAME.png         of the splits "aug", "trainaug" and "train_aug"

    The root may also be VOCdevkit/ or the folder that holds it. Without aug.txt the split "aug" is every mask of
    SegmentationClassAug/ that is neither in train.txt nor in val.txt. An image of "trainaug" or "train_aug" without a
    mask there has that of SegmentationClass/. The split "test" has no label files: look for it with labelled=False.

    Raises:
        FileNotFoundError: there is no such list or folder, or images or masks are missing; the message names them.
        ValueError: a list is empty.
    """
    top = Path(root)
    root = next((top / name for name in _ROOTS if (top / name).is_dir()), top)
    augmented = root / _AUGMENTED
    is_augmented = split in ("aug", "trainaug", "train_aug")
    if is_augmented and labelled and not augmented.is_dir():
        raise FileNotFoundError(
            f"find_pairs: split {split!r} must have its masks in {augmented}, got no such folder; unpack "
            "SegmentationClassAug.zip (masks of the Semantic Boundaries Dataset as PNG files) there, or make it of "
            "SBD's archive with mmsegmentation's tools/dataset_converters/voc_aug.py. --train-split train trains on "
            "VOC's own 1464 images without it."
        )
    if split == "test" and labelled:
        raise FileNotFoundError(
            f"find_pairs: split must have masks, got 'test' of {root}, whose masks are not public; ccgpu evaluate "
            "--split test --unlabelled --save-predictions DIR predicts its images."
        )
    folder = root / _LISTS
    if split == "aug" and not (folder / "aug.txt").is_file() and augmented.is_dir():
        files = files_by_name("label files", augmented, ".png")
        if not files:
            raise FileNotFoundError(
                f"find_pairs: masks NAME.png of the split 'aug' must lie in {augmented}, got none; move them there "
                "from the folder into which they were unpacked."
            )
        names = [*files.keys() - {name for part in ("train", "val") for name in read_list(folder, part)}]
    else:
        names = read_list(folder, split)
    masks = (_AUGMENTED,) if split == "aug" else (_AUGMENTED, _MASKS) if is_augmented else (_MASKS,)
    return find_listed(names, root / "JPEGImages", [root / name for name in masks] if labelled else [], split)


def write_scenes(root: str | Path, splits: Mapping[str, int], size: tuple[int, int], seed: int) -> Path:
    """Write synthetic street scenes of up to `size`, in this layout; see `files.write_synthetic`.

    Objects have borders of 255, one pixel to each side.
    """
    return write_synthetic(root, splits, size, seed, layout="voc", write=_write_image)


def _write_image(root: Path, split: str, index: int, size: tuple[int, int], key: Key) -> None:
    generator = np.random.default_rng((*key, index))
    pixels, ids = draw_scene(varied_size(size, generator), generator, index)
    name = f"synthetic_{split}_{index:06d}"
    Image.fromarray(pixels).save(file_in(root / "JPEGImages", f"{name}.jpg"), quality=95)
    mask = Image.fromarray(void_borders(_LABEL_IDS[ids], 1, VOID))
    mask.putpalette(LABELS.colours.tobytes() + bytes(3 * (VOID - LABELS.num_classes)) + bytes(_VOID_COLOUR))
    mask.save(file_in(root / (_AUGMENTED if split == "aug" else _MASKS), f"{name}.png"))
    with open(file_in(root / _LISTS, f"{split}.txt"), "a") as file:
        file.write(f"{name}\n")


DATASET = Dataset(
    name="voc",
    labels=LABELS,
    layout="VOCdevkit/ or VOC2012/, with JPEGImages/, ImageSets/, SegmentationClass/ and SegmentationClassAug/.",
    find_pairs=find_pairs,
    write_synthetic=write_scenes,
    source="The paper has no experiment on VOC; the recipe is that of mmsegmentation's CCNet.",
    recipe={
        "train_split": ("train", "aug"),
        "scenes_size": (375, 500),
        "iterations": 20000,
        "batch": 16,
        "crop": (512, 512),
        "random_short_sides": (512,),
        "random_scale": (0.5, 2.0),
        "weight_decay": 5e-4,
        "mode": "whole",
        "short_side": 512,
        "eval_every": 2000,
    },
    presets={
        "demo": {
            **DEMO,
            "scenes_size": (128, 192),
            "random_short_sides": (),
            "random_scale": (0.75, 1.5),
            "short_side": None,
        },
        "mmseg-voc": {**MMSEGMENTATION, "random_long_side": 2048, "long_side": 2048},
    },
    scores=("miou", "pixel_accuracy"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see `command.main` for the exit status."""
    return command.main(DATASET, argv)


if __name__ == "__main__":
    sys.exit(main())
