"""Which crops are taken: those in which several classes occur and none holds almost all."""

from __future__ import annotations

import numpy as np

from ccgpu.models.labels import IGNORE

TRIES = 10
"""Crops that are looked at; the one after them is taken as it is, as in mmsegmentation."""


def is_mixed(label: np.ndarray, most: float) -> bool:
    """Return whether more than one class occurs in a crop, and each in less than a share of its labelled pixels.

    Args:
        label: uint8 of any shape, train ids; pixels of 255 do not count.
        most: the share, 0 to 1, that no class may reach.

    Source: RandomCrop of mmsegmentation with cat_max_ratio.
    """
    counts = np.bincount(label.ravel(), minlength=IGNORE)[:IGNORE]
    return bool(np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < most)
