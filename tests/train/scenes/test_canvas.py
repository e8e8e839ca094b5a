"""Camera, poses and polygons against geometry by hand."""

import numpy as np

from ccgpu.train.cityscapes import LABEL_IDS
from ccgpu.train.data.cityscapes_labels import LABELS
from ccgpu.train.scenes.canvas import ID, Camera, Canvas, Light, Pose, by_id, disc, facing, patches, void_borders


def test_ids_by_name_fall_back_on_the_cityscapes_label() -> None:
    assert len(set(ID.values())) == len(ID)
    table = by_id({"pole": 5, "car": 6, "van": 7}, 9)
    found = {name: int(table[ID[name]]) for name in ("pole", "street lamp", "car", "van", "hedge", "sky")}
    assert found == {"pole": 5, "street lamp": 5, "car": 6, "van": 7, "hedge": 9, "sky": 9}
    for label in LABELS:
        assert label.id < 0 or LABEL_IDS[ID[label.name]] == label.id
    assert LABEL_IDS[ID["hedge"]] == LABEL_IDS[ID["vegetation"]]


def canvas() -> Canvas:
    """Return a canvas whose camera is 1.5 m above the ground; at a distance of 10 m a metre is 10 pixels."""
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


def test_pose_turns_and_moves_local_points() -> None:
    local = [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert np.allclose(Pose(5, 9, 0).world(local), [(5, 0, 10), (6, 0, 9), (5, 1, 9)])
    assert np.allclose(Pose(5, 9, np.pi / 2).world(local), [(6, 0, 9), (5, 0, 8), (5, 1, 9)])
    assert np.allclose(facing(5, 9).upright([(2, 3)]), [(7, 3, 9)])


def test_polygon_paints_image_and_ids_alike() -> None:
    painted = canvas()
    painted.polygon(facing(0, 10).upright([(-1, 0), (1, 0), (1, 2), (-1, 2)]), (10, 200, 30), 26)
    ids = np.asarray(painted.ids)
    assert np.argwhere(ids == 26).min(0).tolist() == [45, 90]
    assert np.argwhere(ids == 26).max(0).tolist() == [65, 110]
    assert (np.asarray(painted.image)[ids == 26] == (10, 200, 30)).all()
    assert (np.asarray(painted.image)[ids != 26] == 0).all()
    painted.polygon(facing(0, 10).upright(disc((0, 1), 0.5)), (255, 0, 0), None)
    assert (np.asarray(painted.ids) == ids).all()
    assert np.asarray(painted.image)[55, 100].tolist() == [255, 0, 0]


def test_void_borders_leave_out_both_sides_of_a_border() -> None:
    ids = np.zeros((5, 7), np.uint8)
    ids[2:, 4:] = 7
    v = 255
    rows = [[0] * 7, [0, 0, 0, v, v, v, v], [0, 0, 0, v, v, v, v], [0, 0, 0, v, v, 7, 7], [0, 0, 0, v, v, 7, 7]]
    assert void_borders(ids, 1, v).tolist() == rows
    assert void_borders(ids[:2], 2, v).tolist() == [[0] * 7] * 2


def test_box_shows_the_faces_towards_the_camera_only() -> None:
    seen = {x: set(canvas().box(Pose(x, 10, 0), (0, 4), 1, (0, 2), (90, 90, 90), 26)) for x in (-5, 0, 5)}
    assert seen == {-5: {"rear", "right"}, 0: {"rear"}, 5: {"rear", "left"}}
    assert set(canvas().box(Pose(5, 10, np.pi), (0, 4), 1, (0, 2), (90, 90, 90), 26)) == {"front", "right"}
    rear = canvas().box(Pose(0, 10, 0), (0, 4), 1, (0, 2), (90, 90, 90), 26)["rear"]
    assert rear.tolist() == [[-1, 0, 10], [1, 0, 10], [1, 2, 10], [-1, 2, 10]]
    assert patches(rear, np.array([[0.5, 1, 0, 0.25]])).tolist() == [
        [[0, 0, 10], [1, 0, 10], [1, 0.5, 10], [0, 0.5, 10]]
    ]


def test_polygons_are_clipped_in_front_of_the_camera() -> None:
    camera = Camera(200, 100, 100, 100, 50, 1.5, bend=0, z=10)
    strip = np.array([(1, 0, 6), (1, 0, 20), (1, 2, 20), (1, 2, 6)], dtype=float)
    away = np.array((0.0, 0.0, 10.0))
    assert np.allclose(camera.ahead(strip), [(1, 0, 10.3), (1, 0, 20), (1, 2, 20), (1, 2, 10.3)])
    assert camera.ahead(strip - away - (0, 0, 1)).shape == (0, 3)
    assert np.array_equal(camera.ahead(strip + away), strip + away)
    painted = canvas()
    painted.camera = camera
    painted.polygon(strip, (10, 200, 30), 26)
    assert np.argwhere(np.asarray(painted.ids) == 26).min(0).tolist() == [1, 110]  # from its far end to the border
    assert np.argwhere(np.asarray(painted.ids) == 26).max(0).tolist() == [99, 199]
    assert set(painted.box(Pose(-5, 6, 0), (0, 12), 1, (0, 2), (90, 90, 90), 26)) == {"right"}
    assert painted.box(Pose(-5, 2, 0), (0, 6), 1, (0, 2), (90, 90, 90), 26) == {}


def test_far_things_take_the_colour_of_the_haze() -> None:
    painted = canvas()
    painted.light = Light(1, (200.0, 200.0, 200.0), 10.0, 0.5)
    painted.polygon(facing(0, 10).upright([(-1, 0), (1, 0), (1, 2), (-1, 2)]), (0, 100, 200), 26)
    haze = 1 - np.exp(-1)
    expected = [round(200 * haze), round(100 + 100 * haze), 200]
    assert np.asarray(painted.image)[55, 100].tolist() == expected
