"""The values of an image's channels as they are stored, in sums from which mean and std of many images follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

_STRIP = 1 << 22  # values that are summed at once, which bounds memory


@dataclass(frozen=True)
class Values:
    """What the channels of an image hold; channels are those of `models.stored_values.read_stored`.

    Attributes:
        dtype: "uint8", "uint16" or "float32".
        sums: sum of each channel's values, of finite ones alone.
        squares: sum of their squares.
        lowest, highest: the lowest and highest of them; 0 where none is finite.
        counts: number of finite values of each channel; the number of pixels unless the image has NaN or infinity.
        broken: number of values that are NaN or infinite.
    """

    dtype: str
    sums: tuple[float, ...]
    squares: tuple[float, ...]
    lowest: tuple[float, ...]
    highest: tuple[float, ...]
    counts: tuple[int, ...]
    broken: int = 0

    @property
    def channels(self) -> int:
        """The number of channels."""
        return len(self.sums)

    @classmethod
    def of(cls, pixels: np.ndarray) -> Values:
        """Return the values of an image (H, W, C) of uint8, uint16 or float32."""
        found = [_summed(pixels[..., channel]) for channel in range(pixels.shape[-1])]
        sums, squares, lowest, highest, counts = zip(*found, strict=True)
        return cls(pixels.dtype.name, sums, squares, lowest, highest, counts, pixels.size - sum(counts))

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Values:
        """Return the values with these attributes, in lists.

        Raises:
            TypeError, ValueError: they are none.
        """
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, (list, tuple))}
        return cls(**{**values, **lists})


def mean_and_std(images: Iterable[Values]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std of each channel over all pixels of images of the same channels.

        mean = sum(x) / n,    std = sqrt(sum(x^2) / n - mean^2)

    A channel of one value alone has the std 1, so that it becomes 0 when it is normalised.
    """
    found = [*images]
    sums, squares, counts = (
        np.sum([getattr(values, name) for values in found], axis=0, dtype=np.float64)
        for name in ("sums", "squares", "counts")
    )
    counts = np.maximum(counts, 1)
    mean = sums / counts
    variance = squares / counts - mean**2
    # Rounding leaves some 1e-16 of the squares where all values are equal.
    constant = variance <= 1e-12 * np.maximum(squares / counts, 1e-300)
    std = np.where(constant, 1.0, np.sqrt(np.where(constant, 1.0, variance)))
    return tuple(map(float, mean)), tuple(map(float, std))


def _summed(values: np.ndarray) -> tuple[float, float, float, float, int]:
    """Return sum, sum of squares, lowest and highest of the finite values of a channel (H, W), and their number."""
    rows = max(1, _STRIP // max(values.shape[1], 1))
    strips = (values[top : top + rows] for top in range(0, len(values), rows))
    if values.dtype.kind == "u":  # by counts of each value, which is exact
        histogram = np.zeros(np.iinfo(values.dtype).max + 1, np.int64)
        for strip in strips:
            if values.dtype == np.uint8:  # Pillow takes a thirtieth of the time of bincount
                histogram += np.array(Image.fromarray(np.ascontiguousarray(strip)).histogram())
            else:
                histogram += np.bincount(strip.ravel(), minlength=len(histogram))
        present = np.flatnonzero(histogram)
        each = histogram[present]
        numbers = float(each @ present), float(each @ present**2)
        return *numbers, float(present[0]), float(present[-1]), int(each.sum())
    total, squares, count, lowest, highest = 0.0, 0.0, 0, np.inf, -np.inf
    for strip in strips:
        wide = strip[np.isfinite(strip)].astype(np.float64)
        if wide.size:
            total, squares, count = total + float(wide.sum()), squares + float(wide @ wide), count + wide.size
            lowest, highest = min(lowest, float(wide.min())), max(highest, float(wide.max()))
    return (total, squares, lowest, highest, count) if count else (0.0, 0.0, 0.0, 0.0, 0)
