"""Train CCNet on discs whose class stands elsewhere in the image: `ccgpu train far_context --preset demo`.

A synthetic dataset which shows what a context module is for, and nothing else can: the class of a disc is the colour of
a square far away (`scenes/discs.py`). With `--markers N` an image has N squares and each disc must find the one of its
own colour; with `--clip N` the square lies in another frame than the discs. The backbone, `models/local.py`, sees 15
pixels of 128 (a ResNet-18 would see all of them), and the head's three 3x3 convolutions make it 63: without a context
module the network must guess wherever the square is farther away.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ccgpu.models.labels import Labels
from ccgpu.train import command
from ccgpu.train.data.pairs import Pair, find_by_name
from ccgpu.train.dataset import Dataset
from ccgpu.train.scenes.discs import CLASSES, MARKERS, draw_scene
from ccgpu.train.scenes.files import Key, file_in, write_synthetic

LABELS = Labels(
    names=("background", *(name for name, _ in CLASSES)),
    colours=np.array([(0, 0, 0), *(colour for _, colour in CLASSES)], dtype=np.uint8),
    ids=tuple(range(len(CLASSES) + 1)),
    hint="use the label files that this command writes",
)


def find_pairs(root: Path, split: str, labelled: bool = True) -> list[Pair]:
    """Return the images of a split, sorted by name.

        root/images/SPLIT/NAME.jpg
        root/labels/SPLIT/NAME.png

    Errors are as in `pairs.find_by_name`.
    """
    return find_by_name("find_pairs", root / "images" / split, root / "labels" / split if labelled else None)


def frame_of(name: str) -> tuple[str, int]:
    """Return the video of an image and the number of its frame: scene000012_f1 is frame 1 of scene000012.

    Raises:
        ValueError: the name is another.
    """
    found = re.fullmatch(r"(scene[0-9]+)_f([0-9]+)", name)
    if found is None:
        raise ValueError(f"frame_of: name must be sceneNUMBER_fNUMBER, got {name!r}; take files of this command.")
    return found[1], int(found[2])


def write_scenes(
    root: str | Path,
    splits: Mapping[str, int],
    size: tuple[int, int],
    seed: int,
    *,
    markers: int = 1,
    frames: int = 1,
) -> Path:
    """Write discs and squares in this layout; see `files.write_synthetic` and `discs.draw_scene`.

    The number of images of a split is rounded up to whole videos of `frames`.
    """
    whole = {split: -(-number // frames) * frames for split, number in splits.items()}
    layout = f"far_context of {markers} markers, videos of {frames} frames"
    write = functools.partial(_write_image, markers, frames)
    return write_synthetic(root, whole, size, seed, layout=layout, write=write)


def _write_image(
    markers: int, frames: int, root: Path, split: str, index: int, size: tuple[int, int], key: Key
) -> None:
    number, frame = divmod(index, frames)
    scene = draw_scene(size, np.random.default_rng((*key, number)), markers=markers, frames=frames)
    name = f"scene{number:06d}_f{frame}"
    Image.fromarray(scene.pixels[frame]).save(file_in(root / "images" / split, f"{name}.jpg"), quality=93)
    Image.fromarray(scene.labels[frame]).save(file_in(root / "labels" / split, f"{name}.png"))


def for_settings(settings: Any) -> Dataset:
    """Return the dataset whose synthetic images have the markers and the frames of a run's settings.

    Its recipe has a gamma only for a context module that has one.
    """
    write = functools.partial(write_scenes, markers=settings.markers, frames=settings.clip)
    with_gamma = settings.context in ("rcca", "nonlocal")
    recipe = {name: value for name, value in DATASET.recipe.items() if name != "gamma" or with_gamma}
    return dataclasses.replace(DATASET, write_synthetic=write, recipe=recipe)


DATASET = Dataset(
    name="far_context",
    labels=LABELS,
    layout="a folder with images/ and labels/, each with train/ and val/, as this command writes it.",
    find_pairs=find_pairs,
    write_synthetic=write_scenes,
    source="The dataset and its recipe are ours.",
    recipe={
        "scenes": (1600, 200),
        "scenes_size": (128, 128),
        "backbone": "local",
        "head_channels": 64,
        "gamma": 1.0,
        "dropout": 0.0,
        "auxiliary_weight": 0.0,
        "iterations": 800,
        "batch": 8,
        "crop": (128, 128),
        "random_scale": (1.0, 1.0),
        "optimiser": "adamw",
        "lr": 5e-3,
        "channels_last": True,
        "mode": "whole",
        "eval_every": 0,
        "save_every": 200,
        "log_every": 20,
        "workers": 0,
    },
    presets={"demo": {"iterations": 2000, "baselines": True}},
    scores=("mean_accuracy", "miou", "pixel_accuracy"),
    frame_of=frame_of,
    markers=len(MARKERS),
    for_settings=for_settings,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see `command.main` for the exit status."""
    return command.main(DATASET, argv)


if __name__ == "__main__":
    sys.exit(main())
