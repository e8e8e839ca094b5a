"""Label maps as colour images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ccgpu.models import png_files
from ccgpu.models.colouring import blend, class_overlay, colour_mask, mask_tables
from ccgpu.models.labels import Labels

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


@pytest.mark.parametrize(
    ("taken", "colour"),
    [([(0, 0, 0)], (224, 224, 192)), ([(0, 0, 0), (224, 224, 192), (255, 255, 255)], (254, 254, 254))],
)
def test_ignored_pixels_have_a_colour_that_no_class_has(taken: list, colour: tuple[int, ...]) -> None:
    colours = np.concatenate([COLOURS, np.array(taken, dtype=np.uint8)])
    assert colour_mask(np.array([[255]]), colours).tolist() == [[[*colour]]]


@pytest.mark.parametrize("bad", [[[4]], [[-1]], [[254]], [0, 1]])
def test_colour_mask_refuses_what_is_no_class(bad: list) -> None:
    with pytest.raises(ValueError, match=r"colour_mask: classes must be .* values 0\.\.3 or 255"):
        colour_mask(torch.tensor(bad), COLOURS)


def test_blending_strip_by_strip_is_the_overlay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png_files, "STRIP", 60)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (17, 23, 3), dtype=np.uint8)
    classes = generator.integers(0, 4, (17, 23), dtype=np.uint8)
    image = Image.fromarray(pixels)
    blend(image, classes, COLOURS, 0.3)
    assert np.array_equal(np.asarray(image), class_overlay(pixels, classes, COLOURS, 0.3))
    assert np.abs(np.asarray(image) - (pixels * 0.7 + COLOURS[classes] * 0.3)).max() <= 0.5 + 1e-4


def test_masks_hold_label_ids_in_the_colours_of_their_classes() -> None:
    values, palette = mask_tables(Labels(("a", "b", "c", "d"), COLOURS, (7, 0, 200, 3), void=(255,)))
    assert values.tolist() == [7, 0, 200, 3]
    assert np.array_equal(palette[values], COLOURS)
    assert palette.shape == (201, 3)
    assert not palette[1].any()


@pytest.mark.parametrize(("coding", "ids"), [("ids", (7, 0, 300, 3)), ("colours", (0, 255, 254, 0xFF0000))])
def test_masks_of_other_label_files_hold_the_numbers_of_the_classes(coding: str, ids: tuple[int, ...]) -> None:
    values, palette = mask_tables(Labels(("a", "b", "c", "d"), COLOURS, ids, coding=coding))
    assert values.tolist() == [0, 1, 2, 3]
    assert np.array_equal(palette, COLOURS)
