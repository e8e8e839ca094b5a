"""Legends below images: every colour and name is there, no pixel of the image is covered, all sizes are readable."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ccgpu.models.legend import draw_legend, text_size, with_legend

ENTRIES = [(f"class number {index}", (20 * index, 255 - 9 * index, 77)) for index in range(12)]


@pytest.mark.parametrize("size", [(1, 1), (40, 30), (480, 360), (300, 1000), (4000, 60)])
def test_a_legend_enlarges_the_canvas_and_shows_every_colour(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    drawn = draw_legend(ENTRIES, image.width, text_size(image.height, image.width))
    found = np.asarray(with_legend(image, drawn))
    assert np.array_equal(found[: size[1], : size[0]], pixels)
    legend = found[size[1] :]
    swatch = text_size(image.height, image.width)
    for _, colour in ENTRIES:
        rows, columns = np.nonzero((legend == colour).all(axis=-1))
        assert min(np.ptp(rows), np.ptp(columns)) + 1 >= swatch, "a swatch is as high as the text, or higher"
    assert (found[: size[1], size[0] :] == 255).all()


def test_text_grows_with_the_image() -> None:
    assert text_size(20, 30) == text_size(480, 360) == 11
    assert text_size(2000, 6000) == text_size(6000, 2000) == 83
    heights = [draw_legend(ENTRIES[:1], 10, size).height for size in (11, 22, 44)]
    assert heights == sorted(set(heights))


def test_names_are_drawn_beside_their_swatches_and_long_ones_are_cut() -> None:
    """A name that a legend of white swatches lacks would leave the legend without dark pixels."""
    for name in ("x", "sky", "w" * 500):
        legend = np.asarray(draw_legend([(name, (255, 255, 255))], 10)).mean(axis=-1)
        assert (legend < 80).any()
        assert legend.shape[1] < 700
    one, other = (np.asarray(draw_legend([(name, (9, 9, 9))], 200)) for name in ("road", "lake"))
    assert not np.array_equal(one, other)


def test_lines_are_no_wider_than_asked_for() -> None:
    assert draw_legend(ENTRIES, 400).width == 400
    assert draw_legend(ENTRIES, 400).height > draw_legend(ENTRIES, 2000).height
