"""What an augmentation draws for a sample, and how two samples of numbers are compared."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Crop(NamedTuple):
    """Where the crop of a sample lies: the resized image's height and width, the corner (top, left), and the flip."""

    size: tuple[int, int]
    corner: tuple[int, int]
    flipped: bool


def distance(one: np.ndarray, other: np.ndarray, within: float = 0.0) -> float:
    """The largest difference between the shares of two samples of numbers that lie below any value.

    This is Kolmogorov's distance where `within` is 0. Else a number may lie that much higher or lower for free, as
    rounding moves it.
    """

    def below(sample: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.searchsorted(np.sort(sample), values, side="right") / len(sample)

    places = np.concatenate([one, other])
    return max(float((below(a, places) - below(b, places + within)).max()) for a, b in ((one, other), (other, one)))
