"""Pictures as people have them: any common format and depth, turned as their EXIF says, as 8-bit RGB.

(The pictures of a data set are read by `pairs.py`, as they are stored, because labels lie on their pixels.)
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ccgpu.train.pairs import BadPicture

# Formats that pictures come in. Not all that Pillow knows: it hands EPS files to another program, for one.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm"),
    *(".pbm", ".pnm", ".jp2", ".j2k", ".avif"),
)
# What lies behind transparent pixels.
PAPER = (255, 255, 255)
# Pillow reports a broken file through any of these, depending on where it breaks.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def read_photograph(path: Path) -> np.ndarray:
    """Decode a picture of any of `FORMATS`, upright, as uint8 (H, W, 3) RGB.

    Grey, palette and CMYK pictures become RGB. Of 16 bits the high byte counts. Transparent pixels show white. An EXIF
    orientation is applied. Of several pages or frames the first is taken.

    Raises:
        FileNotFoundError: there is no such file.
        BadPicture: the file cannot be decoded: truncated, damaged, no picture, more than twice Pillow's limit of
            89 million pixels, or 32-bit values, whose range is unknown. The message names the file.
    """
    Image.init()
    try:
        with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as file:
            file.load()
            picture = ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"read_photograph: path must be a picture, got no file {path}; name another.") from None
    except _BROKEN as error:
        raise BadPicture(
            f"read_photograph: path must be a whole picture of {', '.join(FORMATS)}, got {path}, which does not decode "
            f"({error}); copy or convert it again."
        ) from error
    if picture.mode.startswith("I"):
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > np.iinfo(np.uint16).max:
            raise BadPicture(_unknown_range(path, picture.mode))
        # Pillow's own conversion would clip at 255.
        return np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if picture.mode == "F":
        raise BadPicture(_unknown_range(path, picture.mode))
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        transparent = picture.convert("RGBA")
        paper = Image.new("RGBA", transparent.size, (*PAPER, 255))
        picture = Image.alpha_composite(paper, transparent)
    return np.asarray(picture.convert("RGB"))


def _unknown_range(path: Path, mode: str) -> str:
    return (
        f"read_photograph: picture must have 8 or 16 bits a channel, got {path} with mode {mode}, whose range is "
        "unknown; convert it to 8 bits."
    )
