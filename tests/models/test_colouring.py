"""Label maps as colour images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ccgpu.models.colouring import colour_mask

COLOURS = np.array([[128, 64, 128], [70, 130, 180], [220, 20, 60], [119, 11, 32]], dtype=np.uint8)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_colour_mask_has_the_colours_given_and_black_for_ignored(dtype: torch.dtype) -> None:
    mask = colour_mask(torch.tensor([[0, 1, 255], [2, 3, 0]], dtype=dtype), COLOURS)
    assert mask.tolist() == [
        [[128, 64, 128], [70, 130, 180], [0, 0, 0]],
        [[220, 20, 60], [119, 11, 32], [128, 64, 128]],
    ]
    assert mask.dtype == np.uint8


@pytest.mark.parametrize("number", [1, 150, 255])
def test_colour_mask_takes_up_to_255_classes(number: int) -> None:
    colours = np.random.default_rng(0).integers(1, 256, (number, 3), dtype=np.uint8)
    classes = np.array([[*range(number), 255]])
    assert np.array_equal(colour_mask(classes, colours), [[*colours, (0, 0, 0)]])


@pytest.mark.parametrize("bad", [[[4]], [[-1]], [[254]], [0, 1]])
def test_colour_mask_refuses_what_is_no_class(bad: list) -> None:
    with pytest.raises(ValueError, match=r"colour_mask: classes must be .* values 0\.\.3 or 255"):
        colour_mask(torch.tensor(bad), COLOURS)
