"""mmsegmentation's training and evaluation of CCNet in plain NumPy and torch, as its code defines them.

Schedule (mmengine's PolyLR), loss (CrossEntropyLoss with avg_non_ignore off), augmentation (RandomResize, RandomCrop,
RandomFlip, PhotoMetricDistortion, Pad), and the evaluation of whole images and of windows. It is independent of ccgpu.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.train.recipes.drawn import Crop

IGNORED = 255


def learning_rates(steps: int, lr: float = 0.01, least: float = 1e-4, power: float = 0.9) -> list[float]:
    """The learning rate of each step: PolyLR computes each from the one before."""
    rates = [lr]
    total = steps - 1  # PolyLR's total_iters = end - begin - 1
    for step in range(1, steps):
        factor = (1 - 1 / (total - step + 1)) ** power
        rates.append((rates[-1] - least) * factor + least)
    return rates


def loss(logits: Tensor, auxiliary: Tensor, label: Tensor) -> Tensor:
    """Both heads' cross-entropies, each summed over the labelled pixels and divided by the number of all pixels."""
    main, other = (
        F.cross_entropy(scores, label, reduction="none", ignore_index=IGNORED).mean() for scores in (logits, auxiliary)
    )
    return main + 0.4 * other


def resized(size: tuple[int, int], scale: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image resized with its aspect ratio so that it fits into scale = (long, short)."""
    height, width = size
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


def draw(
    label: np.ndarray, scale: tuple[int, int], crop: tuple[int, int], generator: np.random.Generator
) -> tuple[Crop, np.ndarray]:
    """The crop of a sample (RandomResize, RandomCrop with cat_max_ratio 0.75, RandomFlip), and its label map.

    Args:
        label: (H, W) train ids.
        scale: (long, short) side of the images in the config.
        crop: height and width.
        generator: draws the sample.
    """
    ratio = 0.5 + 1.5 * generator.random()
    size = resized((label.shape[0], label.shape[1]), (int(scale[0] * ratio), int(scale[1] * ratio)))
    rows, columns = (
        np.minimum((np.arange(new) * (old / new)).astype(int), old - 1)  # OpenCV's nearest neighbour
        for old, new in zip(label.shape, size, strict=True)
    )
    whole = label[rows[:, None], columns]

    def cut() -> tuple[int, int, np.ndarray]:
        top, left = (int(generator.integers(0, max(s - c, 0) + 1)) for s, c in zip(size, crop, strict=True))
        return top, left, whole[top : top + crop[0], left : left + crop[1]]

    top, left, window = cut()
    for _ in range(10):
        ids, counts = np.unique(window, return_counts=True)
        counts = counts[ids != IGNORED]
        if len(counts) > 1 and counts.max() / counts.sum() < 0.75:
            break
        top, left, window = cut()
    return Crop(size, (top, left), bool(generator.random() < 0.5)), window


def distorted(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """PhotoMetricDistortion of an image (H, W, 3) in 0..255, with hue, saturation and value in floating point."""

    def chance() -> bool:
        return bool(generator.integers(2))

    def clipped(values: np.ndarray) -> np.ndarray:
        return np.floor(np.clip(values, 0, 255))

    def contrast(pixels: np.ndarray) -> np.ndarray:
        return clipped(pixels * generator.uniform(0.5, 1.5)) if chance() else pixels

    pixels = image.astype(np.float64)
    if chance():
        pixels = clipped(pixels + generator.uniform(-32, 32))
    first = chance()
    if first:
        pixels = contrast(pixels)
    if chance():
        hue, saturation, value = hsv(pixels)
        pixels = rgb(hue, np.clip(saturation * generator.uniform(0.5, 1.5), 0, 1), value)
    if chance():
        hue, saturation, value = hsv(pixels)
        pixels = rgb((hue + 2 * generator.integers(-18, 18)) % 360, saturation, value)  # OpenCV's unit is 2 degrees
    return pixels if first else contrast(pixels)


def hsv(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue in degrees, saturation in 0..1, value in 0..255 of RGB (..., 3) in 0..255."""
    red, green, blue = np.moveaxis(pixels, -1, 0)
    value, chroma = pixels.max(-1), np.ptp(pixels, axis=-1)
    safe = np.where(chroma > 0, chroma, 1)
    hue = np.select(
        [chroma == 0, value == red, value == green],
        [0 * value, (green - blue) / safe % 6, (blue - red) / safe + 2],
        (red - green) / safe + 4,
    )
    return 60 * hue, chroma / np.where(value > 0, value, 1), value


def rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """RGB (..., 3) in 0..255 of hue in degrees, saturation in 0..1 and value in 0..255."""
    place = (np.array([5, 3, 1]) + hue[..., None] / 60) % 6
    return value[..., None] * (1 - saturation[..., None] * np.clip(np.minimum(place, 4 - place), 0, 1))


def windows(
    net: Callable[[Tensor], Tensor], images: Tensor, window: tuple[int, int], stride: tuple[int, int]
) -> Tensor:
    """slide_inference: the mean over the windows that contain a pixel of their logits, at the size of the images."""
    height, width = images.shape[2:]
    rows, columns = (
        max(extent - side + step - 1, 0) // step + 1
        for extent, side, step in zip((height, width), window, stride, strict=True)
    )
    total: Tensor | float = 0.0
    count = torch.zeros(height, width, dtype=images.dtype)
    for row in range(rows):
        for column in range(columns):
            bottom, right = min(row * stride[0] + window[0], height), min(column * stride[1] + window[1], width)
            top, left = max(bottom - window[0], 0), max(right - window[1], 0)
            logits = net(images[:, :, top:bottom, left:right])
            total = total + F.pad(logits, (left, width - right, top, height - bottom))
            count[top:bottom, left:right] += 1
    assert isinstance(total, Tensor)
    return total / count
