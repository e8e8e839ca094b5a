"""Legends: the colours of classes with their names, below an image on a canvas that is larger than it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from ccgpu.models.fonts import font_and_texts
from ccgpu.models.labels import Labels

Entry = tuple[str, Sequence[int]]
"""Name and RGB colour of a class."""
SMALLEST_TEXT = 11  # pixels a line; the smallest that is easily read
_SHARE = 72  # a line of text is this part of an image's longer side
_LONGEST = 48  # characters of a name that are shown
_FRAME = (150, 150, 150)  # around a swatch, so that a white one is seen on white


def entries(labels: Labels) -> list[Entry]:
    """Return the entries of all classes, in their order."""
    return list(zip(labels.names, labels.colours.tolist(), strict=True))


def occurring(labels: Labels, counts: np.ndarray) -> list[Entry]:
    """Return the entries of the classes that have pixels, those with the most first; counts are (K,)."""
    everything = entries(labels)
    return [everything[index] for index in np.argsort(-counts, kind="stable") if counts[index]]


def text_size(height: int, width: int) -> int:
    """Return the size of the text of a legend, in pixels, that can be read when an image is shown as a whole."""
    return max(SMALLEST_TEXT, round(max(height, width) / _SHARE))


def draw_legend(shown: Sequence[Entry], width: int, size: int = SMALLEST_TEXT) -> Image.Image:
    """Return a legend as an RGB image on white: swatches with names, in as many lines as the width asks for.

    Args:
        shown: the classes, one or more; of longer names the first 48 characters are shown, in a font that has them
            (`models.fonts`).
        width: of the image in pixels; it becomes wider where one entry alone needs more.
        size: of the text, in pixels.

    Examples:
        >>> from ccgpu.models.legend import draw_legend
        >>> draw_legend([("road", (128, 64, 128)), ("sky", (70, 130, 180))], 300).width
        300
    """
    names = [name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "\u2026" for name, _ in shown]
    font, names = font_and_texts(names, size)
    swatch, gap = round(1.4 * size), max(2, round(0.4 * size))
    lengths = [swatch + gap + int(font.getlength(name)) + 1 for name in names]
    width = max(width, max(lengths) + 2 * gap)
    places, x, y = [], gap, gap
    for length in lengths:
        if x > gap and x + length + gap > width:
            x, y = gap, y + swatch + gap
        places.append((x, y))
        x += length + 3 * gap
    drawn = Image.new("RGB", (width, y + swatch + gap), "white")
    draw = ImageDraw.Draw(drawn)
    for (x, y), name, (_, colour) in zip(places, names, shown, strict=True):
        box = (x, y, x + swatch - 1, y + swatch - 1)
        draw.rectangle(box, fill=tuple(int(value) for value in colour), outline=_FRAME, width=max(1, size // 16))
        draw.text((x + swatch + gap, y + swatch / 2), name, fill="black", font=font, anchor="lm")
    return drawn


def with_legend(image: Image.Image, drawn: Image.Image) -> Image.Image:
    """Return an RGB image with a legend below it, on a white canvas as wide as the wider of the two."""
    canvas = Image.new("RGB", (max(image.width, drawn.width), image.height + drawn.height), "white")
    canvas.paste(image, (0, 0))
    canvas.paste(drawn, (0, image.height))
    return canvas
