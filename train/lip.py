"""Train CCNet on LIP (Look into Person, single people): `ccgpu train lip --data PATH`.

30462 images for training, 10000 for validation, 20 classes. In the paper (Huang et al., TPAMI 2020), as others quote
it, the category consistent loss is on, and the scores on the validation set are 55.47 % mIoU, 88.01 % pixel accuracy
and 63.91 % mean accuracy. The rest is the recipe of CE2P (Ruan et al., AAAI 2019), on which the paper's numbers
probably build: 473x473, scale 0.75 to 1.25, 150 epochs, learning rate 0.007, weight decay 0.0005. Two things are ours:
28 images per step, and images keep their aspect ratio, whereas CE2P stretches them to the crop's. Without `--data` the
people are synthetic (`scenes/people.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ccgpu.models.labels import Labels
from ccgpu.train import command
from ccgpu.train.data.pairs import Pair, find_by_name
from ccgpu.train.dataset import Dataset
from ccgpu.train.presets import DEMO
from ccgpu.train.scenes.files import Key, file_in, varied_size, write_synthetic
from ccgpu.train.scenes.people import PARTS, draw_people

LABELS = Labels(
    names=(
        *("background", "hat", "hair", "glove", "sunglasses", "upper-clothes", "dress", "coat", "socks", "pants"),
        *("jumpsuits", "scarf", "skirt", "face", "left-arm", "right-arm", "left-leg", "right-leg", "left-shoe"),
        "right-shoe",
    ),
    colours=np.array(
        [
            *([0, 0, 0], [128, 0, 0], [255, 0, 0], [0, 85, 0], [170, 0, 51], [255, 85, 0], [0, 0, 85], [0, 119, 221]),
            *([85, 85, 0], [0, 85, 85], [85, 51, 0], [52, 86, 128], [0, 128, 0], [0, 0, 255], [51, 170, 221]),
            *([0, 255, 255], [85, 255, 170], [170, 255, 85], [255, 255, 0], [255, 170, 0]),
        ],
        dtype=np.uint8,
    ),
    ids=tuple(range(20)),
    void=(255,),
    hint="use the grey label files of train_segmentations/ and val_segmentations/",
)
"""Colours as chosen by the dataset's authors (LIP_JPPNet; also in CE2P's evaluate.py)."""

# Index into `PARTS` -> id in the label files.
_LABEL_IDS = np.array([LABELS.ids[LABELS.names.index(part)] for part in PARTS], dtype=np.uint8)
_GREY = 0.1  # share of the synthetic images without colour; LIP has such images, too


def find_pairs(root: Path, split: str, labelled: bool = True) -> list[Pair]:
    """Return the images of a split, sorted by name.

        root/SPLIT_images/NAME.jpg
        root/SPLIT_segmentations/NAME.png

    Both folders may lie one level down, as in the archives: in TrainVal_images/ and TrainVal_parsing_annotations/.
    Errors are as in `pairs.find_by_name`.
    """
    images = _folder(Path(root), "TrainVal_images", f"{split}_images")
    labels = _folder(Path(root), "TrainVal_parsing_annotations", f"{split}_segmentations") if labelled else None
    return find_by_name("find_pairs", images, labels)


def _folder(root: Path, archive: str, name: str) -> Path:
    return root / archive / name if (root / archive / name).is_dir() else root / name


def write_people(root: str | Path, splits: Mapping[str, int], size: tuple[int, int], seed: int) -> Path:
    """Write synthetic people of up to `size`, in this layout; see `files.write_synthetic`."""
    return write_synthetic(root, splits, size, seed, layout="lip", write=_write_image)


def _write_image(root: Path, split: str, index: int, size: tuple[int, int], key: Key) -> None:
    generator = np.random.default_rng((*key, index))
    pixels, parts = draw_people(varied_size(size, generator), generator)
    image = Image.fromarray(pixels)
    if generator.random() < _GREY:
        image = image.convert("L")
    name = f"synthetic_{index:06d}"
    image.save(file_in(root / f"{split}_images", f"{name}.jpg"), quality=95)
    Image.fromarray(_LABEL_IDS[parts]).save(file_in(root / f"{split}_segmentations", f"{name}.png"))


DATASET = Dataset(
    name="lip",
    labels=LABELS,
    layout="a folder with {train,val}_images/ and {train,val}_segmentations/, directly or in the archives' folders.",
    find_pairs=find_pairs,
    write_synthetic=write_people,
    source="The losses are the paper's; sizes and schedule are CE2P's.",
    recipe={
        "scenes_size": (320, 208),
        "ccl": True,
        "iterations": 163190,  # 150 epochs
        "batch": 28,
        "crop": (473, 473),
        "fit_crop": True,
        "random_scale": (0.75, 1.25),
        "lr": 7e-3,
        "weight_decay": 5e-4,
        "mode": "whole",
        "fit": (473, 473),
        "eval_every": 10880,  # 10 epochs
    },
    presets={"demo": {**DEMO, "scenes_size": (144, 96), "crop": (129, 97), "fit": (129, 97)}, "paper": {}},
    scores=("miou", "pixel_accuracy", "mean_accuracy"),
    flip_pairs=((14, 15), (16, 17), (18, 19)),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see `command.main` for the exit status."""
    return command.main(DATASET, argv)


if __name__ == "__main__":
    sys.exit(main())
