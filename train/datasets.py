"""The Cityscapes folder layout -> a checked list of pairs -> samples, and the order in which training sees
them.

    root/leftImg8bit/SPLIT/CITY/CITY_SEQUENCE_FRAME_leftImg8bit.png
    root/gtFine/SPLIT/CITY/CITY_SEQUENCE_FRAME_gtFine_labelIds.png

Training samples are positions in one endless stream. What lies at a position is a function of (seed,
position), so a resumed run, a run with another number of workers and a run of several processes see the same
pictures.
"""

import operator
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from ccgpu.train.labels import ID_TO_TRAIN_ID, LABEL_IDS

IMAGE_SUFFIX = "_leftImg8bit.png"
LABEL_SUFFIX = "_gtFine_labelIds.png"

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
_PNG_GREY, _PNG_PALETTE = 0, 3  # colour types with one channel
# On a network disk each of the 6000 files of a training split is a wait; on a local one (3000 pairs: 0.5 s)
# one thread would do.
_CHECK_THREADS = 8
_LISTED = 10  # problems a message spells out

TrainFunction = Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[torch.Tensor, torch.Tensor]]
EvaluationFunction = Callable[[np.ndarray, np.ndarray], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Pair:
    """A picture and its label file; ``name`` is CITY_SEQUENCE_FRAME."""

    image: Path
    label: Path
    name: str


def find_pairs(root: str | Path, split: str) -> list[Pair]:
    """Pictures of a split with their label files, sorted by name.

    Arguments:
        root: folder that holds ``leftImg8bit`` and ``gtFine``.
        split: name of the split's folder in both, such as "train".

    Returns:
        At least one pair; the files exist but have not been opened (see ``check_pairs``).

    Raises:
        FileNotFoundError: no such root, no such split (the message names those there are), no pictures in it,
            or a picture or label file without its partner (the message names them).
    """
    root = Path(root)
    images = _files_by_name(root, "leftImg8bit", split, IMAGE_SUFFIX)
    labels = _files_by_name(root, "gtFine", split, LABEL_SUFFIX)
    alone = [f"{images[key]} has no label file" for key in sorted(images.keys() - labels.keys())]
    alone += [f"{labels[key]} has no picture" for key in sorted(labels.keys() - images.keys())]
    if alone:
        raise FileNotFoundError(
            f"find_pairs: every picture of {split!r} must have its label file, got {len(alone)} of "
            f"{len(images | labels)} without; complete or remove them:\n{_listing(alone)}"
        )
    if not images:
        raise FileNotFoundError(
            f"find_pairs: split must hold pictures, got none in {root / 'leftImg8bit' / split}; "
            f"unpack them as CITY/CITY_SEQUENCE_FRAME{IMAGE_SUFFIX}."
        )
    return [Pair(images[key], labels[key], key[1]) for key in sorted(images)]


def _files_by_name(root: Path, kind: str, split: str, suffix: str) -> dict[tuple[str, str], Path]:
    if not root.is_dir():
        raise FileNotFoundError(f"find_pairs: root must be a folder, got {root}; give the data set's folder.")
    if not (root / kind).is_dir():
        raise FileNotFoundError(
            f"find_pairs: root must hold the folders leftImg8bit and gtFine, got no {kind} in {root}; "
            "unpack both archives into one folder."
        )
    if not split or not (root / kind / split).is_dir():
        there = ", ".join(sorted(path.name for path in (root / kind).iterdir() if path.is_dir())) or "none"
        raise FileNotFoundError(
            f"find_pairs: split must be a folder of {root / kind}, got {split!r}; choose one of: {there}."
        )
    paths = (root / kind / split).glob(f"*/*{suffix}")
    return {(path.parent.name, path.name.removesuffix(suffix)): path for path in paths}


def check_pairs(pairs: Sequence[Pair]) -> None:
    """Check all files of a data set in seconds, before a training that would meet a bad one hours later.

    Reads the first 33 bytes of each file (PNG signature and header) and its last 12 (the closing IEND chunk,
    which a truncated file lacks); it does not decode pixels. A label must be 8-bit grey or a palette, and as
    large as its picture.

    Arguments:
        pairs: what to check, from ``find_pairs``.

    Raises:
        ValueError: any file missing, unreadable, empty, truncated or not a PNG; sizes that differ; a label of
            another kind. One error for all problems, which lists the first ten and counts the rest.
    """
    with ThreadPoolExecutor(_CHECK_THREADS) as threads:
        problems = [problem for found in threads.map(_pair_problems, pairs) for problem in found]
    if problems:
        raise ValueError(
            f"check_pairs: pairs must be whole PNG files that belong together, got {len(problems)} problems "
            f"in {len(pairs)} pairs; copy these files again:\n{_listing(problems)}"
        )


def _pair_problems(pair: Pair) -> list[str]:
    problems = []
    headers = []
    for path in (pair.image, pair.label):
        try:
            headers.append(_png_header(path))
        except (OSError, ValueError) as error:
            problems.append(f"{path}: {error.strerror if isinstance(error, OSError) else error}")
    if problems:
        return problems
    (*image_size, _, _), (*label_size, depth, colour_type) = headers
    if image_size != label_size:
        problems.append(f"{pair.label}: {_times(label_size)} pixels, but the picture has {_times(image_size)}")
    if colour_type != _PNG_PALETTE and (colour_type, depth) != (_PNG_GREY, 8):
        problems.append(f"{pair.label}: not an 8-bit single-channel picture of label ids")
    return problems


def _png_header(path: Path) -> tuple[int, int, int, int]:
    """Width, height, bit depth and colour type; ValueError says what is wrong with the file."""
    with path.open("rb") as file:
        head = file.read(33)
        if not head:
            raise ValueError("empty file")
        if head[:8] != _PNG_SIGNATURE or (len(head) >= 16 and head[12:16] != b"IHDR"):
            raise ValueError("not a PNG file")
        if len(head) < 33 or not _reaches_end(file):
            raise ValueError("truncated PNG file")
    width, height, depth, colour_type = struct.unpack(">IIBB", head[16:26])
    if not width or not height:
        raise ValueError("a PNG file without pixels")
    return width, height, depth, colour_type


def _reaches_end(file: BinaryIO) -> bool:
    size = file.seek(0, 2)
    file.seek(size - len(_PNG_END))
    if file.read() == _PNG_END:
        return True
    # Something may follow the closing chunk: walk the chunks (length, type, data, checksum).
    position = len(_PNG_SIGNATURE)
    while position + 12 <= size:
        file.seek(position)
        length, kind = struct.unpack(">I4s", file.read(8))
        if kind == b"IEND":
            return True
        position += 12 + length
    return False


class BadPicture(ValueError):
    """A picture or label that cannot be used; the message names the file and what to do."""


def read_pair(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Decode a picture and its label.

    Grey, palette and 16-bit pictures become 8-bit RGB (the high byte of 16); an alpha channel is dropped.

    Arguments:
        pair: which files.

    Returns:
        uint8 (H, W, 3) RGB and uint8 (H, W) of train ids: 0..18, or 255 for what is not a class.

    Raises:
        FileNotFoundError: a file is missing.
        BadPicture: a file cannot be decoded, sizes differ, the label is not single-channel or holds a value
            that is not a Cityscapes label id (as files of train ids or colours do). The message names the
            file.
    """
    image = _rgb(_decode(pair.image))
    picture = _decode(pair.label)
    if picture.mode not in ("L", "P"):
        raise BadPicture(
            f"read_pair: label must be a single-channel 8-bit PNG, got mode {picture.mode} in {pair.label}; "
            f"use the *{LABEL_SUFFIX} files, not the colour files."
        )
    ids = np.asarray(picture)
    if ids.shape != image.shape[:2]:
        raise BadPicture(
            f"read_pair: label must have its picture's size {_times(image.shape[1::-1])}, "
            f"got {_times(picture.size)} in {pair.label}; copy both files again."
        )
    unknown = np.setdiff1d(ids, LABEL_IDS)
    if unknown.size:
        raise BadPicture(
            f"read_pair: label must hold Cityscapes label ids 0..{LABEL_IDS.max()}, got "
            f"{unknown[:_LISTED].tolist()} in {pair.label}; use the *{LABEL_SUFFIX} files, not train ids."
        )
    return image, ID_TO_TRAIN_ID[ids]


def _decode(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except FileNotFoundError:
        raise FileNotFoundError(f"read_pair: file must exist, got no {path}; run check_pairs first.") from None
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        # Pillow reports a broken PNG through any of these, depending on the chunk it breaks in.
        raise BadPicture(
            f"read_pair: file must be a whole picture, got {path}, which does not decode ({error}); copy it again."
        ) from error


def _rgb(picture: Image.Image) -> np.ndarray:
    if picture.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it at 255
        return np.repeat((np.asarray(picture) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    return np.asarray(picture.convert("RGB"))


class TrainStream(Dataset[dict[str, Any]]):
    """Training samples by position in an endless stream of shuffled epochs.

    Position s holds the picture number permutation(seed, s // n)[s % n] of the n pairs, augmented with
    ``numpy.random.default_rng((seed, s))``: nothing depends on what was read before.

    Arguments:
        pairs: the pictures, at least one.
        transform: (image, label, generator) -> (image tensor, label tensor), such as ``TrainTransform``.
        seed: 0 or more.
        length: number of positions, 0 or more: iterations x global batch.

    Raises:
        ValueError: no pairs, a negative seed or length.

    A sample is a dict: ``image`` float32 (3, H, W), ``label`` int64 (H, W), ``name`` str.
    """

    def __init__(self, pairs: Sequence[Pair], transform: TrainFunction, seed: int, length: int) -> None:
        for name, value, least in (("pairs", len(pairs), 1), ("seed", seed, 0), ("length", length, 0)):
            if value < least:
                raise ValueError(f"TrainStream: {name} must be {least} or more, got {value}; correct it.")
        self.pairs = list(pairs)
        self.transform = transform
        self.seed = seed
        self.length = length

    def __len__(self) -> int:
        return self.length

    def pair_at(self, position: int) -> Pair:
        """The pair at a position of the stream, 0..length-1 (IndexError beyond)."""
        position = operator.index(position)
        if not 0 <= position < self.length:
            raise IndexError(f"TrainStream: position must be in 0..{self.length - 1}, got {position}; enlarge length.")
        epoch, offset = divmod(position, len(self.pairs))
        # The 1 keeps the shuffle of epoch e apart from the augmentation at position e.
        order = np.random.default_rng((self.seed, epoch, 1)).permutation(len(self.pairs))
        return self.pairs[order[offset]]

    def __getitem__(self, position: int) -> dict[str, Any]:
        pair = self.pair_at(position)
        image, label = self.transform(*read_pair(pair), np.random.default_rng((self.seed, position)))
        return {"image": image, "label": label, "name": pair.name}


class StreamSampler(Sampler[list[int]]):
    """Stream positions of each iteration, for ``DataLoader(..., batch_sampler=...)``.

    The global batch of iteration i is the positions i * batch_size .. (i + 1) * batch_size - 1, of which each
    process takes its contiguous part. To resume at an iteration is to start there.

    Arguments:
        start: first iteration.
        stop: iteration after the last; start <= stop.
        batch_size: global batch, divisible by world_size.
        rank: this process, 0..world_size-1.
        world_size: number of processes.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(self, start: int, stop: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= start <= stop:
            raise ValueError(f"StreamSampler: start must be in 0..stop ({stop}), got {start}; start earlier.")
        _check_rank("StreamSampler", rank, world_size)
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"StreamSampler: batch_size must be a positive multiple of world_size ({world_size}), "
                f"got {batch_size}; choose a global batch that the processes can share equally."
            )
        self.start = start
        self.stop = stop
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // self.world_size
        for iteration in range(self.start, self.stop):
            first = iteration * self.batch_size + self.rank * share
            yield list(range(first, first + share))


class EvaluationSet(Dataset[dict[str, Any]]):
    """Every picture once, in order, at its own size; samples as in ``TrainStream``.

    Arguments:
        pairs: the pictures.
        transform: (image, label) -> (image tensor, label tensor), such as ``EvaluationTransform``.
    """

    def __init__(self, pairs: Sequence[Pair], transform: EvaluationFunction) -> None:
        self.pairs = list(pairs)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.pairs[index]
        image, label = self.transform(*read_pair(pair))
        return {"image": image, "label": label, "name": pair.name}


def evaluation_indices(length: int, rank: int = 0, world_size: int = 1) -> range:
    """Samples that a process evaluates: every world_size-th from rank on, for ``DataLoader(...,
    sampler=...)``.

    Over all processes each sample occurs once; the last ones get fewer where the length does not divide (none
    is repeated to fill up, which would count its pixels twice).

    Raises:
        ValueError: a negative length, a rank outside 0..world_size-1.
    """
    if length < 0:
        raise ValueError(f"evaluation_indices: length must be 0 or more, got {length}; give len(data_set).")
    _check_rank("evaluation_indices", rank, world_size)
    return range(rank, length, world_size)


def _check_rank(caller: str, rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"{caller}: rank must be in 0..world_size-1 ({world_size - 1}), got {rank}; pass both.")


def _listing(problems: Sequence[str]) -> str:
    lines = [f"  {problem}" for problem in problems[:_LISTED]]
    if len(problems) > _LISTED:
        lines.append(f"  ... and {len(problems) - _LISTED} more")
    return "\n".join(lines)


def _times(size: Sequence[int]) -> str:
    return "x".join(str(side) for side in size)
