"""Reading users' own image files, of any common format and depth, as upright 8-bit RGB.

An EXIF orientation is applied. (`train/data/pairs.py` reads the images of datasets and does not apply it, because label
maps belong to the pixels as stored.)
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# Formats that are accepted. Pillow knows more, but runs another program for some of them, such as EPS.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm"),
    *(".pbm", ".pnm", ".jp2", ".j2k", ".avif"),
)
# Pillow raises any of these for a broken file, depending on where it is broken.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_BACKGROUND = (255, 255, 255)  # shows through transparent pixels


class BadImage(ValueError):
    """An image, label map or video that cannot be used; the message names the file and says what to do."""


def read_image(path: Path) -> np.ndarray:
    """Return an image file of any of `FORMATS` as uint8 (H, W, 3) RGB, upright.

    Grey, palette and CMYK images become RGB. 16-bit values are reduced to their high byte. Transparent pixels become
    white. An EXIF orientation is applied. A file of several pages or frames gives the first.

    Raises:
        FileNotFoundError: there is no such file.
        BadImage: the file cannot be decoded: it is truncated, damaged or no image, has more than twice Pillow's
            limit of 89 million pixels, or has 32-bit values, whose range is unknown. The message names the file.
    """
    Image.init()
    try:
        with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"read_image: path must be an image, got no file {path}; name another.") from None
    except DECODE_ERRORS as error:
        raise BadImage(
            f"read_image: path must be a whole image of {', '.join(FORMATS)}, got {path}, which does not decode "
            f"({error}); copy or convert it again."
        ) from error
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > np.iinfo(np.uint16).max:
            raise BadImage(_unknown_range(path, image.mode))
        return grey_from_16_bits(values)
    if image.mode == "F":
        raise BadImage(_unknown_range(path, image.mode))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        transparent = image.convert("RGBA")
        background = Image.new("RGBA", transparent.size, (*_BACKGROUND, 255))
        image = Image.alpha_composite(background, transparent)
    return np.asarray(image.convert("RGB"))


def grey_from_16_bits(values: np.ndarray) -> np.ndarray:
    """Return the high byte of 16-bit grey values (H, W) as uint8 (H, W, 3); Pillow's conversion would clip at 255."""
    return np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)


def _unknown_range(path: Path, mode: str) -> str:
    return (
        f"read_image: image must have 8 or 16 bits per channel, got {path} with mode {mode}, whose range is "
        "unknown; convert it to 8 bits."
    )
