"""Datasets and samplers for torch's DataLoader: the samples of training and evaluation, and their order.

A sample is a clip; an image is a clip of one frame. Training samples come from one endless stream. The sample at a
position of the stream is a function of (seed, position), so a resumed run, a run with another number of workers and a
run of several processes see the same images.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ccgpu.models.image_files import BadImage
from ccgpu.models.labels import Labels
from ccgpu.train.data.clips import Clip
from ccgpu.train.data.reading import Reading, read_pair

TrainFunction = Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[torch.Tensor, torch.Tensor]]
EvaluationFunction = Callable[[np.ndarray, np.ndarray], tuple[torch.Tensor, torch.Tensor]]


def read_clip(
    clip: Clip, labels: Labels, *, video: bool, reading: Reading | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the frames of a clip and their label maps.

    Args:
        clip: the frames, of one size; a single one unless `video`.
        labels: the classes, and the ids that the label files may contain.
        video: whether the result has an axis T.
        reading: how the files are read; None: the defaults of `Reading`.

    Returns:
        The image (H, W, C) and train ids uint8 (H, W), or (T, H, W, C) and (T, H, W).

    Raises:
        FileNotFoundError: a file is missing.
        BadImage: as in `read_pair`, or the frames differ in size.
        ValueError: the clip has several frames, and `video` is False.
    """
    if not video:
        if len(clip) != 1:
            raise ValueError(f"read_clip: clip must be one image, got {len(clip)} frames; pass video=True.")
        return read_pair(clip[0], labels, reading)
    frames, frame_labels = zip(*(read_pair(pair, labels, reading) for pair in clip), strict=True)
    for pair, frame in zip(clip, frames, strict=True):
        if frame.shape != frames[0].shape:
            raise BadImage(
                f"read_clip: frames of a clip must have one size, got {_size(frames[0])} in {clip[0].image} and "
                f"{_size(frame)} in {pair.image}; resize one, or train on single images."
            )
    return np.stack(frames), np.stack(frame_labels)


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"


class TrainStream(Dataset[dict[str, Any]]):
    """Training samples by position in an endless stream of shuffled epochs.

    Position s is the clip number permutation(seed, s // n)[s % n] of the n clips, augmented with
    `numpy.random.default_rng((seed, s))`. It does not depend on which positions were read before.

    Args:
        clips: at least one; all of the same length if `video`, else of one frame.
        labels: the classes, and the ids that the label files may contain.
        transform: (image, label, generator) -> (image tensor, label tensor), such as `TrainTransform`.
        seed: 0 or more.
        length: number of positions, 0 or more: iterations x global batch.
        video: whether samples have an axis T.
        reading: how the files are read; None: the defaults of `Reading`.

    A sample is a dict: `image` float32 (C, H, W) or (C, T, H, W), `label` int64 (H, W) or (T, H, W), and `names`, a
    tuple of the names of the T frames.

    Raises:
        ValueError: there are no clips, or seed or length is negative.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        labels: Labels,
        transform: TrainFunction,
        seed: int,
        length: int,
        *,
        video: bool = False,
        reading: Reading | None = None,
    ) -> None:
        for name, value, least in (("clips", len(clips), 1), ("seed", seed, 0), ("length", length, 0)):
            if value < least:
                raise ValueError(f"TrainStream: {name} must be {least} or more, got {value}; correct it.")
        self.clips = list(clips)
        self.labels = labels
        self.transform = transform
        self.seed = seed
        self.length = length
        self.video = video
        self.reading = reading

    def __len__(self) -> int:
        return self.length

    def clip_at(self, position: int) -> Clip:
        """Return the clip at a position of the stream; IndexError outside of 0..length-1."""
        position = operator.index(position)
        if not 0 <= position < self.length:
            raise IndexError(f"TrainStream: position must be in 0..{self.length - 1}, got {position}; enlarge length.")
        epoch, offset = divmod(position, len(self.clips))
        # The 1 keeps the shuffle of epoch e from drawing the same random numbers as the augmentation at position e.
        order = np.random.default_rng((self.seed, epoch, 1)).permutation(len(self.clips))
        return self.clips[order[offset]]

    def __getitem__(self, position: int) -> dict[str, Any]:
        clip = self.clip_at(position)
        pixels = read_clip(clip, self.labels, video=self.video, reading=self.reading)
        image, label = self.transform(*pixels, np.random.default_rng((self.seed, position)))
        return {"image": image, "label": label, "names": tuple(pair.name for pair in clip)}


class StreamSampler(Sampler[list[int]]):
    """Stream positions of each iteration, for `DataLoader(..., batch_sampler=...)`.

    The global batch of iteration i consists of the positions i * batch_size .. (i + 1) * batch_size - 1; each process
    takes a contiguous part of it. To resume a run at an iteration, pass it as start.

    Args:
        start: first iteration.
        stop: iteration after the last; start <= stop.
        batch_size: global batch, divisible by world_size.
        rank: this process, 0..world_size-1.
        world_size: number of processes.

    Raises:
        ValueError: an argument is out of its range.
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
    """The evaluation samples: every clip once, in order, at its own size.

    Args:
        clips: (clip, first) from `evaluation_clips`; frames before number `first` are evaluated in another clip.
        labels: the classes, and the ids that the label files may contain.
        transform: (image, label) -> (image tensor, label tensor), such as `EvaluationTransform`.
        video: whether samples have an axis T.
        reading: how the files are read; None: the defaults of `Reading`.

    A sample is a dict as in `TrainStream`, and has `first`, an int, too. Clips may differ in length.
    """

    def __init__(
        self,
        clips: Sequence[tuple[Clip, int]],
        labels: Labels,
        transform: EvaluationFunction,
        *,
        video: bool = False,
        reading: Reading | None = None,
    ) -> None:
        self.clips = list(clips)
        self.labels = labels
        self.transform = transform
        self.video = video
        self.reading = reading

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        clip, first = self.clips[index]
        image, label = self.transform(*read_clip(clip, self.labels, video=self.video, reading=self.reading))
        return {"image": image, "label": label, "names": tuple(pair.name for pair in clip), "first": first}


def evaluation_indices(length: int, rank: int = 0, world_size: int = 1) -> range:
    """Return the indices of the samples that a process evaluates: rank, rank + world_size, ...

    They are for `DataLoader(..., sampler=...)`. Over all processes each sample occurs once. Where the length is not
    divisible, the last processes get fewer samples: repeating some would count their pixels twice.

    Raises:
        ValueError: length is negative, or rank is outside 0..world_size-1.
    """
    if length < 0:
        raise ValueError(f"evaluation_indices: length must be 0 or more, got {length}; give len(dataset).")
    _check_rank("evaluation_indices", rank, world_size)
    return range(rank, length, world_size)


def _check_rank(caller: str, rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"{caller}: rank must be in 0..world_size-1 ({world_size - 1}), got {rank}; pass both.")
