import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ccgpu.train.loss.inputs import label_at


@settings(max_examples=50, deadline=None)
@given(extents=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 14)), min_size=1, max_size=3))
def test_label_at_takes_the_nearest_pixel_with_corners_aligned(extents: list[tuple[int, int]]) -> None:
    shape, size = zip(*extents, strict=True)
    label = torch.arange(2 * math.prod(shape)).reshape(2, *shape)
    got = label_at(label, size)
    assert got.shape == (2, *size)
    for position in np.ndindex(*size):
        at = [
            math.floor(i * (n - 1) / (m - 1) + 0.5) if m > 1 else 0
            for i, n, m in zip(position, shape, size, strict=True)
        ]
        assert torch.equal(got[(slice(None), *position)], label[(slice(None), *at)])
    assert torch.equal(label_at(label, shape), label)


@pytest.mark.parametrize("size", [(3,), (2, 3, 4), (0, 3)])
def test_label_at_refuses_other_axes(size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"label_at: size must be an extent .* for \(1, 4, 5\)"):
        label_at(torch.zeros(1, 4, 5).long(), size)


def test_label_at_features_of_an_image() -> None:
    label = torch.arange(769).expand(1, 769, 769)
    assert label_at(label, (97, 97))[0, 0].tolist() == list(range(0, 769, 8))
