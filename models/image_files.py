"""Images as people have them: any common format and depth, turned as their EXIF says, as 8-bit RGB.

(The images of a dataset are read by `pairs.py`, as they are stored, because labels lie on their pixels.)
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# Formats that images come in. Not all that Pillow knows: it hands EPS files to another program, for one.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm"),
    *(".pbm", ".pnm", ".jp2", ".j2k", ".avif"),
)
# What lies behind transparent pixels.
PAPER = (255, 255, 255)
# Pillow reports a broken file through any of these, depending on where it breaks.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class BadImage(ValueError):
    """An image or label that cannot be used; the message names the file and what to do."""


def read_image(path: Path) -> np.ndarray:
    """Decode an image of any of `FORMATS`, upright, as uint8 (H, W, 3) RGB.

    Grey, palette and CMYK images become RGB. Of 16 bits the high byte counts. Transparent pixels show white. An EXIF
    orientation is applied. Of several pages or frames the first is taken.

    Raises:
        FileNotFoundError: there is no such file.
        BadImage: the file cannot be decoded: truncated, damaged, no image, more than twice Pillow's limit of
            89 million pixels, or 32-bit values, whose range is unknown. The message names the file.
    """
    Image.init()
    try:
        with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"read_image: path must be an image, got no file {path}; name another.") from None
    except _BROKEN as error:
        raise BadImage(
            f"read_image: path must be a whole image of {', '.join(FORMATS)}, got {path}, which does not decode "
            f"({error}); copy or convert it again."
        ) from error
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > np.iinfo(np.uint16).max:
            raise BadImage(_unknown_range(path, image.mode))
        # Pillow's own conversion would clip at 255.
        return np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "F":
        raise BadImage(_unknown_range(path, image.mode))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        transparent = image.convert("RGBA")
        paper = Image.new("RGBA", transparent.size, (*PAPER, 255))
        image = Image.alpha_composite(paper, transparent)
    return np.asarray(image.convert("RGB"))


def _unknown_range(path: Path, mode: str) -> str:
    return (
        f"read_image: image must have 8 or 16 bits a channel, got {path} with mode {mode}, whose range is "
        "unknown; convert it to 8 bits."
    )
