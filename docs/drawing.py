"""Boxes, arrows and text for the figures of the documentation, which docs/draw_*.py draw with matplotlib."""

from __future__ import annotations

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


def save(figure: Figure, name: str) -> None:
    """Write a figure to docs/images/NAME.svg, with the same bytes each time (no date, fixed ids)."""
    matplotlib.rcParams["svg.hashsalt"] = "ccgpu"
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None}, facecolor="white")
    plt.close(figure)
