"""Synthetic datasets: a folder of images and labels that is a function of a few numbers, written atomically.

What is drawn: street scenes (`scenes.py`), people (`scene_people.py`).
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

SETTINGS_FILE = "synthetic.json"

_VERSION = 1  # of all drawing: another one draws other images from the same seed
_SMALLEST = 32  # pixels a side; below it a person ahead is not a pixel wide

Key = tuple[int, int]
"""Seed and number of a split, which together with an image's number decide the image."""

Write = Callable[[Path, str, int, tuple[int, int], Key], None]
"""(root, split, index, (height, width), key) -> image `index` of the split and its label, in their folders."""


def write_synthetic(
    root: str | Path,
    splits: Mapping[str, int],
    size: tuple[int, int],
    seed: int,
    *,
    layout: str,
    write: Write,
) -> Path:
    """Write a synthetic dataset.

    The folder appears atomically: it is written under another name beside `root` and renamed at
    the end. A `root` that already holds what the same settings draw is left as it is.

    Args:
        root: the folder to write, absent, empty or with the same images.
        splits: number of images of each split, at least 1.
        size: height and width in pixels, each 32 or more.
        seed: 0 or more; another seed gives other images.
        layout: name of the dataset whose folders and labels these are.
        write: draws and writes one image; see `Write`.

    Returns:
        `root` as a Path.

    Raises:
        ValueError: an argument out of its range, or a `root` that holds something else.
        OSError: the folder cannot be written; nothing is left of it.
    """
    root, splits = Path(root), {split: int(number) for split, number in splits.items()}
    if not splits or not all(name.isidentifier() for name in splits) or min(splits.values()) < 1:
        raise ValueError(
            f"write_synthetic: splits must name at least one split with 1 or more images, got {splits}; "
            'give for example {"train": 200, "val": 40}.'
        )
    if len(size) != 2 or min(size) < _SMALLEST:
        raise ValueError(
            f"write_synthetic: size must be (height, width) of {_SMALLEST} or more, got {size}; draw larger images."
        )
    if seed < 0:
        raise ValueError(f"write_synthetic: seed must be 0 or more, got {seed}; choose another.")
    settings = {
        "layout": layout,
        "version": _VERSION,
        "splits": splits,
        "size": [int(side) for side in size],
        "seed": int(seed),
    }
    if _holds(root, settings):
        return root
    unfinished = root.with_name(f".{root.name}.{os.getpid()}.partial")
    try:
        for split, number in splits.items():
            for index in range(number):
                write(unfinished, split, index, size, (seed, zlib.crc32(split.encode())))
        (unfinished / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")
        try:
            unfinished.rename(root)
        except OSError:
            if not _holds(root, settings):  # another process may have written the same meanwhile
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return root


def _holds(root: Path, settings: dict[str, Any]) -> bool:
    """Whether `root` has these images; False where it is absent or empty, ValueError for anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / SETTINGS_FILE).read_text())
    except (OSError, ValueError):
        found = "no synthetic images"
    if found != settings:
        raise ValueError(
            f"write_synthetic: root must be empty or hold the images {settings}, got {found} in {root}; "
            "give another folder or remove this one."
        )
    return True


def file_in(folder: Path, name: str) -> Path:
    """`folder/name`, in a folder that is there from now on."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def varied(size: tuple[int, int], generator: np.random.Generator) -> tuple[int, int]:
    """Height and width between 0.8 and 1 of `size`: photographs from the internet differ in size."""
    height, width = (max(_SMALLEST, round(side * generator.uniform(0.8, 1.0))) for side in size)
    return height, width
