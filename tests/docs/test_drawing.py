"""The colours that figures of the documentation get on dark pages."""

from __future__ import annotations

import colorsys
import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the figures are drawn with matplotlib (extra dev)")

from docs import drawing
from docs.drawing import BLUE, INK, ORANGE, RED, dark, plt


def channels(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    return red, green, blue


def test_dark_colours_keep_the_hue_and_turn_the_lightness_over() -> None:
    assert dark("#ffffff") == drawing.PAGE
    for colour in (BLUE, ORANGE, RED):
        hue, lightness, _ = colorsys.rgb_to_hls(*channels(colour))
        turned, light, _ = colorsys.rgb_to_hls(*channels(dark(colour)))
        assert turned == pytest.approx(hue, abs=0.01)
        assert (light - 0.5) * (lightness - 0.5) <= 0
    # What is written on a box stays readable.
    assert max(channels(dark(INK))) - max(channels(dark(BLUE))) > 0.25


def test_a_figure_has_a_rule_for_each_of_its_colours(tmp_path: Path) -> None:
    def draw() -> bytes:
        figure, ax = plt.subplots()
        drawing.panel(ax, 10, 10, "title")
        drawing.box(ax, (1, 1, 3, 3), "text", BLUE, hatch="//")
        ax.plot([0, 1], [2, 3], color=RED)
        drawing.save(figure, tmp_path / "a.svg")
        return (tmp_path / "a.svg").read_bytes()

    first = draw()
    assert draw() == first
    style, drawn = (
        re.search(r"<style.*?</style>(.*)", first.decode(), re.DOTALL),
        first.decode().partition("</style>")[2],
    )
    assert style is not None
    colours = set(re.findall(r"#[0-9a-f]{6}\b", drawn))
    assert {BLUE, RED, "#ffffff"} <= colours
    rules = first.decode().partition("</style>")[0]
    for colour in colours:
        assert f"fill: {dark(colour)} !important" in rules
        assert f'[style*="fill: {colour}"]' in rules
    assert "prefers-color-scheme: dark" in rules
