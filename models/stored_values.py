"""The values of an image file as they are stored: any number of channels, 8 and 16 bits, floats.

Pillow reads them where it does so exactly; other TIFF files are read by tifffile and imagecodecs (optional
dependencies, extra `tiff`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin

from ccgpu.models.image_files import (
    DECODE_ERRORS,
    FORMATS,
    Decoded,
    decode,
    has_16_bits,
    is_deep,
    is_deep_colour,
    is_misread,
    open_header,
    second_bytes,
)

DTYPES = ("uint8", "uint16", "float32")
"""The dtypes in which values are kept; integers of other sizes and floats of other sizes become float32."""
MOST_CHANNELS = 4096
_MOST_COMPRESSED = 100_000  # bytes of pixels for each of the file, more than which a damaged header claims
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: files of more than 4 GB
_SAMPLES, _EXTRA, _ORIENTATION = 277, 338, 274
_PHOTOMETRIC = ("MINISWHITE", "MINISBLACK", "RGB")
# Modes in which Pillow opens TIFF files without loss; the colours among them become RGB.
_EXACT = ("1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I;16B", "F")
_ALPHA = (1, 2)  # TIFF's kinds of extra samples that are transparency; 0 is data of any meaning


class Unreadable(ValueError):
    """A whole file whose values cannot be read exactly; the message is what it is, without its name."""


class TooLarge(Unreadable):
    """An image of more pixels than are read; `size` is its width and height."""

    def __init__(self, size: tuple[int, int], max_pixels: int) -> None:
        super().__init__(f"{size[0]}x{size[1]} pixels, more than {max_pixels}; allow more with --max-pixels")
        self.size = size


def is_tiff(content: bytes) -> bool:
    """Return whether a file begins as a TIFF file does."""
    return content.startswith(_TIFF)


def read_stored(file: BinaryIO, max_pixels: int, content: bytes | None = None) -> tuple[np.ndarray, int]:
    """Return the values of an open image file as they are stored, and its EXIF or TIFF orientation, 1..8.

    Channels are those with data: an alpha channel is left out, other extra samples of a TIFF are kept. Palette, CMYK,
    YCbCr and Lab images become red, green, blue. Grey of 1, 2 or 4 bits is scaled to 0..255, black and white included.
    A file of several pages or frames gives the first.

    Args:
        file: the open file.
        max_pixels: largest number of pixels.
        content: all bytes of the file, in which damage is looked for that Pillow does not see; None: it is not.

    Returns:
        (H, W, C) of one of `DTYPES`, whose pixels are not turned, and the orientation.

    Raises:
        Unreadable: more than `max_pixels` pixels, or values of a kind that is not read exactly.
        ModuleNotFoundError: a TIFF whose values Pillow does not read exactly, without tifffile and imagecodecs.
        Any of `DECODE_ERRORS`: the file is truncated, damaged or no image.
    """
    start = file.read(len(_TIFF[0]))
    file.seek(0)
    try:
        image = open_header(file, FORMATS)
    except OSError:
        if not is_tiff(start):
            raise
        return _read_tiff(file, max_pixels)  # of kinds that Pillow does not know
    _check_pixels(image.width, image.height, max_pixels)
    if not pillow_reads(image, is_deep_colour(image)):
        if image.format == "TIFF":
            return _read_tiff(file, max_pixels)
        raise Unreadable(f"{image.format} file of several channels of 16 bits, of which only the high byte is read")
    decoded = decode(image, content)
    return values_of(decoded, file), decoded.orientation


def pillow_reads(image: ImageFile.ImageFile, deep_colour: bool) -> bool:
    """Return whether `values_of` gives all values of an image that Pillow has opened exactly.

    Args:
        image: the image.
        deep_colour: whether it has several channels of 16 bits.
    """
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        if deep_colour or image.mode not in _EXACT or is_misread(image):
            return False
        samples, extra = image.tag_v2.get(_SAMPLES, 1), image.tag_v2.get(_EXTRA, ())
        return samples == len(image.getbands()) and set(extra) <= {*_ALPHA}
    return not deep_colour or image.format == "PNG"


def values_of(decoded: Decoded, file: BinaryIO) -> np.ndarray:
    """Return the values (H, W, C) of a decoded image that `pillow_reads`, as `read_stored` does.

    Args:
        decoded: the image.
        file: its open file, from which the low bytes of a PNG file of 16 bits are read.
    """
    if decoded.deep_colour:
        high = np.asarray(decoded.image).astype(np.uint16)
        return (high << 8 | second_bytes(file))[..., :3]
    pixels = pillow_values(decoded.image)
    # Pillow turns TIFF files itself.
    return stored(pixels, decoded.orientation) if decoded.image.format == "TIFF" else pixels


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise TooLarge((width, height), max_pixels)


def pillow_values(image: Image.Image) -> np.ndarray:
    """Return the values of a Pillow image, (H, W, C) of one of `DTYPES`, with channels as in `read_stored`."""
    if is_deep(image):
        values = np.asarray(image)
        return as_kept(values.astype(np.uint16) if has_16_bits(image) else values)[..., None]
    if image.mode in ("1", "L", "LA"):
        return np.asarray(image.convert("L"))[..., None]
    return np.asarray(image if image.mode in ("RGB", "RGBA", "RGBX") else image.convert("RGB"))[..., :3]


def as_kept(values: np.ndarray) -> np.ndarray:
    """Return values in one of `DTYPES`: uint8 and uint16 as they are, in the machine's byte order; others as float32.

    Integers of 32 bits and floats of 64 bits are rounded to float32.
    """
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.newbyteorder("=") in (np.dtype(np.uint8), np.dtype(np.uint16)):
        return values.astype(values.dtype.newbyteorder("="), copy=False)
    if values.dtype.kind not in "iuf":
        raise Unreadable(f"values of {values.dtype}, which are no numbers of one part")
    with np.errstate(over="ignore"):  # infinity is refused as a value
        return values.astype(np.float32)


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return stored pixels (H, W, C) turned by their EXIF orientation, 1..8; a view."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return pixels[rows, columns]


def stored(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return upright pixels (H, W, C) as they are stored: the inverse of `upright`; a view."""
    return upright(pixels, {6: 8, 8: 6}.get(orientation, orientation))


def _tifffile() -> ModuleType:
    try:
        import imagecodecs  # noqa: F401  # tifffile decodes compressed files with it
        import tifffile
    except ImportError as error:
        raise ModuleNotFoundError(
            f"read_image: tifffile and imagecodecs must be installed for TIFF files of such channels, got {error}; "
            'pip install "ccgpu[tiff]".'
        ) from error
    return tifffile


def _read_tiff(file: BinaryIO, max_pixels: int) -> tuple[np.ndarray, int]:
    """Return the values of a TIFF file and its orientation, as `read_stored` does."""
    tifffile = _tifffile()
    file.seek(0)
    with _as_decode_errors(), tifffile.TiffFile(file) as tiff:
        if not tiff.pages:
            raise OSError("no image in the TIFF file")
        page = tiff.pages[0]
        _check_pixels(page.imagewidth, page.imagelength, max_pixels)
        if page.photometric.name not in _PHOTOMETRIC or page.bitspersample < 8:
            raise Unreadable(
                f"TIFF file of {page.samplesperpixel} channels of {page.bitspersample} bits, {page.photometric.name}"
            )
        if page.imagedepth > 1:
            raise Unreadable(f"TIFF file of {page.imagedepth} planes in depth")
        if page.samplesperpixel > MOST_CHANNELS:
            raise Unreadable(f"TIFF file of {page.samplesperpixel} channels, more than {MOST_CHANNELS}")
        _check_whole(file, page)
        values = page.asarray()
        if page.samplesperpixel == 1:
            values = values.reshape(page.imagelength, page.imagewidth, 1)
        elif page.planarconfig.name == "SEPARATE":
            values = np.ascontiguousarray(np.moveaxis(values, 0, -1))
        alpha = page.samplesperpixel - len(page.extrasamples)
        channels = [*range(alpha)]
        channels += [alpha + i for i, kind in enumerate(page.extrasamples) if int(kind) not in _ALPHA]
        if values.dtype.kind == "u" and page.photometric.name == "MINISWHITE":
            values = ((1 << page.bitspersample) - 1) - values
        tag = page.tags.get(_ORIENTATION)
        orientation = tag.value if tag is not None and tag.value in range(1, 9) else 1
    if not channels or not values.size:
        raise OSError("no channel with data in the TIFF file")
    if len(channels) < values.shape[-1]:
        values = np.ascontiguousarray(values[..., channels])
    return as_kept(values), orientation


def _check_whole(file: BinaryIO, page: Any) -> None:
    """Raise OSError unless all strips or tiles of a page lie inside of the file: tifffile fills what is missing."""
    here = file.tell()
    size = file.seek(0, 2)
    file.seek(here)
    claimed = max(page.nbytes, math.prod(page.chunks) * (page.bitspersample + 7) // 8)
    if claimed > _MOST_COMPRESSED * size:
        raise OSError(f"damaged TIFF file: {claimed} bytes of pixels in a file of {size}")
    for offset, length in zip(page.dataoffsets, page.databytecounts, strict=True):
        if length == 0 or offset + length > size:
            raise OSError("truncated TIFF file: pixels are missing")


@contextlib.contextmanager
def _as_decode_errors() -> Iterator[None]:
    """Turn what tifffile and imagecodecs raise for damaged files into one of `DECODE_ERRORS`."""
    try:
        yield
    except (*DECODE_ERRORS, MemoryError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
