from collections.abc import Sequence

import numpy as np
import pytest
import torch

from ccgpu.models.colouring import colour_mask
from ccgpu.models.legend import SMALLEST_TEXT, text_size
from ccgpu.train.visualise import GAP, MARK, attention_overlay, caption_height, side_by_side

NAMES = ("road", "sky", "person", "bicycle")
COLOURS = np.array([[128, 64, 128], [70, 130, 180], [220, 20, 60], [119, 11, 32]], dtype=np.uint8)


def test_side_by_side_places_input_truth_and_prediction() -> None:
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (20, 60, 3), dtype=np.uint8)
    truth, prediction = torch.randint(0, 4, (20, 60)), torch.randint(0, 4, (20, 60))
    truth[:3] = 255
    top = caption_height(SMALLEST_TEXT)
    sheet = np.asarray(side_by_side(image, truth, prediction, COLOURS, NAMES))
    for index, panel in enumerate((image, colour_mask(truth, COLOURS), colour_mask(prediction, COLOURS))):
        left = index * (60 + GAP)
        assert np.array_equal(sheet[top : top + 20, left : left + 60], panel)
        assert (sheet[:top, left : left + 60] < 128).any(), "a caption stands above"


def test_side_by_side_refuses_other_sizes() -> None:
    image = np.zeros((4, 6, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"\(4, 6\), got \(4, 6\) and \(4, 5\)"):
        side_by_side(image, np.zeros((4, 6), dtype=int), np.zeros((4, 5), dtype=int), COLOURS, NAMES)


def test_side_by_side_has_a_legend_of_the_classes_that_occur() -> None:
    image = np.full((20, 60, 3), 250, dtype=np.uint8)
    truth, prediction = np.zeros((20, 60), dtype=np.uint8), np.full((20, 60), 2)

    def below(colours: np.ndarray = COLOURS) -> np.ndarray:
        sheet = np.asarray(side_by_side(image, truth, prediction, colours, NAMES))
        return sheet[caption_height(SMALLEST_TEXT) + 20 :]

    def swatch(colour: Sequence[int]) -> int:
        return int((legend == np.asarray(colour)).all(axis=-1).sum())

    legend = below()
    assert [swatch(colour) > 100 for colour in COLOURS] == [True, False, True, False]
    ink = swatch((0, 0, 0))
    truth[:5] = 255
    legend = below()
    assert [swatch(colour) > 100 for colour in COLOURS] == [True, False, True, False]
    assert swatch((0, 0, 0)) > ink + 100, "pixels without a class are named too"
    legend = below(np.array([[0, 0, 0], *COLOURS[1:]], dtype=np.uint8))
    assert swatch((224, 224, 192)) > 100, "in another colour where a class is black"


def test_captions_grow_with_the_image() -> None:
    truth = np.zeros((500, 1000), dtype=np.uint8)
    sheet = side_by_side(np.full((500, 1000, 3), 250, dtype=np.uint8), truth, truth, COLOURS, NAMES)
    size = text_size(500, 3 * 1000 + 2 * GAP)
    assert size > 3 * SMALLEST_TEXT
    assert np.array_equal(np.asarray(sheet)[caption_height(size) :][:500, :1000], np.full((500, 1000, 3), 250))


def test_attention_overlay_is_bright_where_attention_is_and_leaves_the_rest() -> None:
    image = np.full((41, 81, 3), 90, dtype=np.uint8)
    attention = torch.zeros(6, 11)
    attention[1, 8] = 0.5
    overlay = np.asarray(attention_overlay(image, attention, at=(30, 20), align_corners=True))
    assert overlay.shape == image.shape
    # Corners lie on corners: cell (1, 8) of 6 x 11 is pixel (8, 64) of 41 x 81.
    assert overlay[8, 64].sum() == overlay.astype(int).sum(axis=-1).max()
    assert overlay[8, 64].sum() > 500
    assert overlay[35, 70].tolist() == [90, 90, 90]
    marked = np.argwhere((overlay == MARK).all(axis=-1))
    assert marked.mean(axis=0).round().tolist() == [30, 20]


def test_attention_overlay_lays_positions_where_the_network_does() -> None:
    image = np.full((48, 80, 3), 90, dtype=np.uint8)
    attention = torch.zeros(6, 10)
    attention[0, 0] = 1
    found = {}
    for corners in (True, False):
        overlay = np.asarray(attention_overlay(image, attention, (40, 70), align_corners=corners), dtype=int)
        found[corners] = (overlay.sum(axis=-1) != 270)[:30, :40].any(axis=1).sum()
    # With aligned corners position 0 is pixel 0 and reaches as far as position 1, pixel 47 / 5; without, its centre is
    # pixel 3.5, and that of position 1 is 11.5.
    assert found == {True: 10, False: 12}


def test_attention_overlay_of_an_empty_map_is_the_input() -> None:
    image = np.full((20, 20, 3), 7, dtype=np.uint8)
    overlay = np.asarray(attention_overlay(image, torch.zeros(3, 3), at=(0, 0), align_corners=False))
    assert overlay[-1, -1].tolist() == [7, 7, 7]


def test_attention_overlay_refuses_a_pixel_outside_and_a_batch_of_maps() -> None:
    image = np.zeros((4, 6, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"of 4 x 6, got \(4, 0\)"):
        attention_overlay(image, torch.ones(2, 2), at=(4, 0), align_corners=True)
    with pytest.raises(ValueError, match="attention must be"):
        attention_overlay(image, torch.ones(1, 2, 2), at=(0, 0), align_corners=True)
