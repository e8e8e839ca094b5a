"""Folders of images and masks that tests draw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tests.train.narrow import NARROW

COLOURS = np.array([[0, 0, 0], [200, 30, 30], [30, 160, 60]], dtype=np.uint8)
SIZE = (40, 56)
TINY = [
    *("--backbone", NARROW, "--head-channels", "8", "--crop", "33", "--batch", "2", "--iterations", "2"),
    *("--context", "none", "--workers", "0", "--device", "cpu", "--no-tensorboard"),
]
"""Flags of the smallest run."""


def scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image of noisy blocks, and the class of each pixel, 0 to 2."""
    generator = np.random.default_rng(seed)
    classes = np.kron(generator.integers(0, 3, (5, 7)), np.ones((8, 8), dtype=int))
    noise = generator.integers(0, 60, (*SIZE, 1))
    return (COLOURS[classes] * 0.7 + noise).astype(np.uint8), classes


def file_in(folder: Path, name: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_folder(
    root: Path,
    number: int = 6,
    *,
    images: str = "images",
    masks: str = "masks",
    suffix: str = ".png",
    values: np.ndarray = COLOURS,
    first: int = 0,
) -> Path:
    """Write images p00.jpg, ... and their masks, in which class k has the pixel values[k]; return the folder."""
    for index in range(first, first + number):
        image, classes = scene(index)
        Image.fromarray(image).save(file_in(root / images, f"p{index:02d}.jpg"), quality=95)
        Image.fromarray(values[classes]).save(file_in(root / masks, f"p{index:02d}{suffix}"))
    return root
