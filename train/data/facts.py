"""What a file of a dataset is, found by decoding it once: size, kind, orientation, values, and what is wrong with it.

These are facts about a file alone, so they can be stored. What they mean for a dataset and its classes is decided in
`checking.py` and `census.py`.
"""

from __future__ import annotations

import hashlib
import io
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageFile, TiffImagePlugin, UnidentifiedImageError

from ccgpu.models.image_files import (
    DECODE_ERRORS,
    FORMATS,
    MAX_PIXELS,
    MISREAD,
    BadImage,
    Decoded,
    as_rgb,
    decode,
    decode_file,
    has_16_bits,
    has_alpha,
    is_deep,
    is_misread,
    kind_of_file,
    open_header,
    pillows_limit,
    upright,
)
from ccgpu.models.image_format import ImageFormat, Pixels
from ccgpu.models.stored_values import TooLarge, Unreadable, is_tiff, pillow_reads, read_stored, values_of
from ccgpu.train.data.masks import Counts, NoMask, counts_of, kind_of
from ccgpu.train.data.values import Values

_POINTER = b"version https://git-lfs"
_SAMPLES = 277  # TIFF's tag for the number of channels


@dataclass(frozen=True)
class Facts:
    """What an image or label file is.

    Attributes:
        problem: why the file cannot be decoded; None if it can. The other attributes mean nothing where it cannot.
        size: width and height of the image as it is stored, in pixels.
        decoded: whether the pixels were decoded; False for an image that is larger than was allowed.
        orientation: its EXIF orientation, 1..8.
        mask: the values of a label file; None for an image, and for a file that is no mask.
        wrong_kind: what a label file is, if it cannot be a mask; None if it can.
        transparent: whether it has pixels that are not opaque.
        bits: bits of a value: 8, 16, or 32 for integers and floats whose range is unknown.
        scalable: whether a range of values can be applied to the image.
        highest: the highest value of an image of 16 bits; of several channels, that value with its low byte set to 255.
        frames: images in the file, of which the first is read; 1 too for a JPEG with others for its viewer (MPO).
        unread: channels beside grey or red, green, blue and alpha, such as near infrared in a TIFF, which are not read
            as 8-bit RGB.
        no_rgb: why an image cannot be read as 8-bit RGB, such as a TIFF of five channels; None if it can.
        values: what the channels of an image hold as they are stored; None for a label file, and for an image whose
            values cannot be read exactly.
        unreadable: why they cannot; None if they can.
        digest: of all bytes of an image file, by which copies are found; empty for a label file.
    """

    problem: str | None = None
    size: tuple[int, int] = (0, 0)
    decoded: bool = True
    orientation: int = 1
    mask: Counts | None = None
    wrong_kind: str | None = None
    transparent: bool = False
    bits: int = 8
    scalable: bool = True
    highest: int = 0
    frames: int = 1
    unread: int = 0
    no_rgb: str | None = None
    values: Values | None = None
    unreadable: str | None = None
    digest: str = ""

    def as_plain(self) -> dict[str, Any]:
        """Return the facts as values that JSON can hold."""
        values = None if self.values is None else vars(self.values)
        mask = None if self.mask is None else self.mask.as_plain()
        return {**vars(self), "size": [*self.size], "mask": mask, "values": values}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Facts:
        """Return the facts with these plain values: the inverse of `as_plain`.

        Raises:
            TypeError, ValueError, KeyError, AttributeError: the values are no facts.
        """
        width, height = values["size"]
        mask = None if values["mask"] is None else Counts.from_plain(values["mask"])
        channels = None if values["values"] is None else Values.from_plain(values["values"])
        return cls(**{**values, "size": (int(width), int(height)), "mask": mask, "values": channels})


def facts_of(path: Path, *, is_label: bool, max_pixels: int = MAX_PIXELS) -> Facts:
    """Return what a file is, after decoding all of it.

    Args:
        path: the file.
        is_label: whether it is a label file, whose values are counted, or an image.
        max_pixels: largest image that is decoded.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            return Facts(problem=f"{kind_of_file(mode)}, not a regular file".removeprefix("the "))
        content = path.read_bytes()
    except OSError as error:
        return Facts(problem=error.strerror or str(error))
    if not content:
        return Facts(problem="empty file")
    with pillows_limit(max_pixels):
        found = _decode(content, is_label, max_pixels)
    if is_label or found.problem is not None:
        return found
    return replace(found, digest=hashlib.blake2b(content, digest_size=16).hexdigest())


def open_with_facts(
    path: Path,
    images: ImageFormat,
    *,
    value_range: tuple[float, float] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> tuple[Pixels, Facts]:
    """Return an image as `images.open` does, upright and its file checked, and what the file is.

    Raises:
        FileNotFoundError, BadImage, ModuleNotFoundError, ValueError: as `ImageFormat.open`.
    """
    if images.raw:
        pixels = images.open(path, value_range=value_range, max_pixels=max_pixels, check=True)
        return pixels, facts_of(path, is_label=False, max_pixels=max_pixels)
    decoded = decode_file(path, value_range=value_range, max_pixels=max_pixels, check=True)
    image = upright(as_rgb(path, decoded, value_range), decoded.orientation)
    try:
        return image, _of_decoded(decoded, None, None)
    except DECODE_ERRORS as error:  # of a further image in the file
        raise BadImage(f"read_image: path must be a whole image, got {path} ({error}); copy it again.") from error


def _decode(content: bytes, is_label: bool, max_pixels: int) -> Facts:
    try:
        image = open_header(io.BytesIO(content), FORMATS)
    except UnidentifiedImageError:
        if content.startswith(_POINTER):
            return Facts(problem="a pointer of Git LFS instead of the file; fetch it with: git lfs pull")
        return Facts(problem=f"no image file of {', '.join(FORMATS)}")
    except OSError as error:
        if not is_label and is_tiff(content):
            return _of_other_tiff(content, max_pixels)
        return Facts(problem=f"truncated or {error}")
    if image.width * image.height > max_pixels:
        return Facts(size=image.size, decoded=False)
    kind = str(image.format)
    try:
        mask, wrong = _mask_kind(image) if is_label else (None, None)
        decoded = decode(image, content)
        found = _of_decoded(decoded, mask, wrong)
        return found if is_label else _with_values(found, decoded, content, max_pixels)
    except DECODE_ERRORS as error:
        return Facts(problem=f"truncated or damaged {kind} file ({error})")


def _with_values(found: Facts, decoded: Decoded, content: bytes, max_pixels: int) -> Facts:
    """Return the facts of a decoded image with those of its values as they are stored.

    Raises:
        Any of `DECODE_ERRORS`: the file is truncated or damaged.
    """
    file = io.BytesIO(content)
    try:
        if pillow_reads(decoded.image, decoded.deep_colour):
            return replace(found, values=Values.of(values_of(decoded, file)))
        return replace(found, values=Values.of(read_stored(file, max_pixels)[0]))
    except (Unreadable, ModuleNotFoundError) as error:
        return replace(found, unreadable=str(error))


def _of_other_tiff(content: bytes, max_pixels: int) -> Facts:
    """Return the facts of a TIFF file of a kind that Pillow does not read, such as one of five channels."""
    try:
        pixels, orientation = read_stored(io.BytesIO(content), max_pixels)
    except TooLarge as error:
        return Facts(size=error.size, decoded=False)
    except (Unreadable, ModuleNotFoundError) as error:
        return Facts(problem=str(error))
    except DECODE_ERRORS as error:
        return Facts(problem=f"truncated or damaged TIFF file ({error})")
    values = Values.of(pixels)
    kind = ImageFormat(values.channels, raw=True, dtype=values.dtype)
    return Facts(
        size=(pixels.shape[1], pixels.shape[0]),
        orientation=orientation,
        bits=8 * pixels.dtype.itemsize,
        highest=int(max(values.highest)),
        no_rgb=f"a TIFF of {kind}, which cannot be read as 8-bit RGB",
        values=values,
    )


def _of_decoded(decoded: Decoded, kind: str | None, wrong: str | None) -> Facts:
    """Return the facts of a decoded file.

    Args:
        decoded: the file.
        kind: the kind of mask that a label file is; None for other files.
        wrong: why a label file cannot be a mask.
    """
    image = decoded.image
    size = image.size
    if image.format == "TIFF" and decoded.orientation >= 5:  # Pillow has turned it
        size = size[::-1]
    mask = None
    if kind is not None:
        try:
            mask = counts_of(image, kind)
        except NoMask as error:
            wrong = str(error)
    bits, highest = 8, 0
    if decoded.deep_colour:
        bits, highest = 16, int(np.asarray(image.convert("RGB")).max(initial=0)) * 256 + 255
    elif is_deep(image):
        bits, highest = (16, int(np.asarray(image).max(initial=0))) if has_16_bits(image) else (32, 0)
    return Facts(
        size=size,
        orientation=decoded.orientation,
        mask=mask,
        wrong_kind=wrong,
        transparent=has_alpha(image) and _is_transparent(image),
        bits=bits,
        scalable=decoded.scalable,
        highest=highest,
        no_rgb=f"a {MISREAD}" if is_misread(image) else None,
        unread=_unread(image),
        frames=1 if image.format == "MPO" else getattr(image, "n_frames", 1),
    )


def _mask_kind(image: ImageFile.ImageFile) -> tuple[str | None, str | None]:
    """Return the kind of mask that a label file is, or what else it is."""
    try:
        return kind_of(image), None
    except NoMask as error:
        return None, str(error)


def _unread(image: ImageFile.ImageFile) -> int:
    """Return how many channels of a TIFF file are not in the image that Pillow makes of it."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 0
    samples = int(image.tag_v2.get(_SAMPLES, 1))
    return max(0, samples - (3 if image.mode == "RGBX" else len(image.getbands())))


def _is_transparent(image: ImageFile.ImageFile) -> bool:
    lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
    return not isinstance(lowest, tuple) and lowest < 255
