"""Cutting the labelled frames of videos into clips of consecutive frames, for training and for evaluation.

A *stretch* is a sequence of frames of one video without a gap: the step from one frame number to the next is at most
1.5 times the median step of that video. Clips never cross a gap. Pass the images of one split at a time: between the
images of two splits there may be no gap, and clips would cross from one split to the other.
"""

import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence

from ccgpu.train.data.pairs import Pair

Clip = tuple[Pair, ...]
"""Frames in temporal order; a single image is a clip of one frame."""
FrameOf = Callable[[str], tuple[str, int]]
"""Name of an image -> its video and frame number."""

# CamVid's labelled frames are 30 apart, sometimes 29 or 31; its gaps are 270 and more.
_GAP = 1.5


def training_clips(pairs: Sequence[Pair], length: int, frame_of: FrameOf | None) -> list[Clip]:
    """Return every window of `length` consecutive frames, sorted by video and time.

    Args:
        pairs: the images of one split.
        length: frames of a clip, 1 or more; 1 gives each image by itself, in the order of `pairs`.
        frame_of: video and frame number of an image; may be None for length 1.

    Returns:
        n - length + 1 clips for each stretch of n frames, none for a stretch that is shorter than a clip.

    Raises:
        ValueError: length is below 1; the images are no videos, or two are the same frame; no stretch is long enough.
    """
    if length == 1:
        return [(pair,) for pair in pairs]
    found = _stretches("training_clips", pairs, length, frame_of)
    clips = [tuple(frames[i : i + length]) for frames in found for i in range(len(frames) - length + 1)]
    if not clips:
        longest = max((len(frames) for frames in found), default=0)
        raise ValueError(
            f"training_clips: length must be at most the length of the longest stretch of frames, {longest}, got "
            f"{length}; take shorter clips."
        )
    return clips


def evaluation_clips(pairs: Sequence[Pair], length: int, frame_of: FrameOf | None) -> list[tuple[Clip, int]]:
    """Return clips of up to `length` frames, as (clip, first), in which each image is evaluated once.

    The last clip of a stretch begins early enough to have `length` frames; its frames before number `first` are
    evaluated in the clip before. A stretch of fewer frames is one shorter clip.

    Args:
        pairs: the images of one split.
        length: frames of a clip, 1 or more; 1 gives each image by itself, in the order of `pairs`.
        frame_of: video and frame number of an image; may be None for length 1.

    Raises:
        ValueError: length is below 1; the images are no videos, or two are the same frame.
    """
    if length == 1:
        return [((pair,), 0) for pair in pairs]
    clips = []
    for frames in _stretches("evaluation_clips", pairs, length, frame_of):
        for counted in range(0, len(frames), length):
            start = max(0, min(counted, len(frames) - length))
            clips.append((tuple(frames[start : start + length]), counted - start))
    return clips


def _stretches(function: str, pairs: Sequence[Pair], length: int, frame_of: FrameOf | None) -> list[list[Pair]]:
    if length < 1 or frame_of is None:
        raise ValueError(f"{function}: length must be 1, or more for videos, got {length}; take single images.")
    videos: defaultdict[str, dict[int, Pair]] = defaultdict(dict)
    for pair in pairs:
        name, number = frame_of(pair.name)
        if number in videos[name]:
            raise ValueError(
                f"{function}: pairs must be different frames, got {videos[name][number].image} and {pair.image} for "
                f"frame {number} of {name!r}; give one split at a time."
            )
        videos[name][number] = pair
    return [frames for name in sorted(videos) for frames in _without_gaps(videos[name])]


def _without_gaps(frames: dict[int, Pair]) -> list[list[Pair]]:
    numbers = sorted(frames)
    steps = [after - before for before, after in itertools.pairwise(numbers)]
    # The lower median, because the longer of two steps may be a gap.
    limit = _GAP * statistics.median_low(steps) if steps else 0
    found = [[frames[numbers[0]]]]
    for number, step in zip(numbers[1:], steps, strict=True):
        if step > limit:
            found.append([])
        found[-1].append(frames[number])
    return found
