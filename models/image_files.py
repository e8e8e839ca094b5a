"""Reading image files of any common format and depth as 8-bit RGB: for training, evaluation and prediction alike."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import stat
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin

from ccgpu.models.jpeg import is_cut
from ccgpu.models.png_files import check_chunks

# Formats that are accepted. Pillow knows more, but runs another program for some of them, such as EPS.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm"),
    *(".pbm", ".pnm", ".jp2", ".j2k", ".avif"),
)
EXIF = ("stored", "upright")
"""What is done with an EXIF orientation: nothing, or the image is turned upright."""
MAX_PIXELS = 178_956_970
"""Default of the largest image that is read, in pixels: the size from which Pillow suspects a decompression bomb."""
# Pillow raises any of these for a broken file, depending on where it is broken; RuntimeError for AVIF.
DECODE_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, RuntimeError, struct.error),
    Image.DecompressionBombError,
)
_PIXEL_MODE = "unknown pixel mode"  # Pillow's word for a whole TIFF file of channels or values that it lacks
_JPEGS = ("JPEG", "MPO")
MISREAD = "big-endian TIFF of compressed floats, which Pillow decodes wrongly"
_BACKGROUND = (255, 255, 255)  # shows through transparent pixels
_ORIENTATION = 0x0112  # EXIF's tag
_COMPRESSION = 259  # TIFF's tag; 1 is none
_LIMIT_LOCK = threading.Lock()
# Beside raising an error for a TIFF file of more channels than it reads, Pillow logs one.
logging.getLogger("PIL").addHandler(logging.NullHandler())
# Pillow keeps the first byte of 16-bit colours; the other coding makes it keep the second.
_SECOND_BYTE = {"RGB;16B": "RGB;16L", "RGBA;16B": "RGBA;16L"}
# EXIF orientation -> what turns the stored image upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_INVERSE = {**_TURNS, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


class BadImage(ValueError):
    """An image, label map or video that cannot be used; the message names the file and says what to do."""


@dataclass(frozen=True)
class Decoded:
    """An image file, decoded, before its values become 8-bit RGB.

    Attributes:
        image: the image that Pillow decodes; of colours of 16 bits, their high bytes.
        orientation: its EXIF orientation, 1..8.
        deep_colour: whether it has several channels of 16 bits.
        scalable: whether a range of values can be applied to it.
        low_bytes: of colours of 16 bits, uint8 (H, W, 3) or (H, W, 4), where they were asked for.
    """

    image: ImageFile.ImageFile
    orientation: int
    deep_colour: bool
    scalable: bool
    low_bytes: np.ndarray | None = None


def read_image(
    path: Path,
    *,
    exif: str = "upright",
    value_range: tuple[float, float] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Return an image file of any of `FORMATS` as uint8 (H, W, 3) RGB; arguments and errors are `open_image`'s."""
    return np.asarray(open_image(path, exif=exif, value_range=value_range, max_pixels=max_pixels))


def open_image(
    path: Path,
    *,
    exif: str = "upright",
    value_range: tuple[float, float] | None = None,
    max_pixels: int = MAX_PIXELS,
    check: bool = False,
) -> Image.Image:
    """Return an image file of any of `FORMATS` as a decoded Pillow image of mode RGB.

    Grey, palette and CMYK images become RGB; transparent pixels become white. A file of several pages or frames gives
    the first. Images of more than 8 bits become

        round(255 (value - low) / (high - low)), clipped to 0..255,    with value_range = (low, high)

    and without `value_range` those of 16 bits keep their high byte.

    Args:
        path: a regular file.
        exif: "upright" turns the image by its EXIF orientation; "stored" leaves the pixels where they are stored.
        value_range: the values that become 0 and 255, for images of more than 8 bits; None: 0 and 65535.
        max_pixels: largest number of pixels, 1 or more.
        check: whether damage that Pillow does not see is looked for: a JPEG file that was cut and ends like a whole
            one, which takes a second decoding, and a PNG file of wrong checksums.

    Raises:
        FileNotFoundError: there is no such file.
        BadImage: the file is no regular file, cannot be decoded (truncated, damaged, no image), has more than
            `max_pixels` pixels, or has values of 32 bits and no `value_range` is given. The message names the file.
        ValueError: exif or value_range is out of its range.
    """
    if exif not in EXIF:
        raise ValueError(f"open_image: exif must be one of {EXIF}, got {exif!r}.")
    decoded = decode_file(path, value_range=value_range, max_pixels=max_pixels, check=check)
    image = as_rgb(path, decoded, value_range)
    return image if exif == "stored" else upright(image, decoded.orientation)


def decode_file(
    path: Path, *, value_range: tuple[float, float] | None = None, max_pixels: int = MAX_PIXELS, check: bool = False
) -> Decoded:
    """Return a decoded image file; arguments and errors are `open_image`'s."""
    if value_range is not None:
        check_range(value_range)
    check_regular(path)
    try:
        with path.open("rb") as opened, pillows_limit(max_pixels):
            content = opened.read() if check else None
            file = opened if content is None else io.BytesIO(content)
            image = open_header(file, FORMATS)
            if image.width * image.height > max_pixels:
                raise BadImage(too_large(path, image.size, max_pixels))
            if value_range is not None and not can_scale(image):
                raise BadImage(
                    f"read_image: image must be grey or a PNG for --value-range, got {path} with 16 bits of each "
                    "colour, of which only the high byte is read; convert it to 8 bits, or to PNG."
                )
            if is_misread(image):
                raise BadImage(f"read_image: image must be no {MISREAD}, got {path}; write it without compression.")
            decoded = decode(image, content)
            if value_range is not None and decoded.deep_colour:
                return replace(decoded, low_bytes=second_bytes(file))
            return decoded
    except BadImage:
        raise
    except DECODE_ERRORS as error:
        if _PIXEL_MODE in str(error):
            raise BadImage(
                f"read_image: image must be grey or have the colours of a photo, got {path}, a TIFF file of channels "
                "or values that do not become 8-bit RGB; convert it, or use a network for such images."
            ) from error
        raise BadImage(
            f"read_image: path must be a whole image, got {path}, which does not decode ({error}); copy or convert it "
            "again."
        ) from error


def check_range(value_range: tuple[float, float]) -> None:
    """Raise ValueError unless a range of values is (low, high) with low < high, both finite."""
    try:
        low, high = map(float, value_range)
    except (TypeError, ValueError):
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"open_image: value_range must be (low, high) with low < high, got {value_range!r}.")


def decode(image: ImageFile.ImageFile, content: bytes | None = None) -> Decoded:
    """Decode an image that is open; with the content of its file, damage is looked for that Pillow does not see.

    Raises:
        Any of `DECODE_ERRORS`: the file is truncated or damaged.
    """
    deep_colour, scalable = is_deep_colour(image), can_scale(image)
    if content is not None and image.format == "PNG":
        check_chunks(content)
    orientation = load_image(image)
    if content is not None and image.format in _JPEGS and is_cut(content, image):
        raise OSError("pixels are missing before its end marker")
    return Decoded(image, orientation, deep_colour, scalable)


def as_rgb(path: Path, decoded: Decoded, value_range: tuple[float, float] | None) -> Image.Image:
    """Return a decoded file as a Pillow image of mode RGB, as it is stored; arguments are `open_image`'s.

    Raises:
        BadImage: it has values of 32 bits and no `value_range` is given.
    """
    image, orientation = decoded.image, decoded.orientation
    if value_range is not None and decoded.low_bytes is not None:
        stored = rgb(path, _scaled_colours(image, decoded.low_bytes, value_range))
    else:
        stored = rgb(path, image, value_range)
    return as_stored(stored, image.format, orientation)


def as_stored(image: Image.Image, format: str | None, orientation: int) -> Image.Image:
    """Return a decoded image as its file stores it: Pillow turns those of TIFF files by their orientation, 1..8."""
    return image.transpose(_INVERSE[orientation]) if format == "TIFF" and orientation != 1 else image


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Return a stored image turned by its EXIF orientation, 1..8."""
    return image if orientation == 1 else image.transpose(_TURNS[orientation])


@contextlib.contextmanager
def pillows_limit(max_pixels: int) -> Iterator[None]:
    """Within the block Pillow reads images of `max_pixels` pixels.

    Its own limit is one for the whole process, and of some formats cannot be avoided; it is lifted where that is asked
    for, by one thread at a time.
    """
    if max_pixels <= MAX_PIXELS:
        yield
        return
    with _LIMIT_LOCK:
        former, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = former


def check_regular(path: Path) -> None:
    """Raise unless `path` is a regular file: opening a named pipe would wait for ever.

    Raises:
        FileNotFoundError: there is no such file.
        BadImage: it is a folder, a pipe, a device or a socket.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(
            f"read_image: path must be an image, got no file {path}; put it back or name another."
        ) from None
    if not stat.S_ISREG(mode):
        raise BadImage(
            f"read_image: path must be a regular file, got {kind_of_file(mode)} {path}; remove or replace it."
        )


def kind_of_file(mode: int) -> str:
    """Return what a file of this `st_mode`, which is no regular file, is."""
    kinds = {stat.S_ISDIR: "the folder", stat.S_ISFIFO: "the named pipe", stat.S_ISSOCK: "the socket"}
    return next((name for test, name in kinds.items() if test(mode)), "the device")


def open_header(file: BinaryIO, formats: tuple[str, ...]) -> ImageFile.ImageFile:
    """Return the image of an open file, not decoded yet, like `Image.open` without its fixed limit of pixels.

    Raises:
        Image.UnidentifiedImageError: the file is of none of the formats.
        OSError: its header is damaged.
    """
    Image.init()
    prefix = file.read(16)
    for name in formats:
        if name not in Image.OPEN:
            continue
        factory, accept = Image.OPEN[name]
        if accept is None or accept(prefix) is True:
            file.seek(0)
            try:
                return factory(file, "")
            except DECODE_ERRORS as error:
                raise OSError(f"damaged {name} file, or one of a kind that is not read ({error})") from error
    raise Image.UnidentifiedImageError("empty file" if not prefix else f"not a file of {', '.join(formats)}")


def load_image(image: ImageFile.ImageFile) -> int:
    """Decode an image that is open, and return its EXIF orientation, 1..8: 1 too where there is none.

    Raises:
        Any of `DECODE_ERRORS`: the file is truncated or damaged.
    """
    if image.format == "TIFF":  # Pillow forgets the orientation when it has turned the image
        orientation = orientation_of(image)
        image.load()
        return orientation
    image.load()  # first, because the EXIF data of a PNG may follow its pixels
    return orientation_of(image)


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, 1..8: 1 too where there is none."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except DECODE_ERRORS:  # EXIF data that cannot be read says nothing; viewers show such an image as it is stored
        return 1
    return found if found in _TURNS else 1


def too_large(path: Path, size: tuple[int, int], max_pixels: int) -> str:
    """Return the message for an image of too many pixels."""
    return (
        f"read_image: image must have at most {max_pixels} pixels, got {size[0]}x{size[1]} = {size[0] * size[1]} in "
        f"{path}; if the file is what it should be, allow more with --max-pixels."
    )


def is_deep(image: Image.Image) -> bool:
    """Return whether an image has one channel of more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def has_16_bits(image: Image.Image) -> bool:
    """Return whether the values of an image that `is_deep` are in 0..65535."""
    # Pillow reads 16-bit PNG and PPM files as 32-bit integers in some of its versions.
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def is_deep_colour(image: ImageFile.ImageFile) -> bool:
    """Return whether an image that is not loaded yet has several channels of 16 bits, which Pillow cuts to 8."""
    return not is_deep(image) and ";16" in _coding(image)


def can_scale(image: ImageFile.ImageFile) -> bool:
    """Return whether a range of values can be applied to an image that is not loaded yet."""
    return not is_deep_colour(image) or (image.format == "PNG" and _coding(image) in _SECOND_BYTE)


def is_misread(image: ImageFile.ImageFile) -> bool:
    """Return whether Pillow decodes an image that is not loaded yet wrongly."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile) or image.mode != "F":
        return False
    # Pillow swaps the bytes of compressed big-endian floats once too often.
    return image.tag_v2.prefix == b"MM" and image.tag_v2.get(_COMPRESSION, 1) != 1


def has_alpha(image: Image.Image) -> bool:
    """Return whether some pixels of a decoded image may be transparent."""
    with_alpha = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    return with_alpha or (image.palette is not None and image.palette.mode == "RGBA")


def _coding(image: ImageFile.ImageFile) -> str:
    """Return Pillow's name of the coding of an image that is not loaded yet."""
    return str(image.tile[0][3]) if image.tile else ""


def second_bytes(file: BinaryIO) -> np.ndarray:
    """Return the low bytes of the colours of a 16-bit PNG, uint8 (H, W, 3) or (H, W, 4)."""
    file.seek(0)
    image = open_header(file, ("PNG",))
    second = _SECOND_BYTE[_coding(image)]
    # Plain tuples, as Pillow 10 has them; later ones take them too.
    image.tile = [(*tile[:3], second) for tile in image.tile]  # type: ignore[misc]
    return np.asarray(image)


def _scaled_colours(image: Image.Image, second: np.ndarray, value_range: tuple[float, float]) -> Image.Image:
    """Return the colours of a 16-bit PNG with the range of values applied; alpha keeps its high byte."""
    first = np.asarray(image)
    scaled = to_bytes(np.arange(1 << 16), value_range)[first.astype(np.uint16) << 8 | second]
    scaled[..., 3:] = first[..., 3:]
    return Image.fromarray(scaled)


def rgb(name: str | Path, image: Image.Image, value_range: tuple[float, float] | None = None) -> Image.Image:
    """Return a decoded image as mode RGB, by the rules of `open_image`.

    Raises:
        BadImage: it has values of 32 bits, and no `value_range` is given. The message names it by `name`.
    """
    if is_deep(image):
        return Image.merge("RGB", [Image.fromarray(_eight_bits(name, image, value_range))] * 3)
    if has_alpha(image):
        transparent = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        if transparent.getchannel("A").getextrema() == (255, 255):
            return transparent.convert("RGB")
        background = Image.new("RGBA", transparent.size, (*_BACKGROUND, 255))
        return Image.alpha_composite(background, transparent).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(name: str | Path, image: Image.Image, value_range: tuple[float, float] | None) -> np.ndarray:
    """Return the values of a deep grey image as uint8 (H, W)."""
    values = np.asarray(image)
    if value_range is None and not has_16_bits(image):
        raise BadImage(
            f"read_image: image must have 8 or 16 bits per channel, got {name} with mode {image.mode}, whose range is "
            "unknown; name the values that become black and white with --value-range LOW HIGH."
        )
    if value_range is None:
        return (values >> 8).astype(np.uint8)
    if has_16_bits(image):
        return to_bytes(np.arange(1 << 16), value_range)[values]
    return to_bytes(values, value_range)


def to_bytes(values: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
    """Return the values as bytes, low..high as 0..255; NaN becomes 0."""
    low, high = value_range
    scaled = np.rint((values.astype(np.float64) - low) * (255 / (high - low)))
    return np.nan_to_num(np.clip(scaled, 0, 255), nan=0.0).astype(np.uint8)
