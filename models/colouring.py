"""Label maps as colour images: each class in its colour, alone or blended over an image."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from ccgpu.models.labels import IGNORE, Labels
from ccgpu.models.png_files import strips

# Ignored pixels are black, as in the colour files of Cityscapes, or as the borders in those of Pascal VOC where a class
# is black; of a grey that no class has, where both are colours of classes.
_IGNORE_COLOURS = ((0, 0, 0), (224, 224, 192), *((grey, grey, grey) for grey in range(255, 0, -1)))


def ignore_colour(colours: np.ndarray) -> tuple[int, int, int]:
    """Return the RGB colour of ignored pixels, which none of the classes has: black unless a class is black.

    Args:
        colours: uint8 (K, 3), RGB; K at most 255.
    """
    taken = {*map(tuple, colours.tolist())}
    return next(colour for colour in _IGNORE_COLOURS if colour not in taken)


def colour_mask(classes: torch.Tensor | np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Return a label map or prediction in the dataset's colours.

    Args:
        classes: (H, W) of integers, 0 .. K - 1, or 255 for ignored pixels (`ignore_colour`); on the CPU.
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
    table[IGNORE] = ignore_colour(colours)
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


def blend(image: Image.Image, classes: np.ndarray, colours: np.ndarray, opacity: float) -> None:
    """Blend the colours of the classes into an image of mode RGB, in its own memory; arguments as `class_overlay`'s."""
    for rows, pixels in zip(strips(*classes.shape), pixel_strips(image), strict=True):
        image.paste(Image.fromarray(class_overlay(pixels, classes[rows], colours, opacity)), (0, rows.start))


def pixel_strips(image: Image.Image) -> Iterator[np.ndarray]:
    """Yield an image of mode RGB as uint8 (h, W, 3), strip by strip."""
    for rows in strips(image.height, image.width):
        yield np.asarray(image.crop((0, rows.start, image.width, rows.stop)))


def mask_tables(labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Return what masks with a palette are made of: the value of each class, and the colours of the values.

    The values are the label ids where these are numbers of at most 255, so that masks can be used as label files, else
    the numbers of the classes, 0 .. K - 1.

    Returns:
        values: uint8 (K,), class -> value.
        palette: uint8 (n, 3), value -> RGB; black for values of no class.
    """
    are_ids = labels.coding == "ids" and max(labels.ids) <= 255
    values = np.array(labels.ids if are_ids else range(labels.num_classes), dtype=np.uint8)
    palette = np.zeros((int(values.max()) + 1, 3), dtype=np.uint8)
    palette[values] = labels.colours
    return values, palette
