"""Images as users have them: one or several, as paths, Pillow images, arrays or tensors."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
from PIL import Image
from torch import Tensor

from ccgpu.models.image_files import DECODE_ERRORS, BadImage, orientation_of
from ccgpu.models.image_format import ImageFormat, Pixels

Given: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
"""An image as users have it: a path, a Pillow image, an array (H, W, C) or a tensor (C, H, W)."""
Read: TypeAlias = tuple[Pixels, Path | None]
"""A decoded image, and its file if it has one."""
_DARK = 15  # highest value of 255 that 12 bits reach where 16 are expected
_DARK_ADVICE = "if its file has 16 bits of which fewer are used, pass their range, such as value_range=(0, 4095)"


def listed(images: Given | Iterable[Given]) -> tuple[list[Given], bool]:
    """Return the images, and whether several were given: a list or a batch of any length.

    Raises:
        TypeError: it is neither an image nor several.
    """
    if isinstance(images, (str, os.PathLike, Image.Image)):
        return [images], False
    if isinstance(images, (np.ndarray, Tensor)):
        return ([*images], True) if images.ndim == 4 else ([images], False)
    _check_kind(images)
    if not isinstance(images, Iterable) or isinstance(images, Mapping):
        raise TypeError(
            "Segmenter.predict: images must be a path, a Pillow image, an array, a tensor, or a list of these, got "
            f"{type(images).__name__}; pass one of these."
        )
    return list(images), True


def name_of(given: Sequence[Given], index: int, are_several: bool) -> str:
    """Return how a message names an image."""
    image = given[index]
    if isinstance(image, (str, os.PathLike)):
        return str(image)
    return f"image {index}" if are_several else "an image"


def read_given(given: Sequence[Given], are_several: bool, read: Callable[[Given], Read]) -> list[Read]:
    """Return the images that `read` gives for those of `listed`.

    Raises:
        BadImage: of several images some cannot be used; the message lists all of these.
        Whatever `read` raises, for one image.
    """
    found = []
    problems = []
    for index, image in enumerate(given):
        try:
            found.append(read(image))
        except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
            if not are_several:
                raise
            problems.append(f"{name_of(given, index, True)}: {error}")
    if problems:
        raise BadImage(
            f"Segmenter.predict: images must all be usable, got {len(problems)} of {len(given)} that are not; "
            "mend these or leave them out:\n" + "\n".join(problems)
        )
    return found


def read_one(
    image: Given,
    images: ImageFormat,
    *,
    value_range: tuple[float, float] | None,
    known_range: tuple[float, float] | None,
    max_pixels: int,
) -> Read:
    """Return an image as a network takes it, and its file.

    Args:
        image: the image.
        images: the network's format.
        value_range: the values that become 0 and 255, for this call.
        known_range: the range for files and Pillow images where `value_range` is None.
        max_pixels: largest file that is read.

    Raises:
        FileNotFoundError, BadImage, TypeError, ValueError, ModuleNotFoundError: it cannot be used.
    """
    known_range = known_range if value_range is None else value_range
    if isinstance(image, (str, os.PathLike)):
        path = _path(image)
        pixels = images.open(path, value_range=known_range, max_pixels=max_pixels, check=True)
        if known_range is None:
            _warn_of_dark(pixels, path)
        return pixels, path
    _check_kind(image)
    if isinstance(image, Image.Image):
        value_range = known_range
        try:
            image.load()
        except DECODE_ERRORS as error:
            raise BadImage(f"Segmenter.predict: image must decode, got {error}; open it again.") from error
        if orientation_of(image) != 1:
            raise ValueError(
                "Segmenter.predict: a Pillow image must be upright, got one with the EXIF orientation "
                f"{orientation_of(image)}; pass PIL.ImageOps.exif_transpose(image), or the path of its file."
            )
    return images.convert(image, value_range), None


def _check_kind(image: object) -> None:
    """Raise TypeError for the content of a file: as a list it would be an image for each of its bytes or lines."""
    if isinstance(image, (bytes, bytearray, memoryview)) or hasattr(image, "read"):
        opened = "file" if hasattr(image, "read") else "io.BytesIO(content)"
        raise TypeError(
            f"Segmenter.predict: images must be paths, Pillow images, arrays or tensors, got {type(image).__name__}; "
            f"pass PIL.Image.open({opened}) for the content of a file, a str or pathlib.Path for its path."
        )


def _path(image: str | os.PathLike[str]) -> Path:
    """Return the path of a file.

    Raises:
        BadImage: it is a folder or an address.
    """
    path = Path(image)
    if "://" in str(image):
        raise BadImage(
            f"Segmenter.predict: images must be files of this machine, got the address {image}; download it first."
        )
    if path.is_dir():
        raise BadImage(
            f"Segmenter.predict: images must be files, got the folder {path}; pass a list of files, such as "
            f'sorted(Path("{path}").glob("*.jpg")).'
        )
    return path


def _warn_of_dark(pixels: Pixels, path: Path) -> None:
    """Warn of an 8-bit image without bright pixels: likely the 10 or 12 bits of a camera in a file of 16."""
    if isinstance(pixels, Image.Image):
        bands = cast(Sequence[tuple[int, int]], pixels.getextrema())  # without a copy of a large image
        if max(high for _, high in bands) <= _DARK:
            # stacklevel: of the caller of predict
            warnings.warn(f"Segmenter.predict: {path} is nearly black; {_DARK_ADVICE}.", stacklevel=6)
