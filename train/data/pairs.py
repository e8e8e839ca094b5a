"""Images of a dataset and their label files: find them by name, check all files quickly, and read a pair.

Images are PNG or JPEG files, label maps PNG files with one channel. An EXIF orientation is not applied, because label
maps belong to the pixels as stored. (`models/image_files.py` reads users' own images, of any format, and turns them
upright.)
"""

import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile

from ccgpu.models.image_files import DECODE_ERRORS, BadImage, grey_from_16_bits
from ccgpu.models.labels import IGNORE, Labels

_IMAGE_FORMATS, _LABEL_FORMATS = ("PNG", "JPEG"), ("PNG",)
_PNG_SIGNATURE, _JPEG_SIGNATURE = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_PNG_END, _JPEG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82", b"\xff\xd9"
_JPEG_TAIL = 1 << 16  # bytes at the end that are searched for the end marker; cameras write a few after it
# Several, because opening each of the 6000 files of a training split takes long on a network disk; on a local disk one
# thread would do.
_CHECK_THREADS = 8
_LISTED = 10  # most problems that a message lists


@dataclass(frozen=True)
class Pair:
    """An image, its label file (None if it has none) and its name, which is unique in its folder."""

    image: Path
    label: Path | None
    name: str


def find_by_name(
    function: str,
    images: Path,
    labels: Path | None,
    image_suffixes: Sequence[str] = (".jpg", ".jpeg", ".png"),
    label_suffix: str = ".png",
    depth: int = 0,
) -> list[Pair]:
    """Return the images of a folder with the label files of the same name in another, sorted by subfolder and name.

    The name of an image is its file name without the suffix, which may be upper or lower case (`a.JPG` is image `a`).
    Hidden files and files with other suffixes are ignored.

    Args:
        function: name of the caller, for messages.
        images: folder of the images.
        labels: folder of the label files; None: find images only.
        image_suffixes: endings of image files.
        label_suffix: ending of label files.
        depth: number of subfolders above the files: 1 for `images/CITY/NAME.png`, with equal CITY for both.

    Returns:
        At least one pair; the files exist, but have not been opened (see `check_pairs`).

    Raises:
        FileNotFoundError: there is no such folder (the message names the existing ones), it holds no images, or an
            image or label file lacks its partner (the message names them).
        OSError: a folder cannot be read.
        ValueError: two files have the same name, such as a.jpg and a.png.
    """
    image_files = _files_by_name(function, "images", images, image_suffixes, depth)
    if labels is None:
        label_files = {}
    else:
        label_files = _files_by_name(function, "label files", labels, (label_suffix,), depth)
        alone = [f"{image_files[key]} has no label file" for key in sorted(image_files.keys() - label_files.keys())]
        alone += [f"{label_files[key]} has no image" for key in sorted(label_files.keys() - image_files.keys())]
        if alone:
            raise FileNotFoundError(
                f"{function}: every image of {images} must have its label file in {labels}, got {len(alone)} of "
                f"{len(image_files | label_files)} without; complete or remove them:\n{_listing(alone)}"
            )
    if not image_files:
        place = images / "/".join("*" * depth)
        raise FileNotFoundError(
            f"{function}: split must hold images, got none named *({'|'.join(image_suffixes)}) in {place}; "
            "unpack them there or choose another split."
        )
    return [Pair(image_files[key], label_files.get(key), key[1]) for key in sorted(image_files)]


def _files_by_name(
    function: str, kind: str, folder: Path, suffixes: Sequence[str], depth: int
) -> dict[tuple[str, str], Path]:
    """Return (subfolder, name) -> file."""
    if not folder.is_dir():
        above = next(parent for parent in folder.parents if parent.is_dir())
        missing = folder.relative_to(above).parts[0]
        there = sorted(path.name for path in above.iterdir() if path.is_dir() and not path.name.startswith("."))
        raise FileNotFoundError(
            f"{function}: {kind} must lie in {folder}, got no folder {missing!r} in {above}; correct the dataset's "
            f"folder or the split. Folders there:\n{_listing(there) or '  none'}"
        )
    found: dict[tuple[str, str], Path] = {}
    twice = []
    for path in _entries(folder, depth):
        suffix = next((suffix for suffix in suffixes if path.name.lower().endswith(suffix.lower())), None)
        if suffix is None:
            continue
        key = path.relative_to(folder).parent.as_posix(), path.name[: -len(suffix)]
        if key in found:
            twice.append(f"{found[key]} and {path.name}")
        found[key] = path
    if twice:
        raise ValueError(
            f"{function}: {kind} must have different names, got {len(twice)} names twice; "
            f"remove one file of each:\n{_listing(twice)}"
        )
    return found


def _entries(folder: Path, depth: int) -> Iterator[Path]:
    """Yield the entries `depth` levels below, sorted, without hidden ones. (glob would skip unreadable folders.)"""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if depth == 0:
            yield path
        elif path.is_dir():
            yield from _entries(path, depth - 1)


def check_pairs(pairs: Sequence[Pair]) -> None:
    """Check all files of a dataset in seconds, so that training does not meet a broken file hours later.

    Pixels are not decoded. Only the header and the end of each file are read: a truncated file lacks the closing IEND
    chunk of a PNG or the end marker of a JPEG (whatever follows these is ignored). A label file must be a PNG with
    8-bit grey or a palette of any depth, and have the size of its image.

    Args:
        pairs: from `find_by_name`.

    Raises:
        ValueError: a file is missing, unreadable, empty, truncated or neither PNG nor JPEG; sizes differ; a label file
            is of another kind. One error lists the first ten problems and counts the rest.
    """
    with ThreadPoolExecutor(_CHECK_THREADS) as threads:
        problems = [problem for found in threads.map(_pair_problems, pairs) for problem in found]
    if problems:
        raise ValueError(
            f"check_pairs: pairs must be whole PNG or JPEG files that belong together, got {len(problems)} problems "
            f"in {len(pairs)} pairs; copy or convert these files again:\n{_listing(problems)}"
        )


def _pair_problems(pair: Pair) -> list[str]:
    problems = []
    headers = []
    for path in (pair.image, pair.label) if pair.label else (pair.image,):
        try:
            headers.append(_header(path))
        except (OSError, ValueError) as error:
            problems.append(f"{path}: {error.strerror if isinstance(error, OSError) else error}")
    if problems or pair.label is None:
        return problems
    (image_size, _), (label_size, is_label) = headers
    if image_size != label_size:
        problems.append(f"{pair.label}: {_times(label_size)} pixels, but the image has {_times(image_size)}")
    if not is_label:
        problems.append(f"{pair.label}: not a PNG of 8-bit grey or a palette")
    return problems


def _header(path: Path) -> tuple[tuple[int, int], bool]:
    """Return an image file's (width, height), and whether it can be a label file; a ValueError says what is wrong."""
    with path.open("rb") as file:
        signature = file.read(8)
        if not signature:
            raise ValueError("empty file")
        is_png = signature == _PNG_SIGNATURE
        if not is_png and not signature.startswith(_JPEG_SIGNATURE):
            raise ValueError("neither a PNG nor a JPEG file")
        kind = "PNG" if is_png else "JPEG"
        try:
            image = Image.open(file, formats=(kind,))  # reads up to the first pixels
        except Image.DecompressionBombError as error:
            raise ValueError(str(error)) from error
        except DECODE_ERRORS as error:
            raise ValueError(f"truncated or damaged {kind} file") from error
        if not (_png_ends(file) if is_png else _jpeg_ends(file)):
            raise ValueError(f"truncated {kind} file")
        return image.size, _can_be_label(image)


def _can_be_label(image: ImageFile.ImageFile) -> bool:
    """Return whether the pixel values of an image that is open but not loaded can be label ids.

    The values of grey images of 1, 2 or 4 bits cannot, because Pillow scales them to 0..255.
    """
    codings = [tile[3] for tile in image.tile]
    return image.format == "PNG" and (image.mode == "P" or (image.mode, codings) == ("L", ["L"]))


def _png_ends(file: BinaryIO) -> bool:
    """Return whether a PNG file has its closing chunk, whatever follows it."""
    size = file.seek(0, 2)
    file.seek(size - len(_PNG_END))
    if file.read() == _PNG_END:
        return True
    # Something follows the closing chunk, or there is none: walk through the chunks (length, type, data, checksum).
    position = len(_PNG_SIGNATURE)
    while position + 12 <= size:
        file.seek(position)
        length, kind = struct.unpack(">I4s", file.read(8))
        if kind == b"IEND":
            return True
        position += 12 + length
    return False


def _jpeg_ends(file: BinaryIO) -> bool:
    """Return whether a JPEG file has its end marker; Pillow has read the file up to the end of the header.

    The header is not searched, because a camera's file may have a thumbnail there, with an end marker of its own.
    """
    pixels, size = file.tell(), file.seek(0, 2)
    for start in (max(pixels, size - _JPEG_TAIL), pixels):
        file.seek(start)
        if _JPEG_END in file.read():
            return True
    return False


def read_pair(pair: Pair, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Return an image and its label map.

    Grey, palette, CMYK and 16-bit images become 8-bit RGB (the high byte of 16 bits); an alpha channel is dropped.

    Args:
        pair: the files.
        labels: the classes and the ids that the label file may contain.

    Returns:
        uint8 (H, W, 3) RGB and train ids uint8 (H, W): 0..K-1, or 255 for pixels without a class and, where the pair
        has no label file, for all.

    Raises:
        FileNotFoundError: a file is missing.
        BadImage: a file cannot be decoded, sizes differ, the label is not single-channel or contains a
            value that is not in `labels`. The message names the file.
    """
    decoded, _ = _decode(pair.image, _IMAGE_FORMATS)
    image = _rgb(decoded)
    if pair.label is None:
        return image, np.full(image.shape[:2], IGNORE, dtype=np.uint8)
    label, is_label = _decode(pair.label, _LABEL_FORMATS)
    if not is_label:
        raise BadImage(
            f"read_pair: label must be a PNG of 8-bit grey or a palette, got mode {label.mode} in {pair.label}; "
            f"{labels.hint}."
        )
    ids = np.asarray(label)
    if ids.shape != image.shape[:2]:
        raise BadImage(
            f"read_pair: label must have its image's size {_times(decoded.size)}, "
            f"got {_times(label.size)} in {pair.label}; copy both files again."
        )
    unknown = np.setdiff1d(np.flatnonzero(np.bincount(ids.ravel())), labels.known)
    if unknown.size:
        raise BadImage(
            f"read_pair: label must hold the ids {_ranges(labels.known)}, got "
            f"{unknown[:_LISTED].tolist()} in {pair.label}; {labels.hint}."
        )
    return image, labels.to_train[ids]


def _decode(path: Path, formats: tuple[str, ...]) -> tuple[Image.Image, bool]:
    """Return the decoded image, and whether the file can be a label file."""
    try:
        with Image.open(path, formats=formats) as image:
            can_be_label = _can_be_label(image)
            image.load()
            return image, can_be_label
    except FileNotFoundError:
        raise FileNotFoundError(f"read_pair: file must exist, got no {path}; put it back.") from None
    except DECODE_ERRORS as error:
        raise BadImage(
            f"read_pair: file must be a whole {' or '.join(formats)} image, got {path}, which does not decode "
            f"({error}); copy it again."
        ) from error


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        return grey_from_16_bits(np.asarray(image))
    return np.asarray(image.convert("RGB"))


def _ranges(values: np.ndarray) -> str:
    """Return ascending integers as text: [0, 1, 2, 255] -> "0..2, 255"."""
    runs = np.split(values, np.flatnonzero(np.diff(values) != 1) + 1)
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)


def _listing(problems: Sequence[str]) -> str:
    lines = [f"  {problem}" for problem in problems[:_LISTED]]
    if len(problems) > _LISTED:
        lines.append(f"  ... and {len(problems) - _LISTED} more")
    return "\n".join(lines)


def _times(size: Sequence[int]) -> str:
    return "x".join(str(side) for side in size)
