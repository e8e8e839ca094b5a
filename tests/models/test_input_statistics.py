"""The scale of the images behind a first layer's batch norm, found from the layer alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ccgpu.models.input_statistics import trained_deviation
from tests.models.test_efficientnet import published


def images(deviation: float) -> Tensor:
    """Return smooth random images of a standard deviation, whose channels resemble each other."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(8, 4, 9, 9, generator=generator)
    smooth = F.interpolate(coarse, size=(129, 129), mode="bicubic", align_corners=True)
    mixed = smooth[:, 3:] * 0.95 + smooth[:, :3] * 0.3  # a common part, and one of each channel
    return mixed / mixed.std() * deviation


@pytest.mark.parametrize("size", [3, 7])
@pytest.mark.parametrize("deviation", [1.0, 58.0])
def test_the_deviation_of_the_images_that_a_layer_saw(size: int, deviation: float) -> None:
    weight = torch.randn(32, 3, size, size, generator=torch.Generator().manual_seed(1))
    variance = F.conv2d(images(deviation), weight).var(dim=(0, 2, 3))
    assert trained_deviation(weight, variance) == pytest.approx(deviation, rel=0.3)


@pytest.mark.parametrize("variant", ["lite0", "lite2"])
def test_published_networks_saw_images_divided_by_128(variant: str) -> None:
    state = published(variant).state_dict()
    assert trained_deviation(state["_conv_stem.weight"], state["_bn0.running_var"]) == pytest.approx(58 / 128, rel=0.3)


def test_filters_of_zeros_tell_nothing() -> None:
    weight = torch.zeros(4, 3, 3, 3)
    assert math.isnan(trained_deviation(weight, torch.ones(4)))
    weight[2, 1, 1, 1] = 2.0  # one pixel of one channel: the deviation itself, times 2
    assert trained_deviation(weight, torch.full((4,), 36.0)) == pytest.approx(3.0)
