"""Cutting videos into clips: all windows for training, every frame once for evaluation, no clip across a gap."""

from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccgpu.train.data.clips import Clip, evaluation_clips, training_clips
from ccgpu.train.data.pairs import Pair, find_by_name

CAMVID = Path(__file__).resolve().parents[4] / "shared" / "data" / "camvid"


def frame_of(name: str) -> tuple[str, int]:
    sequence, _, frame = name.rpartition("_")
    return sequence, int(frame.lstrip("f"))


def pairs_of(*names: str) -> list[Pair]:
    return [Pair(Path(f"{name}.jpg"), Path(f"{name}.png"), name) for name in names]


def frames(sequence: str, *numbers: int) -> list[Pair]:
    return pairs_of(*(f"{sequence}_{number:05d}" for number in numbers))


def numbers(clip: Clip) -> tuple[int, ...]:
    return tuple(frame_of(pair.name)[1] for pair in clip)


def test_training_clips_are_all_windows_of_a_stretch() -> None:
    pairs = frames("a", 30, 60, 90, 120)
    assert training_clips(pairs, 3, frame_of) == [tuple(pairs[:3]), tuple(pairs[1:])]
    assert training_clips(pairs[::-1], 3, frame_of) == training_clips(pairs, 3, frame_of)
    assert training_clips(pairs, 4, frame_of) == [tuple(pairs)]


def test_clips_never_cross_videos_or_gaps_but_tolerate_uneven_steps() -> None:
    pairs = frames("b", 1, 3, 5, 7) + frames("a", 0, 30, 59, 90, 120, 390, 420, 451) + frames("c", 8)
    clips = training_clips(pairs, 3, frame_of)
    assert [(frame_of(clip[0].name)[0], numbers(clip)) for clip in clips] == [
        ("a", (0, 30, 59)),
        ("a", (30, 59, 90)),
        ("a", (59, 90, 120)),
        ("a", (390, 420, 451)),
        ("b", (1, 3, 5)),
        ("b", (3, 5, 7)),
    ]


@pytest.mark.parametrize(
    ("step", "stretches"),
    [(45, [(0, 30, 60, 105, 135, 165)]), (46, [(0, 30, 60), (106, 136, 166)])],
)
def test_a_gap_is_more_than_one_and_a_half_of_the_usual_step(step: int, stretches: list[tuple[int, ...]]) -> None:
    pairs = frames("a", 0, 30, 60, 60 + step, 90 + step, 120 + step)
    assert [numbers(clip) for clip, _ in evaluation_clips(pairs, 100, frame_of)] == stretches


def test_a_gap_shows_in_a_video_of_three_frames() -> None:
    assert [numbers(clip) for clip in training_clips(frames("a", 0, 2, 100), 2, frame_of)] == [(0, 2)]
    assert [numbers(clip) for clip in training_clips(frames("a", 0, 100), 2, frame_of)] == [(0, 100)]


def test_the_last_evaluation_clip_begins_earlier_and_says_from_which_frame_it_counts() -> None:
    pairs = frames("a", *range(7)) + frames("b", *range(6)) + frames("c", 0, 1)
    assert [(numbers(clip), first) for clip, first in evaluation_clips(pairs, 3, frame_of)] == [
        ((0, 1, 2), 0),
        ((3, 4, 5), 0),
        ((4, 5, 6), 2),
        ((0, 1, 2), 0),
        ((3, 4, 5), 0),
        ((0, 1), 0),
    ]


def test_clips_of_one_are_the_images_in_their_order() -> None:
    pairs = pairs_of("b", "a", "no_video")
    assert training_clips(pairs, 1, None) == [(pair,) for pair in pairs]
    assert evaluation_clips(pairs, 1, None) == [((pair,), 0) for pair in pairs]
    assert training_clips(frames("b", 4, 2), 1, frame_of) == [(pair,) for pair in frames("b", 4, 2)]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 40), max_size=12), max_size=4),
    st.integers(1, 6),
    st.randoms(use_true_random=False),
)
def test_every_frame_is_counted_once_and_clips_follow_each_other(
    steps: list[list[int]], length: int, order: Random
) -> None:
    pairs = [
        pair
        for index, differences in enumerate(steps)
        for pair in frames(f"video{index}", *(sum(differences[:end]) for end in range(len(differences) + 1)))
    ]
    order.shuffle(pairs)
    clips = evaluation_clips(pairs, length, frame_of)
    counted = [pair.name for clip, first in clips for pair in clip[first:]]
    assert sorted(counted) == sorted(pair.name for pair in pairs)
    assert all(0 <= first < len(clip) <= length for clip, first in clips)
    windows = []
    for clip, _ in clips:
        assert len({frame_of(pair.name)[0] for pair in clip}) == 1
        assert list(numbers(clip)) == sorted(numbers(clip))
        windows += [clip] if len(clip) == length else []
    if windows:
        training = training_clips(pairs, length, frame_of)
        assert set(windows) <= set(training)
        assert len(set(training)) == len(training)
        assert {pair for clip in training for pair in clip} == {pair for clip in windows for pair in clip}
    elif pairs:
        with pytest.raises(ValueError, match=f"longest stretch of frames, .*got {length}"):
            training_clips(pairs, length, frame_of)


def test_clips_refuse_what_is_no_video() -> None:
    pairs = frames("a", 1, 2, 3)
    for build in (training_clips, evaluation_clips):
        with pytest.raises(ValueError, match=f"{build.__name__}: length must be 1, or more for videos, got 0"):
            build(pairs, 0, frame_of)
        with pytest.raises(ValueError, match="length must be 1, or more for videos, got 3; take single images"):
            build(pairs, 3, None)
        with pytest.raises(ValueError, match=r"got a_2\.jpg and a_00002\.jpg for frame 2 of 'a'"):
            build(pairs_of("a_2", "a_00002"), 2, frame_of)
    with pytest.raises(ValueError, match="longest stretch of frames, 3, got 4; take shorter clips"):
        training_clips(pairs, 4, frame_of)
    assert evaluation_clips(pairs, 4, frame_of) == [(tuple(pairs), 0)]


@pytest.mark.skipif(not CAMVID.exists(), reason="the CamVid images are not beside this repository")
@pytest.mark.parametrize(
    ("split", "stretches"),
    [
        ("train", {"0001TP": [62], "0006R0": [101], "0016E5": [68, 120, 16]}),
        ("val", {"0016E5": [101]}),
        ("test", {"0001TP": [62], "Seq05VD": [171]}),
    ],
)
def test_camvid_has_the_stretches_of_its_videos(split: str, stretches: dict[str, list[int]]) -> None:
    def camvid(name: str) -> tuple[str, int]:
        sequence, frame = name.split("_")
        return sequence, int(frame.lstrip("f"))

    pairs = find_by_name("find_pairs", CAMVID / split, CAMVID / f"{split}annot")
    found: dict[str, list[int]] = {}
    for clip, first in evaluation_clips(pairs, 1000, camvid):
        assert first == 0
        found.setdefault(camvid(clip[0].name)[0], []).append(len(clip))
    assert found == stretches
    assert len(training_clips(pairs, 5, camvid)) == sum(sum(n - 4 for n in each) for each in stretches.values())
