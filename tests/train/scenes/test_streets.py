import numpy as np
import pytest

from ccgpu.train.cityscapes import LABEL_IDS
from ccgpu.train.data.cityscapes_labels import CITYSCAPES, LABELS
from ccgpu.train.scenes.canvas import ID, Camera, Canvas, Light, Pose, by_id, disc, facing, patches
from ccgpu.train.scenes.streets import Thing, _farthest_first, draw_frame, draw_scene
from ccgpu.train.scenes.traffic import person


def test_ids_by_name_fall_back_on_the_cityscapes_label() -> None:
    assert len(set(ID.values())) == len(ID)
    table = by_id({"pole": 5, "car": 6, "van": 7}, 9)
    found = {name: int(table[ID[name]]) for name in ("pole", "street lamp", "car", "van", "hedge", "sky")}
    assert found == {"pole": 5, "street lamp": 5, "car": 6, "van": 7, "hedge": 9, "sky": 9}
    for label in LABELS:
        assert label.id < 0 or LABEL_IDS[ID[label.name]] == label.id
    assert LABEL_IDS[ID["hedge"]] == LABEL_IDS[ID["vegetation"]]


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
    """Label ids of frames of a video."""
    return [draw_frame((64, 128), (1, video), metres)[1] for metres in travelled]


def test_frames_of_a_video_show_the_same_street_from_farther_along() -> None:
    start, next_, far = frames(0, 0.0, 0.4, 4.0)
    other = frames(1, 0.0)[0]
    agreement = [float((start == ids).mean()) for ids in (next_, far, other)]
    assert agreement == sorted(agreement, reverse=True)
    assert 0.85 < agreement[0] < 1
    assert agreement[1] < agreement[0] - 0.05


@pytest.mark.parametrize("video", [1, 2, 4])
def test_what_stands_in_view_comes_nearer(video: int) -> None:
    before, after = (int((ids == ID["bicycle"]).sum()) for ids in frames(video, 0.0, 2.0))
    assert after > 1.2 * before > 0


def test_a_frame_is_a_function_of_video_and_place() -> None:
    first, again = (draw_frame((48, 96), (1, 2), 0.5) for _ in range(2))
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    moved = draw_frame((48, 96), (1, 2), 0.501)[0]  # a millimetre: another noise of the camera, nothing else
    assert not np.array_equal(first[0], moved)
    assert abs(first[0].astype(int) - moved).mean() < 8


def test_things_move_with_the_camera_or_towards_it() -> None:
    ahead, still, oncoming = (Thing(person, Pose(0, 10, 0), speed=speed) for speed in (1.0, 0.0, -0.5))
    assert [thing.when(4.0).pose.z - 4.0 for thing in (ahead, still, oncoming)] == [10, 6, 4]


def canvas() -> Canvas:
    """Camera 1.5 m above the ground; at 10 m a metre is 10 pixels."""
    camera = Camera(width=200, height=100, focal=100, centre=100, horizon=50, eye=1.5, bend=0)
    light = Light(sun=1, haze=(200, 200, 200), sight=1e9, shade=0.5)
    return Canvas(camera, light, np.zeros((100, 200, 3), np.uint8), np.zeros((100, 200), np.uint8))


def test_camera_projects_by_similar_triangles() -> None:
    camera = canvas().camera
    points = np.array([(0, 1.5, 7), (1, 1.5, 10), (-2, 0, 20), (0, 3, 10)])
    assert camera.project(points).tolist() == [[100, 50], [110, 50], [90, 57.5], [100, 35]]
    moved = Camera(200, 100, 100, 100, 50, 1.5, bend=0, z=3)
    assert np.array_equal(moved.project(points + np.array((0, 0, 3))), camera.project(points))
    curved = Camera(200, 100, 100, 100, 50, 1.5, bend=0.01)
    assert curved.project(np.array([[1.0, 0, 10]])).tolist() == [[120, 65]]


def test_frame_turns_what_stands_in_it() -> None:
    local = [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert np.allclose(Pose(5, 9, 0).world(local), [(5, 0, 10), (6, 0, 9), (5, 1, 9)])
    assert np.allclose(Pose(5, 9, np.pi / 2).world(local), [(6, 0, 9), (5, 0, 8), (5, 1, 9)])
    assert np.allclose(facing(5, 9).upright([(2, 3)]), [(7, 3, 9)])


def test_polygon_paints_image_and_ids_alike() -> None:
    paper = canvas()
    paper.polygon(facing(0, 10).upright([(-1, 0), (1, 0), (1, 2), (-1, 2)]), (10, 200, 30), 26)
    ids = np.asarray(paper.ids)
    assert np.argwhere(ids == 26).min(0).tolist() == [45, 90]
    assert np.argwhere(ids == 26).max(0).tolist() == [65, 110]
    assert (np.asarray(paper.image)[ids == 26] == (10, 200, 30)).all()
    assert (np.asarray(paper.image)[ids != 26] == 0).all()
    paper.polygon(facing(0, 10).upright(disc((0, 1), 0.5)), (255, 0, 0), None)
    assert (np.asarray(paper.ids) == ids).all()
    assert np.asarray(paper.image)[55, 100].tolist() == [255, 0, 0]


def test_box_shows_the_faces_towards_the_camera_only() -> None:
    seen = {x: set(canvas().box(Pose(x, 10, 0), (0, 4), 1, (0, 2), (90, 90, 90), 26)) for x in (-5, 0, 5)}
    assert seen == {-5: {"rear", "right"}, 0: {"rear"}, 5: {"rear", "left"}}
    assert set(canvas().box(Pose(5, 10, np.pi), (0, 4), 1, (0, 2), (90, 90, 90), 26)) == {"front", "right"}
    rear = canvas().box(Pose(0, 10, 0), (0, 4), 1, (0, 2), (90, 90, 90), 26)["rear"]
    assert rear.tolist() == [[-1, 0, 10], [1, 0, 10], [1, 2, 10], [-1, 2, 10]]
    assert patches(rear, np.array([[0.5, 1, 0, 0.25]])).tolist() == [
        [[0, 0, 10], [1, 0, 10], [1, 0.5, 10], [0, 0.5, 10]]
    ]


def test_what_is_behind_the_camera_is_cut_off() -> None:
    camera = Camera(200, 100, 100, 100, 50, 1.5, bend=0, z=10)
    strip = np.array([(1, 0, 6), (1, 0, 20), (1, 2, 20), (1, 2, 6)], dtype=float)
    away = np.array((0.0, 0.0, 10.0))
    assert np.allclose(camera.ahead(strip), [(1, 0, 10.3), (1, 0, 20), (1, 2, 20), (1, 2, 10.3)])
    assert camera.ahead(strip - away - (0, 0, 1)).shape == (0, 3)
    assert np.array_equal(camera.ahead(strip + away), strip + away)
    paper = canvas()
    paper.camera = camera
    paper.polygon(strip, (10, 200, 30), 26)
    assert np.argwhere(np.asarray(paper.ids) == 26).min(0).tolist() == [1, 110]  # from its far end to the border
    assert np.argwhere(np.asarray(paper.ids) == 26).max(0).tolist() == [99, 199]
    assert set(paper.box(Pose(-5, 6, 0), (0, 12), 1, (0, 2), (90, 90, 90), 26)) == {"right"}
    assert paper.box(Pose(-5, 2, 0), (0, 6), 1, (0, 2), (90, 90, 90), 26) == {}


def test_far_things_take_the_colour_of_the_haze() -> None:
    paper = canvas()
    paper.light = Light(1, (200.0, 200.0, 200.0), 10.0, 0.5)
    paper.polygon(facing(0, 10).upright([(-1, 0), (1, 0), (1, 2), (-1, 2)]), (0, 100, 200), 26)
    haze = 1 - np.exp(-1)
    expected = [round(200 * haze), round(100 + 100 * haze), 200]
    assert np.asarray(paper.image)[55, 100].tolist() == expected


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
