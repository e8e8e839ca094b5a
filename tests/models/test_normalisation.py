"""Images to a network's input and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ccgpu.models.normalisation import Normalise


def test_normalise_subtracts_the_mean_and_divides_by_the_deviation() -> None:
    image = np.array([[[10, 20, 30], [255, 0, 128]]], dtype=np.uint8)
    result = Normalise((10.0, 10.0, 20.0), (1.0, 2.0, 5.0))(image)
    assert result.dtype == torch.float32
    assert result.is_contiguous()
    assert result.tolist() == [[[0.0, 245.0]], [[5.0, -5.0]], [[2.0, pytest.approx(21.6)]]]


def test_values_are_those_of_the_image() -> None:
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    assert np.array_equal(Normalise().values(Normalise()(image)).round(), image)
    deep = np.linspace(0, 65535, 70).astype(np.uint16).reshape(2, 7, 5)
    normalise = Normalise((3000.0,) * 5, (700.0, 1.0, 2.0, 3.0, 4.0))
    np.testing.assert_allclose(normalise.values(normalise(deep)), deep, rtol=1e-6, atol=1e-2)


def test_normalise_refuses_an_image_of_other_channels() -> None:
    with pytest.raises(ValueError, match="must have 4 channels on its last axis, got shape"):
        Normalise((0.0,) * 4, (1.0,) * 4)(np.zeros((2, 2, 3), np.uint8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"std": (1.0, 0.0, 1.0)}, "std must be positive"),
        ({"mean": (1.0, float("nan"), 1.0)}, "mean must be a finite number for each channel"),
        ({"mean": (1.0, 2.0)}, "std must be a finite number for each channel.*for 2 channels"),
    ],
)
def test_normalise_refuses_bad_arguments(arguments: dict[str, tuple[float, float, float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Normalise(**arguments)
