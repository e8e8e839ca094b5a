"""Label maps as colour images: each class in its colour, alone or blended over an image."""

from __future__ import annotations

import numpy as np
import torch

from ccgpu.models.labels import IGNORE

# Ignored pixels are black, as in the colour files of Cityscapes.
_IGNORE_COLOUR = (0, 0, 0)


def colour_mask(classes: torch.Tensor | np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Return a label map or prediction in the dataset's colours.

    Args:
        classes: (H, W) of integers, 0 .. K - 1, or 255 for ignored pixels (shown black); on the CPU.
        colours: uint8 (K, 3), RGB; K at most 255.

    Returns:
        uint8 (H, W, 3), RGB.

    Raises:
        ValueError: classes is not (H, W), or has other values.
    """
    values = np.asarray(classes)
    known = (values == IGNORE) | ((values >= 0) & (values < len(colours)))
    if values.ndim != 2 or not known.all():
        raise ValueError(
            f"colour_mask: classes must be (H, W) with values 0..{len(colours) - 1} or {IGNORE}, got "
            f"shape {values.shape} with values up to {values.max() if values.size else '-'}; map label ids "
            "to train ids."
        )
    table = np.zeros((IGNORE + 1, 3), dtype=np.uint8)
    table[: len(colours)] = colours
    table[IGNORE] = _IGNORE_COLOUR
    return table[values.astype(np.int64)]


def class_overlay(
    image: np.ndarray, classes: torch.Tensor | np.ndarray, colours: np.ndarray, opacity: float
) -> np.ndarray:
    """Return an image blended with the colours of its classes: opacity 0 is the image, 1 the colours alone.

    Args:
        image: uint8 (H, W, 3), RGB.
        classes, colours: as for `colour_mask`.
        opacity: 0 to 1.

    Returns:
        uint8 (H, W, 3), RGB.

    Raises:
        ValueError: the sizes differ, or classes has other values.
    """
    mask = colour_mask(classes, colours)
    if mask.shape != image.shape:
        raise ValueError(
            f"class_overlay: classes must have the image's size {image.shape[:2]}, got {mask.shape[:2]}; predict at "
            "full size."
        )
    blended = image.astype(np.float32) * (1 - opacity) + mask.astype(np.float32) * opacity
    return np.rint(blended).astype(np.uint8)
