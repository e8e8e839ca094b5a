"""Train CCNet on Cityscapes: `ccgpu train cityscapes --data PATH`.

The defaults are the paper's recipe (Huang et al., TPAMI 2020, section 4.2); presets train as the authors' code and as
mmsegmentation's configs of CCNet do. Besides the fine splits there are the coarse labels: "train_extra" is 19998
further images, all but one of which are used; "train_coarse" and "val_coarse" are the coarse labels of the fine splits'
images. `--train-split train train_extra` trains on both. Without `--data` the images are synthetic street scenes
(`scenes/streets.py`); `--preset demo` is a small run on them for a CPU. The classes are in `data/cityscapes_labels.py`.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ccgpu.train import command
from ccgpu.train.data.cityscapes_labels import CITYSCAPES, LABELS
from ccgpu.train.data.pairs import Pair, find_by_name
from ccgpu.train.dataset import Dataset
from ccgpu.train.presets import DEMO, MMSEGMENTATION
from ccgpu.train.scenes.canvas import by_id, void_borders
from ccgpu.train.scenes.files import Key, file_in, write_synthetic
from ccgpu.train.scenes.streets import draw_scene

# Ending of image files; the part of the name before it is that of the label file too.
IMAGE_SUFFIX = "_leftImg8bit.png"
# Split with coarse labels -> the folder of its images, below leftImg8bit/, and of its labels, below gtCoarse/.
COARSE = {"train_extra": "train_extra", "train_coarse": "train", "val_coarse": "val"}
DAMAGED = "troisdorf_000000_000073"
"""The image of train_extra that the dataset's page asks to leave out: its file is whole, and black."""

# Id in a synthetic scene -> id in the label files.
LABEL_IDS = by_id({label.name: label.id for label in LABELS}, 0).astype(np.uint8)
_CITY = "synthetic"
_COARSE_GAP = 3  # pixels to each side of a border that synthetic coarse labels leave out


def find_pairs(root: Path, split: str, labelled: bool = True) -> list[Pair]:
    """Return the images of a split, sorted by name.

        root/leftImg8bit/SPLIT/CITY/CITY_SEQUENCE_FRAME_leftImg8bit.png
        root/gtFine/SPLIT/CITY/CITY_SEQUENCE_FRAME_gtFine_labelIds.png

    The splits of `COARSE` have theirs in gtCoarse/, ..._gtCoarse_labelIds.png: "train_extra" of images of its own,
    without `DAMAGED`, whether it was deleted or not; "train_coarse" and "val_coarse" of the images of train and val.
    With labelled=False no label files are looked for. Errors are as in `pairs.find_by_name`.
    """
    folder, kind = _place(split)
    return find_by_name(
        "find_pairs",
        Path(root) / "leftImg8bit" / folder,
        Path(root) / kind / folder if labelled else None,
        (IMAGE_SUFFIX,),
        _label_suffix(kind),
        depth=1,
        left_out=(DAMAGED,) if split == "train_extra" else (),
    )


def _place(split: str) -> tuple[str, str]:
    """Return the folder of a split, and the kind of its labels."""
    return (COARSE[split], "gtCoarse") if split in COARSE else (split, "gtFine")


def _label_suffix(kind: str) -> str:
    return f"_{kind}_labelIds.png"


def write_scenes(root: str | Path, splits: Mapping[str, int], size: tuple[int, int], seed: int) -> Path:
    """Write synthetic street scenes in this layout; see `files.write_synthetic`.

    Licence plates have the id of their vehicle, as in the real files, because no file can contain their id -1. Coarse
    labels leave out what is near a border of two labels; the images of "train_coarse" are those of "train".
    """
    return write_synthetic(root, splits, size, seed, layout="cityscapes", write=_write_image)


def _write_image(root: Path, split: str, index: int, size: tuple[int, int], key: Key) -> None:
    folder, kind = _place(split)
    generator = np.random.default_rng((key[0], zlib.crc32(folder.encode()), index))
    pixels, ids = draw_scene(size, generator, index)
    labels = LABEL_IDS[ids]
    if kind == "gtCoarse":
        labels = void_borders(labels, _COARSE_GAP, 0)
    name = f"{_CITY}_{index:06d}_000019"  # in the real clips too, frame 19 is the labelled one
    for above, values, suffix in (("leftImg8bit", pixels, IMAGE_SUFFIX), (kind, labels, _label_suffix(kind))):
        Image.fromarray(values).save(file_in(root / above / folder / _CITY, f"{name}{suffix}"))


DATASET = Dataset(
    name="cityscapes",
    labels=CITYSCAPES,
    layout="a folder with leftImg8bit/, gtFine/ and, for coarse labels, gtCoarse/: the archives unpacked into one.",
    find_pairs=find_pairs,
    write_synthetic=write_scenes,
    source="The defaults are the paper's recipe.",
    recipe={},
    presets={
        "demo": {**DEMO, "scenes_size": (128, 256), "random_scale": (0.75, 1.5), "mode": "whole"},
        "paper": {},
        # CSDataSet and the README's command; the other settings of their code are the defaults.
        "authors": {"random_scale": (0.7, 2.1), "random_scale_step": 0.1, "normalisation": "authors"},
        # Images of 1024x2048, the config's size, are not resized.
        "mmseg-512x1024": {**MMSEGMENTATION, "iterations": 40000, "crop": (512, 1024), "eval_every": 4000},
        "mmseg-769": {
            **MMSEGMENTATION,
            "align_corners": True,
            "iterations": 40000,
            "random_short_sides": (1025,),
            "random_long_side": 2049,
            "mode": "sliding",
            "short_side": 1025,
            "long_side": 2049,
            "eval_every": 4000,
        },
    },
    scores=("miou", "pixel_accuracy"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see `command.main` for the exit status."""
    return command.main(DATASET, argv)


if __name__ == "__main__":
    sys.exit(main())
