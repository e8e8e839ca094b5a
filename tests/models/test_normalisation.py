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


def test_denormalise_inverts_normalise_for_every_value() -> None:
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    assert np.array_equal(Normalise().denormalise(Normalise()(image)), image)
    assert Normalise().denormalise(torch.full((3, 1, 1), 99.0)).tolist() == [[[255, 255, 255]]]
    assert Normalise().denormalise(torch.full((3, 1, 1), -99.0)).tolist() == [[[0, 0, 0]]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"std": (1.0, 0.0, 1.0)}, "std must be positive"),
        ({"mean": (1.0, float("nan"), 1.0)}, "mean must be a finite number for each channel"),
    ],
)
def test_normalise_refuses_bad_arguments(arguments: dict[str, tuple[float, float, float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Normalise(**arguments)
