"""Writing a synthetic dataset: a folder of images and label files, determined by a few numbers and written atomically.

`streets.py` and `people.py` draw the images; the commands (`train/cityscapes.py` and so on) write them in their
layouts.
"""

import contextlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import filelock
import numpy as np

SETTINGS_FILE = "synthetic.json"

_VERSION = 2  # of the drawing code; increase it when the same seed gives other images
_LOCK = "lock"  # held while a partial folder is written
_SMALLEST = 32  # pixels per side; in smaller images a person ahead is less than a pixel wide

Key = tuple[int, int]
"""Seed and a number for the split; together with the image's index they determine the image."""

Write = Callable[[Path, str, int, tuple[int, int], Key], None]
"""(root, split, index, (height, width), key) -> None: write image `index` of the split and its label file."""


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

    The folder is written atomically: under another name beside `root`, and renamed at the end. A `root` that already
    contains the images of the same settings is left unchanged. What a killed process left beside `root` is removed.

    Args:
        root: the folder to write; it does not exist, is empty or holds the same images.
        splits: number of images of each split, at least 1.
        size: height and width in pixels, each 32 or more.
        seed: 0 or more; another seed gives other images.
        layout: name of the dataset whose layout is written.
        write: draws and writes one image; see `Write`.

    Returns:
        `root` as a Path.

    Raises:
        ValueError: an argument is out of its range, or `root` contains something else.
        OSError: the folder cannot be written; nothing of it remains.
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
    _remove_leftovers(root)
    if _holds(root, settings):
        return root
    unfinished = root.with_name(f".{root.name}.{os.getpid()}.partial")
    lock = filelock.FileLock(file_in(unfinished, _LOCK))
    try:
        lock.acquire()
        for split, number in splits.items():
            for index in range(number):
                write(unfinished, split, index, size, (seed, zlib.crc32(split.encode())))
        (unfinished / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")
        lock.release()
        (unfinished / _LOCK).unlink(missing_ok=True)
        try:
            unfinished.rename(root)
        except OSError:
            if not _holds(root, settings):  # another process may have written the same images meanwhile
                raise
    finally:
        lock.release()
        shutil.rmtree(unfinished, ignore_errors=True)
    return root


def _remove_leftovers(root: Path) -> None:
    """Remove the partial folders of processes that were killed: their locks are free, those of live ones are not."""
    pattern = re.compile(rf"\.{re.escape(root.name)}\.[0-9]+\.partial")
    for folder in [*root.parent.iterdir()] if root.parent.is_dir() else []:
        if pattern.fullmatch(folder.name) and (folder / _LOCK).exists():
            lock = filelock.FileLock(folder / _LOCK, timeout=0)
            with contextlib.suppress(filelock.Timeout, OSError), lock:
                shutil.rmtree(folder, ignore_errors=True)


def _holds(root: Path, settings: dict[str, Any]) -> bool:
    """Return whether `root` has these images; False if it does not exist or is empty, ValueError for other content."""
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
    """Return the path `folder/name`, after creating the folder if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def varied_size(size: tuple[int, int], generator: np.random.Generator) -> tuple[int, int]:
    """Return random height and width, 0.8 to 1 times `size`, because images from the internet differ in size."""
    height, width = (max(_SMALLEST, round(side * generator.uniform(0.8, 1.0))) for side in size)
    return height, width
