"""Train CCNet on Cityscapes: `python -m train.cityscapes --data PATH`.

The defaults are the paper's recipe (Huang et al., TPAMI 2020, section 4.2). Without `--data` the images are synthetic
street scenes (`scenes.py`); `--preset demo` is a small run on them for a CPU. The classes are in
`cityscapes_labels.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ccgpu.train import command
from ccgpu.train.data.cityscapes_labels import CITYSCAPES, IMAGE_SUFFIX, LABEL_SUFFIX
from ccgpu.train.data.pairs import Pair, find_by_name
from ccgpu.train.dataset import Dataset
from ccgpu.train.scenes.streets import draw_cityscapes


def find_pairs(root: Path, split: str, labelled: bool = True) -> list[Pair]:
    """Return the images of a split, sorted by name.

        root/leftImg8bit/SPLIT/CITY/CITY_SEQUENCE_FRAME_leftImg8bit.png
        root/gtFine/SPLIT/CITY/CITY_SEQUENCE_FRAME_gtFine_labelIds.png

    See `pairs.find_by_name` for what it raises; with labelled=False no label files are looked for.
    """
    labels = root / "gtFine" / split if labelled else None
    images = root / "leftImg8bit" / split
    return find_by_name("find_pairs", images, labels, (IMAGE_SUFFIX,), LABEL_SUFFIX, depth=1)


DATASET = Dataset(
    name="cityscapes",
    labels=CITYSCAPES,
    layout="a folder with leftImg8bit/ and gtFine/, the two archives unpacked into one.",
    find_pairs=find_pairs,
    draw=draw_cityscapes,
    source="The defaults are the paper's recipe.",
    recipe={},
    # About 4 minutes on two CPU cores (AVX-512).
    demo={
        "scenes": (160, 24),
        "scenes_size": (128, 256),
        "backbone": "resnet18",
        "head_channels": 64,
        "iterations": 360,
        "batch": 4,
        "crop": (97, 129),
        "scale": (0.75, 1.5),
        "lr": 0.04,
        "channels_last": True,
        "eval": "whole",
        "baselines": True,
        "eval_every": 0,
        "save_every": 120,
        "log_every": 10,
        "workers": 0,
    },
    scores=("miou", "pixel_accuracy"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see `command.main` for the exit status."""
    return command.main(DATASET, argv)


if __name__ == "__main__":
    sys.exit(main())
