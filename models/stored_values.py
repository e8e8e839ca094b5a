"""The values of an image file as they are stored: any number of channels, 8 and 16 bits, floats.

TIFF files are read by tifffile and imagecodecs (optional dependencies, extra `tiff`), the others by Pillow, where it
reads their values exactly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import BinaryIO

import numpy as np
from PIL import Image

from ccgpu.models.image_files import (
    DECODE_ERRORS,
    FORMATS,
    can_scale,
    decode,
    has_16_bits,
    is_deep,
    is_deep_colour,
    open_header,
    second_bytes,
)

DTYPES = ("uint8", "uint16", "float32")
"""The dtypes in which values are kept; integers of other sizes and floats of other sizes become float32."""
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: files of more than 4 GB
_ORIENTATION, _PHOTOMETRIC = 274, ("MINISWHITE", "MINISBLACK", "RGB")
_ALPHA = (1, 2)  # TIFF's kinds of extra samples that are transparency; 0 is data of any meaning


class Unreadable(ValueError):
    """A whole file whose values cannot be read exactly; the message is what it is, without its name."""


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
        ModuleNotFoundError: a TIFF whose values Pillow does not read, without tifffile and imagecodecs.
        Any of `DECODE_ERRORS`: the file is truncated, damaged or no image.
    """
    start = file.read(4)
    file.seek(0)
    if start in _TIFF:
        found = _read_tiff(file, max_pixels)
        if found is not None:
            return found
        file.seek(0)
    image = open_header(file, FORMATS)
    _check_pixels(image.width, image.height, max_pixels)
    if is_deep_colour(image) and not can_scale(image):
        raise Unreadable(f"{image.format} file of several channels of 16 bits, of which only the high byte is read")
    decoded = decode(image, content)
    if decoded.deep_colour:
        return (np.asarray(image).astype(np.uint16) << 8 | second_bytes(file))[..., :3], decoded.orientation
    pixels = pillow_values(image)
    # Pillow turns TIFF files itself.
    return (stored(pixels, decoded.orientation) if image.format == "TIFF" else pixels), decoded.orientation


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise Unreadable(f"{width}x{height} pixels, more than {max_pixels}; allow more with --max-pixels")


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


def _tifffile() -> ModuleType | None:
    try:
        import imagecodecs  # noqa: F401  # tifffile decodes compressed files with it
        import tifffile
    except ImportError:
        return None
    return tifffile


def _read_tiff(file: BinaryIO, max_pixels: int) -> tuple[np.ndarray, int] | None:
    """Return the values of a TIFF file and its orientation; None for a file that Pillow reads exactly.

    That are palettes, CMYK, YCbCr (and with them JPEG), Lab, and fewer than 8 bits.
    """
    tifffile = _tifffile()
    if tifffile is None:
        _check_pillow_reads(file)
        return None
    with _as_decode_errors(), tifffile.TiffFile(file) as tiff:
        if not tiff.pages:
            raise OSError("no image in the TIFF file")
        page = tiff.pages[0]
        _check_pixels(page.imagewidth, page.imagelength, max_pixels)
        if page.photometric.name not in _PHOTOMETRIC or page.bitspersample < 8:
            return None
        if page.imagedepth > 1:
            raise Unreadable(f"TIFF file of {page.imagedepth} planes in depth")
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
    if len(channels) < values.shape[-1]:
        values = np.ascontiguousarray(values[..., channels])
    return as_kept(values), orientation


def _check_pillow_reads(file: BinaryIO) -> None:
    """Raise ModuleNotFoundError unless Pillow reads all values of a TIFF file exactly."""
    try:
        image = open_header(file, ("TIFF",))
    except OSError as error:
        raise ModuleNotFoundError(
            "read_image: tifffile and imagecodecs must be installed to read this TIFF file, got "
            f'{error}; pip install "ccgpu[tiff]".'
        ) from error
    samples = int(image.tag_v2.get(277, 1))  # type: ignore[attr-defined]
    file.seek(0)
    exact = image.mode in ("1", "L", "P", "CMYK", "YCbCr", "LAB", "I;16", "F") or (
        image.mode in ("LA", "RGB", "RGBA") and samples == len(image.getbands())
    )
    if not exact or is_deep_colour(image):
        raise ModuleNotFoundError(
            f"read_image: tifffile and imagecodecs must be installed to read a TIFF file of {samples} channels, got "
            'neither; pip install "ccgpu[tiff]".'
        )


def _check_whole(file: BinaryIO, page: object) -> None:
    """Raise OSError unless all strips or tiles of a page lie inside of the file: tifffile fills what is missing."""
    here = file.tell()
    size = file.seek(0, 2)
    file.seek(here)
    for offset, length in zip(page.dataoffsets, page.databytecounts, strict=True):  # type: ignore[attr-defined]
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
