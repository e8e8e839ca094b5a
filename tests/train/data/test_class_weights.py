"""Median frequency balancing: counted by hand, and against a plain count over label maps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccgpu.models.labels import Labels
from ccgpu.train.data.census import Census
from ccgpu.train.data.class_weights import median_frequency
from ccgpu.train.data.facts import Facts
from ccgpu.train.data.masks import Counts


def labels_of(ids: tuple[int, ...]) -> Labels:
    return Labels(tuple(f"c{i}" for i in ids), np.zeros((len(ids), 3), dtype=np.uint8), ids, void=(0,))


def census(*files: dict[int, int]) -> Census:
    """Return the census of files that hold these numbers of pixels of these values."""
    return Census.of("training", [Facts(mask=Counts("grey8", file, len(file))) for file in files], "ids")


def test_weights_by_hand() -> None:
    # Class 1: 60 of 200 pixels of two files, class 2: 20 of 100, class 3: 10 of 100; 0 is void, 9 does not occur.
    found = census({1: 40, 2: 20, 0: 40}, {1: 20, 3: 10, 0: 70}, {0: 50})
    weights, absent = median_frequency(found, labels_of((1, 2, 3, 9)))
    assert weights == pytest.approx((0.2 / 0.3, 1.0, 2.0, 1.0))
    assert absent == ["c9"]
    # Of two classes the median lies between their frequencies.
    weights, absent = median_frequency(census({1: 30, 2: 10}), labels_of((2, 1)))
    assert weights == pytest.approx((0.5 / 0.25, 0.5 / 0.75))
    assert absent == []
    assert median_frequency(census({1: 30, 0: 10}), labels_of((1,)))[0] == (1.0,)


def test_labels_without_a_class_are_refused() -> None:
    with pytest.raises(ValueError, match="median_frequency: label files must hold pixels of the classes, got none"):
        median_frequency(census({0: 5}), labels_of((1, 2)))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), files=st.integers(1, 5), classes=st.integers(2, 6))
def test_weights_equal_those_of_a_plain_count(seed: int, files: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    maps = [rng.choice(rng.integers(0, classes + 1, 3), rng.integers(1, 9, 2)) for _ in range(files)]
    labels = labels_of(tuple(range(1, classes + 1)))
    frequency = {}
    for c in labels.ids:
        images = [image for image in maps if (image == c).any()]
        if images:
            frequency[c] = sum((image == c).sum() for image in images) / sum(image.size for image in images)
    if not frequency:
        return
    counted = [dict(zip(*map(np.ndarray.tolist, np.unique(image, return_counts=True)), strict=True)) for image in maps]
    weights, absent = median_frequency(census(*counted), labels)
    expected = [float(np.median([*frequency.values()]) / frequency.get(c, np.inf)) or 1.0 for c in labels.ids]
    assert weights == pytest.approx(expected, rel=1e-12)
    assert absent == [f"c{c}" for c in labels.ids if c not in frequency]
