"""Fonts: names in letters other than those of English are drawn as they are, or as near as a font allows."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import ImageFont

from ccgpu.models import fonts
from ccgpu.models.fonts import font_and_texts
from ccgpu.models.legend import draw_legend


def drawn(name: str) -> np.ndarray:
    return np.asarray(draw_legend([(name, (9, 9, 9))], 200))


def test_english_names_are_drawn_in_pillows_own_font() -> None:
    font, texts = font_and_texts(["road", "side_walk 2"], 20)
    assert texts == ["road", "side_walk 2"]
    assert font.getname() == ImageFont.load_default(20).getname()  # type: ignore[union-attr]


def test_a_font_of_the_system_draws_what_pillows_own_lacks() -> None:
    names = ["Straße", "forêt", "дорога"]
    try:
        ImageFont.truetype("DejaVuSans.ttf", 20)
    except OSError:
        pytest.skip("needs the font DejaVu Sans")
    font, texts = font_and_texts(names, 20)
    assert texts == names
    assert font.getname()[0] == "DejaVu Sans"  # type: ignore[union-attr]
    assert not np.array_equal(drawn("дорога"), drawn("дюрюга")), "no boxes in the place of letters"


def test_without_such_a_font_accents_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "SYSTEM_FONTS", ("no such font.ttf",))
    assert font_and_texts(["forêt", "río", "水"], 20)[1] == ["foret", "rio", "?"]
    assert np.array_equal(drawn("forêt"), drawn("foret"))


def test_names_are_drawn_in_one_line_and_without_control_characters() -> None:
    assert font_and_texts(["two\nlines", " tab\there ", "bell\x07", "byte\udcff"], 20)[1] == [
        *("two lines", "tab here", "bell?", "byte?"),
    ]
    assert np.array_equal(drawn("two\nlines"), drawn("two lines"))
