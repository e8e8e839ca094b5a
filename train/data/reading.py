"""Reading an image and its label file as training, evaluation and the check of the files see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ccgpu.models import image_files
from ccgpu.models.image_files import (
    DECODE_ERRORS,
    FORMATS,
    MAX_PIXELS,
    BadImage,
    as_stored,
    check_regular,
    load_image,
    open_header,
    too_large,
)
from ccgpu.models.image_format import ImageFormat, size_of, upright
from ccgpu.models.labels import IGNORE, Labels
from ccgpu.train.data import masks
from ccgpu.train.data.pairs import Pair

_LISTED = 10  # most values that a message lists


@dataclass(frozen=True)
class Reading:
    """How the files of a dataset are read; the settings of the same names.

    Attributes:
        exif: "stored" leaves all pixels where they are stored, "upright" turns image and label file each by its own
            EXIF orientation; None does so too, but refuses a pair whose orientations differ.
        value_range: values that become 0 and 255 in images of more than 8 bits; None: 0 and 65535.
        max_pixels: largest image that is read, in pixels.
        images: whether the images are read as 8-bit RGB or as they are stored; `Dataset.images`.
    """

    exif: str | None = None
    value_range: tuple[float, float] | None = None
    max_pixels: int = MAX_PIXELS
    images: ImageFormat = field(default_factory=ImageFormat)


def read_pair(pair: Pair, labels: Labels, reading: Reading | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return an image and its label map.

    Args:
        pair: the files.
        labels: the classes and the ids that the label file may contain.
        reading: how the files are read; None: the defaults of `Reading`.

    Returns:
        The image (H, W, C) as from `ImageFormat.open`, uint8 RGB unless it is raw, and train ids uint8 (H, W): 0..K-1,
        or 255 for pixels without a class and, where the pair has no label file, for all.

    Raises:
        FileNotFoundError: a file is missing.
        BadImage: a file cannot be decoded, sizes or EXIF orientations differ, the label is no mask (see `masks`) or
            contains a value that is not in `labels`. The message names the file.
    """
    how = Reading() if reading is None else reading
    image, orientation = how.images.open_stored(pair.image, value_range=how.value_range, max_pixels=how.max_pixels)
    if pair.label is None:
        pixels = np.asarray(image if how.exif == "stored" else upright(image, orientation))
        return pixels, np.full(pixels.shape[:2], IGNORE, dtype=np.uint8)
    label, kind, label_orientation = _open_label(pair.label, how.max_pixels, labels)
    if how.exif != "stored":
        if how.exif is None and orientation != label_orientation:
            raise BadImage(f"read_pair: {conflict(pair, orientation, label_orientation)}; {EXIF_ADVICE}.")
        image, label = upright(image, orientation), image_files.upright(label, label_orientation)
    size = size_of(image)[::-1]
    if size != label.size:
        raise BadImage(
            f"read_pair: label must have its image's size {times(size)}, got {times(label.size)} in "
            f"{pair.label}; copy both files again."
        )
    return np.asarray(image), _classes(pair.label, label, kind, labels)


def read_label(path: Path, labels: Labels, reading: Reading | None = None) -> np.ndarray:
    """Return a label map, train ids uint8 (H, W) as from `read_pair`; upright unless `reading` says stored.

    Raises:
        FileNotFoundError, BadImage: as `read_pair`.
    """
    how = Reading() if reading is None else reading
    label, kind, orientation = _open_label(path, how.max_pixels, labels)
    return _classes(path, label if how.exif == "stored" else image_files.upright(label, orientation), kind, labels)


def _classes(path: Path, label: Image.Image, kind: str, labels: Labels) -> np.ndarray:
    """Return the train ids of a decoded label file."""
    try:
        values = masks.values_of(label, kind, labels.coding)
    except masks.NoMask as error:
        raise BadImage(
            f"read_pair: label must be a mask of {labels.coding}, got {error} in {path}; {labels.hint}."
        ) from None
    most = len(labels.to_train) - 1
    classes = labels.to_train[np.minimum(values, most)]
    unknown = np.setdiff1d(values[(classes == IGNORE) | (values > most)], labels.known)
    if unknown.size:
        raise BadImage(
            f"read_pair: label must hold the {labels.coding} {labels.show(labels.known)}, got "
            f"{labels.show(unknown[:_LISTED])} in {path}; {labels.hint}."
        )
    return classes


EXIF_ADVICE = (
    "take --exif stored if the label files were drawn on the pixels as they are stored, --exif upright if they were "
    "drawn on the images as a viewer shows them"
)


def conflict(pair: Pair, orientation: int, label_orientation: int) -> str:
    """Return what the EXIF orientations of a pair, which differ, are."""
    of_label = "has none" if label_orientation == 1 else f"has {label_orientation}"
    return (
        f"EXIF orientation must be that of the label file, got {orientation} in {pair.image}, while {pair.label} "
        f"{of_label}"
    )


def _open_label(path: Path, max_pixels: int, labels: Labels) -> tuple[Image.Image, str, int]:
    """Return a label file's image, decoded and as it is stored, its kind of mask, and its EXIF orientation."""
    check_regular(path)
    try:
        with path.open("rb") as file:
            image = open_header(file, FORMATS)
            if image.width * image.height > max_pixels:
                raise BadImage(too_large(path, image.size, max_pixels))
            kind = masks.kind_of(image)
            orientation = load_image(image)
            return as_stored(image, image.format, orientation), kind, orientation
    except BadImage:
        raise
    except masks.NoMask as error:
        raise BadImage(f"read_pair: label must be {masks.DESCRIPTION}, got {error} in {path}; {labels.hint}.") from None
    except DECODE_ERRORS as error:
        raise BadImage(
            f"read_pair: label must be a whole image, got {path}, which does not decode ({error}); copy it again."
        ) from error


def times(size: Sequence[int]) -> str:
    """Return a size as text: (8, 6) -> "8x6"."""
    return "x".join(str(side) for side in size)
