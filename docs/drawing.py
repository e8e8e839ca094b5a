"""Boxes, arrows and text for the figures of the documentation, which docs/draw_*.py draw with matplotlib."""

from __future__ import annotations

import colorsys
import io
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

IMAGES = Path(__file__).resolve().parent / "images"
BLUE, ORANGE, GREEN, PURPLE, GREY = "#a6c8ea", "#f9c98e", "#b2dca6", "#d3bfe6", "#e4e4e4"
INK, RED = "#222222", "#c0392b"
COLOUR = re.compile(r"(?:fill|stroke)(?:: |=\")(#[0-9a-f]{6})")
PAGE = "#1e2129"  # the ground of the site's dark pages
LEAST, MOST = 0.16, 0.92  # lightness, on dark pages, of what is white and black on light ones
OF_IMAGES = (BLUE, ORANGE, GREEN, PURPLE)  # one colour for each image of a batch


def panel(ax: Axes, width: float, height: float, title: str = "") -> None:
    """Turn axes into an empty drawing area of width x height units, y downwards."""
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.axis("off")
    ax.set_title(title, loc="left", fontsize=10, fontweight="bold")


def box(ax: Axes, at: tuple[float, float, float, float], text: str, color: str, **style: Any) -> None:
    """Draw a labelled rectangle; `at` is (x, y, width, height), with x, y of its upper left corner."""
    x, y, w, h = at
    given = {"fontsize": 8, "hatch": None, "edgecolor": INK, "linewidth": 0.7, **style}
    size = given.pop("fontsize")
    ax.add_patch(Rectangle((x, y), w, h, facecolor=color, **given))
    ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size, color=INK)


def note(ax: Axes, x: float, y: float, text: str, size: float = 8, ha: str = "left", color: str = INK) -> None:
    """Write text at (x, y)."""
    ax.text(x, y, text, ha=ha, va="center", fontsize=size, color=color)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], color: str = INK, bend: float = 0.0) -> None:
    """Draw an arrow from start to end; bend 0 is straight."""
    ax.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=9,
            linewidth=1.0,
            color=color,
            shrinkA=0,
            shrinkB=0,
            connectionstyle=f"arc3,rad={bend}",
        )
    )


def save(figure: Figure, target: Path) -> None:
    """Write a figure as SVG for light and dark pages, with the same bytes each time (no date, fixed ids)."""
    matplotlib.rcParams["svg.hashsalt"] = "ccgpu"
    target.parent.mkdir(exist_ok=True)
    content = io.StringIO()
    # The tight box holds titles that reach beyond the axes' share of the figure.
    figure.savefig(
        content, format="svg", metadata={"Date": None}, facecolor="white", bbox_inches="tight", pad_inches=0.05
    )
    plt.close(figure)
    target.write_text(with_dark_colours(content.getvalue()), encoding="utf-8")


def with_dark_colours(svg: str) -> str:
    """Return a drawing by matplotlib with a rule for each of its colours, for readers who prefer dark pages.

    Browsers apply the rules to an image on a page too. The colours in the drawing itself remain, for other readers.
    """
    rules = [f"svg {{ fill: {dark('#000000')} }}"]  # what has no colour of its own is black
    for colour in sorted(set(COLOUR.findall(svg))):
        for kind in ("fill", "stroke"):
            rules.append(f'[style*="{kind}: {colour}"], [{kind}="{colour}"] {{ {kind}: {dark(colour)} !important }}')
    style = "\n   ".join(rules)
    head, found, tail = svg.partition("</style>")
    if not found:
        raise ValueError("with_dark_colours: svg must be a drawing by matplotlib, got one without a style")
    return f"{head}\n  @media (prefers-color-scheme: dark) {{\n   {style}\n  }}{found}{tail}"


def dark(colour: str) -> str:
    """Return a colour of a light page, #rrggbb, for a dark one: the same hue with the lightness turned over."""
    red, green, blue = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    if lightness == 1:
        return PAGE
    turned = colorsys.hls_to_rgb(hue, LEAST + (MOST - LEAST) * (1 - lightness), 0.75 * saturation)
    return "#" + "".join(f"{round(255 * share):02x}" for share in turned)
