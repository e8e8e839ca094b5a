"""Synthetic streets: their classes, and what moves how from frame to frame of a video."""

import numpy as np
import pytest

from ccgpu.train.cityscapes import LABEL_IDS
from ccgpu.train.data.cityscapes_labels import CITYSCAPES, LABELS
from ccgpu.train.scenes.canvas import ID, Pose
from ccgpu.train.scenes.streets import Thing, _farthest_first, draw_frame, draw_scene
from ccgpu.train.scenes.traffic import person


@pytest.mark.parametrize("split", [1, 2])
def test_all_classes_are_in_a_split_with_a_share_worth_learning(split: int) -> None:
    counts = np.zeros(256)
    images = 18
    for index in range(images):
        pixels, ids = draw_scene((128, 256), np.random.default_rng((split, index)), index)
        assert pixels.dtype == ids.dtype == np.uint8
        assert pixels.std() > 15
        counts += np.bincount(LABEL_IDS[ids].ravel(), minlength=256)
    share = counts / counts.sum()
    shares = {label.name: share[label.id] for label in LABELS if label.id >= 0}
    assert {name: value for name in CITYSCAPES.names if (value := shares[name]) < 0.003} == {}
    assert shares["road"] < 0.5
    ignored = [label.name for label in LABELS if label.ignored and label.id >= 0 and shares[label.name] > 0]
    assert {"ego vehicle", "rectification border", "static", "rail track"} <= set(ignored)
    assert sum(shares.values()) == pytest.approx(1)  # no value outside the table


def test_three_scenes_in_a_row_hold_a_train_a_bus_and_a_truck() -> None:
    ids = {label.name: label.id for label in LABELS}
    for index, name in enumerate(("train", "bus", "truck")):
        seen = [ids[name] in draw_scene((64, 128), np.random.default_rng((5, n)), index)[1] for n in range(4)]
        assert sum(seen) >= 3, name


def frames(video: int, *travelled: float) -> list[np.ndarray]:
    """Return the label maps of frames of a video."""
    return [draw_frame((64, 128), (1, video), metres)[1] for metres in travelled]


def test_frames_of_a_video_show_the_same_street_from_farther_along() -> None:
    start, next_, far = frames(0, 0.0, 0.4, 4.0)
    other = frames(1, 0.0)[0]
    agreement = [float((start == ids).mean()) for ids in (next_, far, other)]
    assert agreement == sorted(agreement, reverse=True)
    assert 0.85 < agreement[0] < 1
    assert agreement[1] < agreement[0] - 0.05


@pytest.mark.parametrize("video", [1, 2, 4])
def test_things_ahead_come_nearer(video: int) -> None:
    before, after = (int((ids == ID["bicycle"]).sum()) for ids in frames(video, 0.0, 2.0))
    assert after > 1.2 * before > 0


def test_a_frame_is_a_function_of_video_and_place() -> None:
    first, again = (draw_frame((48, 96), (1, 2), 0.5) for _ in range(2))
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    moved = draw_frame((48, 96), (1, 2), 0.501)[0]  # a millimetre farther only the camera's noise differs
    assert not np.array_equal(first[0], moved)
    assert abs(first[0].astype(int) - moved).mean() < 8


def test_things_move_with_the_camera_or_towards_it() -> None:
    ahead, still, oncoming = (Thing(person, Pose(0, 10, 0), speed=speed) for speed in (1.0, 0.0, -0.5))
    assert [thing.when(4.0).pose.z - 4.0 for thing in (ahead, still, oncoming)] == [10, 6, 4]


def test_a_long_vehicle_hides_what_is_behind_and_not_what_is_beside_it() -> None:
    tram = Thing(person, Pose(-5, 8, 0), 30.0)
    outside, behind = Thing(person, Pose(-8, 12, 0)), Thing(person, Pose(-5, 40, 0))
    beside, before = Thing(person, Pose(-2, 12, 0), 4.5), Thing(person, Pose(-8, 6, 0))
    oncoming = Thing(person, Pose(-2, 28, np.pi), 8.0)
    assert oncoming.span() == (20, 28)
    things = [before, tram, beside, outside, oncoming, behind]
    order = [things[number] for number in _farthest_first(things)]
    assert order.index(outside) < order.index(tram) < order.index(oncoming) < order.index(beside)
    assert order.index(behind) < order.index(tram) < order.index(before)
