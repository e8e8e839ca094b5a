"""Weights of the classes from their pixels: rare classes weigh more in the loss."""

from __future__ import annotations

import numpy as np

from ccgpu.models.labels import Labels
from ccgpu.train.data.census import Census

MEDIAN_FREQUENCY = "median-frequency"


def median_frequency(census: Census, labels: Labels) -> tuple[tuple[float, ...], list[str]]:
    """Return a weight for each class by median frequency balancing, and the names of the classes that do not occur.

        weight_c = median over the classes that occur of f / f_c
        f_c      = pixels of class c / pixels of all images in which c occurs, those of other classes and void included

    A class of the median frequency has weight 1, one that is half as frequent 2. A class that does not occur has
    weight 1: its frequency is not known, and no training pixel is weighed by it.

    Args:
        census: of the label files for training; a pixel of one class at least.
        labels: the classes.

    Raises:
        ValueError: no class occurs.

    Source: Eigen and Fergus, "Predicting Depth, Surface Normals and Semantic Labels with a Common Multi-Scale
    Convolutional Architecture", 2015, section 6.3.2.
    """
    pixels = census.by_class(labels)
    present = pixels > 0
    if not present.any():
        raise ValueError(
            "median_frequency: label files must hold pixels of the classes, got none; check that they are the masks."
        )
    around = np.array([census.around.get(value, 0) for value in labels.ids])
    frequency = pixels[present] / around[present]
    weights = np.ones(len(pixels))
    weights[present] = np.median(frequency) / frequency
    return tuple(weights.tolist()), [name for name, there in zip(labels.names, present, strict=True) if not there]
