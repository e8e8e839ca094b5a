"""Windows of a resized and turned image and of its label map, without resizing what lies outside of the window."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ccgpu.models.labels import IGNORE
from ccgpu.models.network_input import resize_pixels


@dataclass(frozen=True)
class Window:
    """Where a crop lies in the resized image. All lengths are in pixels of the resized image.

    The crop is cut out of the resized image, turned about the centre of the part of the crop that the image fills where
    it is not turned. Around the image is nothing: a pixel of the crop whose centre lies outside of the image is empty.

    Attributes:
        scaled: height and width of the resized image.
        crop: height and width of the crop.
        start: top and left of the crop.
        angle: degrees, counter-clockwise.
    """

    scaled: tuple[int, int]
    crop: tuple[int, int]
    start: tuple[int, int] = (0, 0)
    angle: float = 0.0

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the part of the crop that the image fills where it is not turned."""
        return min(self.scaled[0], self.crop[0]), min(self.scaled[1], self.crop[1])


def image_window(
    image: np.ndarray, scaled: tuple[int, int], start: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """Return a window of the image or clip resized to `scaled`, without resizing what lies outside of the window.

    The result is the same as resizing first and cropping second: pixel (y, x) is sampled at (start + (y, x) + 1/2) *
    original / scaled - 1/2, bilinearly, with Pillow's smoothing where the image is shrunk. Each channel is resized by
    itself; RGB of uint8 is rounded to whole values, all other images become float32.

    Args:
        image: (H, W, C) or (T, H, W, C) of uint8, uint16 or float32.
        scaled: height and width after resizing.
        start: top and left of the window in the resized image.
        size: height and width of the window; it must lie inside the resized image.

    Returns:
        (h, w, C) or (T, h, w, C), uint8 or float32.

    Raises:
        ValueError: the window leaves the resized image.
    """
    _check_inside("image_window", scaled, start, size)
    (height, width), (top, left), (rows, columns) = scaled, start, size
    original, channels = image.shape[-3:-1], image.shape[-1]
    step_y, step_x = original[0] / height, original[1] / width
    # Without min, rounding may move the far corner past the border, which Pillow refuses.
    bottom = min((top + rows) * step_y, original[0])
    right = min((left + columns) * step_x, original[1])
    box = (left * step_x, top * step_y, right, bottom)
    windows = [resize_pixels(frame, (rows, columns), box) for frame in image.reshape(-1, *original, channels)]
    return np.stack(windows).reshape(*image.shape[:-3], rows, columns, channels)


def label_window(
    label: np.ndarray, scaled: tuple[int, int], start: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """Return a window of a label map (H, W) or (T, H, W) resized to `scaled`: the pixels nearest to those of an image.

    Arguments and errors are those of `image_window`; the result is (h, w) or (T, h, w).
    """
    _check_inside("label_window", scaled, start, size)
    (height, width), (top, left), (rows, columns) = scaled, start, size
    original = label.shape[-2:]
    # Computed in integers, so that a centre on the border of two pixels does not depend on rounding.
    y = (2 * (top + np.arange(rows)) + 1) * original[0] // (2 * height)
    x = (2 * (left + np.arange(columns)) + 1) * original[1] // (2 * width)
    return label[..., y[:, None], x]


def _check_inside(caller: str, scaled: tuple[int, int], start: tuple[int, int], size: tuple[int, int]) -> None:
    (height, width), (top, left), (rows, columns) = scaled, start, size
    if min(rows, columns) < 1 or min(top, left, height - top - rows, width - left - columns) < 0:
        raise ValueError(f"{caller}: size must lie inside the resized image {scaled}, got {size} at {start}; cut less.")


def crop_image(image: np.ndarray, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Return the crop of an image or clip, and which of its pixels show the image.

    A turned crop is sampled bilinearly from the window of the resized image that holds all of it, so that its corners
    show what lies there; only beyond the borders of the image it is empty.

    Args:
        image: (H, W, C) or (T, H, W, C) of uint8, uint16 or float32.
        window: where the crop lies.

    Returns:
        The crop (h, w, C) or (T, h, w, C), uint8 for RGB of uint8 and else float32, 0 where it is empty; and bool
        (h, w), False where it is empty.

    Raises:
        ValueError: the crop does not begin inside the resized image.
    """
    if not window.angle:
        part = image_window(image, window.scaled, window.start, window.size)
        crop = np.zeros((*image.shape[:-3], *window.crop, image.shape[-1]), part.dtype)
        inside = np.zeros(window.crop, bool)
        rows, columns = window.size
        crop[..., :rows, :columns, :], inside[:rows, :columns] = part, True
        return crop, inside
    y, x = _sources(window)
    inside = _is_inside(window, y, x)
    # Two pixels more at each side: one for the neighbours of bilinear sampling, one for rounding.
    top, left = (max(math.floor(side[inside].min()) - 2, 0) for side in (y, x))
    bottom, right = (
        min(math.ceil(side[inside].max()) + 2, limit) for side, limit in zip((y, x), window.scaled, strict=True)
    )
    size = bottom - top, right - left
    part = image_window(image, window.scaled, (top, left), size)
    grid = np.stack([2 * (x - left) / size[1] - 1, 2 * (y - top) / size[0] - 1], axis=-1).astype(np.float32)
    frames = torch.from_numpy(np.moveaxis(part.reshape(-1, *part.shape[-3:]), -1, 1).astype(np.float32))
    grids = torch.from_numpy(grid).expand(len(frames), *grid.shape)
    values = F.grid_sample(frames, grids, mode="bilinear", padding_mode="border", align_corners=False).numpy()
    crop = np.moveaxis(values, 1, -1).reshape(*image.shape[:-3], *window.crop, image.shape[-1])
    if part.dtype == np.uint8:
        crop = (crop + 0.5).astype(np.uint8)
    return np.where(inside[..., None], crop, np.zeros((), crop.dtype)), inside


def crop_label(label: np.ndarray, window: Window) -> np.ndarray:
    """Return the crop of a label map, nearest pixels, 255 where the crop is empty.

    Args:
        label: uint8 (H, W) or (T, H, W).
        window: where the crop lies.

    Returns:
        uint8 (h, w) or (T, h, w).

    Raises:
        ValueError: the crop does not begin inside the resized image.
    """
    if not window.angle:
        crop = np.full((*label.shape[:-2], *window.crop), IGNORE, np.uint8)
        rows, columns = window.size
        crop[..., :rows, :columns] = label_window(label, window.scaled, window.start, window.size)
        return crop
    y, x = _sources(window)
    rows, columns = (
        (side * (own / new)).clip(0, own - 1).astype(np.int32)
        for side, own, new in zip((y, x), label.shape[-2:], window.scaled, strict=True)
    )
    return np.where(_is_inside(window, y, x), label[..., rows, columns], np.uint8(IGNORE))


def _sources(window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Return y and x (h, w) of the point of the resized image that the centre of each pixel of the crop shows."""
    _check_inside("crop", window.scaled, window.start, window.size)
    middle_y, middle_x = window.size[0] / 2, window.size[1] / 2
    y = (np.arange(window.crop[0]) + 0.5 - middle_y)[:, None]
    x = np.arange(window.crop[1]) + 0.5 - middle_x
    cosine, sine = math.cos(math.radians(window.angle)), math.sin(math.radians(window.angle))
    return (
        window.start[0] + middle_y + (cosine * y + sine * x),
        window.start[1] + middle_x + (cosine * x - sine * y),
    )


def _is_inside(window: Window, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    return (y >= 0) & (y < window.scaled[0]) & (x >= 0) & (x < window.scaled[1])
