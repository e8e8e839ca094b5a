"""Masks: what the pixels of a label file are, exactly as they are stored: ids or colours.

A mask is a file of a lossless format:

    grey of 1, 2, 4, 8 or 16 bits    ids, the values that are stored (Pillow scales those of 2 and 4 bits to 0..255)
    palette                          ids, the indices; their colours are the palette's
    RGB, opaque RGBA                 colours, or the ids v where all pixels have r = g = b = v

Colours are the numbers 0xRRGGBB. Where a dataset's masks are colours, grey and palette files are read by the colours
that a viewer shows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from ccgpu.models.image_files import has_16_bits, has_alpha, is_deep
from ccgpu.models.labels import codes_of

FORMATS = ("PNG", "BMP", "TIFF", "GIF")
SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif")
LOSSY_SUFFIXES = (".jpg", ".jpeg", ".webp")
"""Endings of files that people take for masks, and that are refused with the reason."""
DESCRIPTION = "an opaque, lossless PNG, BMP, TIFF or GIF of grey, a palette or RGB"
MOST_VALUES = 1024
"""So many different values of a mask are counted one by one: the most frequent ones."""
COLOURS, PALETTE = "colours", "palette"
NAMES = {
    **{f"grey{bits}": f"a mask of {bits}-bit grey" for bits in (1, 2, 4, 8, 16)},
    PALETTE: "a mask with a palette",
    COLOURS: "a mask of colours",
}
_GREY = re.compile(r"grey(\d+)")
_LOSSY = ("JPEG", "MPO", "WEBP", "JPEG2000", "AVIF")
_LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp")
# Pillow scales values of so many bits by these factors.
_FACTORS = {1: 255, 2: 85, 4: 17, 8: 1}


class NoMask(ValueError):
    """A file that cannot be a mask; the message says what it is."""


@dataclass(frozen=True)
class Counts:
    """The values of a mask.

    Attributes:
        kind: "grey1", "grey2", "grey4", "grey8", "grey16", "palette" or "colours".
        pixels: value -> pixels, of the `MOST_VALUES` most frequent values.
        different: number of different values.
        palette: value -> colour 0xRRGGBB, of the values that occur in a mask with a palette.
    """

    kind: str
    pixels: Mapping[int, int]
    different: int
    palette: Mapping[int, int] = field(default_factory=dict)

    def as_plain(self) -> dict[str, Any]:
        """Return the counts as values that JSON can hold."""
        pixels = {str(value): number for value, number in self.pixels.items()}
        return {**vars(self), "pixels": pixels, "palette": {str(value): rgb for value, rgb in self.palette.items()}}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Counts:
        """Return the counts with these plain values: the inverse of `as_plain`."""
        pixels = {int(value): int(number) for value, number in values["pixels"].items()}
        palette = {int(value): int(rgb) for value, rgb in values["palette"].items()}
        return cls(**{**values, "pixels": pixels, "palette": palette})

    def read_as(self, coding: str) -> dict[int, int] | None:
        """Return value -> pixels of a mask that is read as ids or as colours; None where it cannot be read so."""
        if coding == "ids":
            if self.kind != COLOURS:
                return dict(self.pixels)
            grey = all(value == (value & 0xFF) * 0x010101 for value in self.pixels) and self.different <= 256
            return {value & 0xFF: number for value, number in self.pixels.items()} if grey else None
        if self.kind == COLOURS:
            return dict(self.pixels)
        colours = self.palette
        if self.kind != PALETTE:
            if _bits(self.kind) not in _FACTORS:
                return None
            colours = {value: value * _FACTORS[_bits(self.kind)] * 0x010101 for value in self.pixels}
        found: dict[int, int] = {}
        for value, number in self.pixels.items():  # two indices of a palette may have one colour
            found[colours[value]] = found.get(colours[value], 0) + number
        return found


def kind_of(image: ImageFile.ImageFile) -> str:
    """Return the kind of mask, see `Counts`, that an image is which is open but not loaded.

    Raises:
        NoMask: it is none.
    """
    name = str(image.format)
    if name not in FORMATS or image.info.get("compression") in _LOSSY_TIFF:
        lossy = name in _LOSSY or name == "TIFF"
        compressed = f"a {name} file{' compressed as JPEG' if name == 'TIFF' else ''}"
        raise NoMask(f"{compressed}, which changes values where it compresses" if lossy else compressed)
    coding = str(image.tile[0][3]) if image.tile else image.mode
    if is_deep(image):
        if has_16_bits(image):
            return "grey16"
        raise NoMask(f"a {name} of values of 32 bits")
    if ";16" in coding:
        raise NoMask(f"a {name} of 16-bit {'grey with alpha' if coding.startswith('LA') else 'colours'}")
    if image.mode == "P":
        return PALETTE
    if image.mode in ("1", "L", "LA"):
        scaled = re.match(r"L;([24])", coding)
        return "grey1" if image.mode == "1" else f"grey{scaled[1] if scaled else 8}"
    if image.mode in ("RGB", "RGBA", "RGBX"):
        return COLOURS
    raise NoMask(f"a {name} of {image.mode}")


def check_opaque(image: Image.Image) -> None:
    """Raise NoMask if a decoded mask of grey or colours has pixels that are not opaque: what they are is not known."""
    if image.mode == "P" or not has_alpha(image):
        return
    if image.mode in ("L", "1", "I;16"):  # one value is marked as transparent, and stays that value
        return
    lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
    if not isinstance(lowest, tuple) and lowest < 255:
        raise NoMask("an image with transparent pixels, whose values are not known")


def counts_of(image: Image.Image, kind: str) -> Counts:
    """Return the values of a decoded mask, and how many pixels have each.

    Raises:
        NoMask: pixels are transparent.
    """
    check_opaque(image)
    if kind == COLOURS:
        rgb = image.convert("RGB")
        found = rgb.getcolors(MOST_VALUES)  # fast, but None where there are more
        if found is None:
            values, numbers = np.unique(codes_of(np.asarray(rgb)), return_counts=True)
        else:
            values = codes_of(np.array([colour for _, colour in found], dtype=np.uint8))
            numbers = np.array([number for number, _ in found])
    else:
        bins = np.bincount(_stored(image, kind).ravel())
        values = np.flatnonzero(bins)
        numbers = bins[values]
    most = np.sort(np.lexsort((values, -numbers))[:MOST_VALUES])
    pixels = {int(value): int(number) for value, number in sorted(zip(values[most], numbers[most], strict=True))}
    table = _palette(image) if kind == PALETTE else ()
    palette = {value: int(table[value]) for value in pixels} if kind == PALETTE else {}
    return Counts(kind, pixels, len(values), palette)


def values_of(image: Image.Image, kind: str, coding: str) -> np.ndarray:
    """Return the pixels of a decoded mask as ids or as colours 0xRRGGBB, integers (H, W).

    Raises:
        NoMask: pixels are transparent, or the mask cannot be read so.
    """
    check_opaque(image)
    if coding == "ids":
        if kind != COLOURS:
            return _stored(image, kind)
        rgb = np.asarray(image.convert("RGB"))
        if not ((rgb[..., 0] == rgb[..., 1]) & (rgb[..., 1] == rgb[..., 2])).all():
            raise NoMask("an image of colours")
        return rgb[..., 0]
    if kind == PALETTE:
        return _palette(image)[np.asarray(image)]
    if kind != COLOURS and _bits(kind) not in _FACTORS:
        raise NoMask(f"an image of {_bits(kind)}-bit grey")
    return codes_of(np.asarray(image.convert("RGB")))


def _bits(kind: str) -> int:
    found = _GREY.fullmatch(kind)
    assert found, kind
    return int(found[1])


def _stored(image: Image.Image, kind: str) -> np.ndarray:
    """Return the values of a decoded grey image or the indices of one with a palette, as they are in the file."""
    if kind == PALETTE:
        return np.asarray(image)
    bits = _bits(kind)
    if bits == 16:
        return np.asarray(image).astype(np.uint16)
    grey = image.convert("L") if image.mode != "L" else image
    values: np.ndarray = np.asarray(grey) // np.uint8(_FACTORS[bits])
    return values


def _palette(image: Image.Image) -> np.ndarray:
    """Return the colours of all indices of an image with a palette, uint32 (256,); 0 for those that it lacks."""
    colours = np.zeros(3 * 256, dtype=np.uint8)
    given = image.getpalette("RGB") or []
    colours[: len(given)] = given
    return codes_of(colours.reshape(256, 3))
