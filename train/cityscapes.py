"""Train CCNet on Cityscapes: `ccgpu train cityscapes --data PATH`.

The defaults are the paper's recipe (Huang et al., TPAMI 2020, section 4.2). Without `--data` the images are synthetic
street scenes (`scenes/streets.py`); `--preset demo` is a small run on them for a CPU. The classes are in
`data/cityscapes_labels.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ccgpu.train import command
from ccgpu.train.data.cityscapes_labels import CITYSCAPES, LABELS
from ccgpu.train.data.pairs import Pair, find_by_name
from ccgpu.train.dataset import DEMO, Dataset
from ccgpu.train.scenes.canvas import by_id
from ccgpu.train.scenes.files import Key, file_in, write_synthetic
from ccgpu.train.scenes.streets import draw_scene

# Endings of image and label files; the part of the name before them is the same for both.
IMAGE_SUFFIX = "_leftImg8bit.png"
LABEL_SUFFIX = "_gtFine_labelIds.png"

# Id in a synthetic scene -> id in the label files.
LABEL_IDS = by_id({label.name: label.id for label in LABELS}, 0).astype(np.uint8)
_CITY = "synthetic"


def find_pairs(root: Path, split: str, labelled: bool = True) -> list[Pair]:
    """Return the images of a split, sorted by name.

        root/leftImg8bit/SPLIT/CITY/CITY_SEQUENCE_FRAME_leftImg8bit.png
        root/gtFine/SPLIT/CITY/CITY_SEQUENCE_FRAME_gtFine_labelIds.png

    With labelled=False no label files are looked for. Errors are as in `pairs.find_by_name`.
    """
    labels = root / "gtFine" / split if labelled else None
    images = root / "leftImg8bit" / split
    return find_by_name("find_pairs", images, labels, (IMAGE_SUFFIX,), LABEL_SUFFIX, depth=1)


def write_scenes(root: str | Path, splits: Mapping[str, int], size: tuple[int, int], seed: int) -> Path:
    """Write synthetic street scenes in this layout; see `files.write_synthetic`.

    Licence plates have the id of their vehicle, as in the real files, because no file can contain their id -1.
    """
    return write_synthetic(root, splits, size, seed, layout="cityscapes", write=_write_image)


def _write_image(root: Path, split: str, index: int, size: tuple[int, int], key: Key) -> None:
    pixels, ids = draw_scene(size, np.random.default_rng((*key, index)), index)
    name = f"{_CITY}_{index:06d}_000019"  # in the real clips too, frame 19 is the labelled one
    for folder, values, suffix in (("leftImg8bit", pixels, IMAGE_SUFFIX), ("gtFine", LABEL_IDS[ids], LABEL_SUFFIX)):
        Image.fromarray(values).save(file_in(root / folder / split / _CITY, f"{name}{suffix}"))


DATASET = Dataset(
    name="cityscapes",
    labels=CITYSCAPES,
    layout="a folder with leftImg8bit/ and gtFine/, the two archives unpacked into one.",
    find_pairs=find_pairs,
    write_synthetic=write_scenes,
    source="The defaults are the paper's recipe.",
    recipe={},
    presets={"demo": {**DEMO, "scenes_size": (128, 256), "random_scale": (0.75, 1.5), "mode": "whole"}},
    scores=("miou", "pixel_accuracy"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see `command.main` for the exit status."""
    return command.main(DATASET, argv)


if __name__ == "__main__":
    sys.exit(main())
