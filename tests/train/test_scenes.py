import json
from pathlib import Path

import numpy as np
import pytest

from ccgpu.train import scenes
from ccgpu.train.datasets import check_pairs, find_pairs, read_pair
from ccgpu.train.labels import CLASS_NAMES, LABELS
from ccgpu.train.scene_canvas import Camera, Canvas, Frame, Light, disc, facing, patches
from ccgpu.train.scene_traffic import person
from ccgpu.train.scenes import Thing, _farthest_first, draw_scene, write_scenes

SMALL = (48, 96)


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.*"))}


def test_write_scenes_makes_a_data_set_in_the_official_layout(tmp_path: Path) -> None:
    root = write_scenes(tmp_path / "scenes", splits={"train": 3, "val": 2}, size=SMALL)
    assert root == tmp_path / "scenes"
    for split, number in (("train", 3), ("val", 2)):
        pairs = find_pairs(root, split)
        check_pairs(pairs)
        assert [pair.name for pair in pairs] == [f"drawn_{index:06d}_000019" for index in range(number)]
        for pair in pairs:
            image, label = read_pair(pair)
            assert image.shape == (*SMALL, 3)
            assert label.shape == SMALL
    assert json.loads((root / "scenes.json").read_text())["splits"] == {"train": 3, "val": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_write_scenes_is_a_function_of_seed_split_and_index(tmp_path: Path) -> None:
    first = files_of(write_scenes(tmp_path / "first", splits={"train": 2, "val": 2}, size=SMALL))
    again = files_of(write_scenes(tmp_path / "again", splits={"val": 1, "train": 3}, size=SMALL))
    other = files_of(write_scenes(tmp_path / "other", splits={"train": 1}, size=SMALL, seed=1))
    shared = [name for name in first.keys() & again.keys() if name.endswith(".png")]
    assert len(shared) == 6
    assert all(first[name] == again[name] for name in shared)
    pictures = [data for name, data in {**first, **other}.items() if "leftImg8bit" in name]
    assert len(set(pictures)) == len(pictures) == 4
    name = next(name for name in other if "leftImg8bit" in name)
    assert first[name] != other[name]


@pytest.mark.parametrize("split", [1, 2])
def test_all_classes_are_in_a_split_with_a_share_worth_learning(split: int) -> None:
    counts = np.zeros(256)
    pictures = 18
    for index in range(pictures):
        pixels, ids = draw_scene((128, 256), np.random.default_rng((split, index)), index)
        assert pixels.dtype == ids.dtype == np.uint8
        assert pixels.std() > 15
        counts += np.bincount(ids.ravel(), minlength=256)
    share = counts / counts.sum()
    shares = {label.name: share[label.id] for label in LABELS if label.id >= 0}
    assert {name: value for name in CLASS_NAMES if (value := shares[name]) < 0.003} == {}
    assert shares["road"] < 0.5
    ignored = [label.name for label in LABELS if label.ignored and label.id >= 0 and shares[label.name] > 0]
    assert {"ego vehicle", "rectification border", "static", "rail track"} <= set(ignored)
    assert sum(shares.values()) == pytest.approx(1)  # no value outside the table


def test_three_scenes_in_a_row_hold_a_train_a_bus_and_a_truck() -> None:
    ids = {label.name: label.id for label in LABELS}
    for index, name in enumerate(("train", "bus", "truck")):
        seen = [ids[name] in draw_scene((64, 128), np.random.default_rng((5, n)), index)[1] for n in range(4)]
        assert sum(seen) >= 3, name


def test_write_scenes_keeps_what_it_wrote_before(tmp_path: Path) -> None:
    root = write_scenes(tmp_path / "scenes", splits={"train": 1}, size=SMALL)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert write_scenes(str(root), splits={"train": 1}, size=SMALL) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_write_scenes_never_overwrites_something_else(tmp_path: Path) -> None:
    root = write_scenes(tmp_path / "scenes", splits={"train": 1}, size=SMALL)
    with pytest.raises(ValueError, match=r"root must be empty or hold the scenes .*'seed': 1.* got .*'seed': 0"):
        write_scenes(root, splits={"train": 1}, size=SMALL, seed=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    for other in (tmp_path / "mine", tmp_path / "mine" / "notes.txt"):
        with pytest.raises(ValueError, match="got no drawn scenes in"):
            write_scenes(other, splits={"train": 1}, size=SMALL)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    assert len(find_pairs(write_scenes(tmp_path / "empty", splits={"train": 1}, size=SMALL), "train")) == 1


def test_write_scenes_leaves_nothing_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(size: tuple[int, int], generator: np.random.Generator, index: int) -> None:
        if index == 1:
            raise OSError(28, "No space left on device")
        return draw_scene(size, generator, index)

    monkeypatch.setattr(scenes, "draw_scene", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_scenes(tmp_path / "scenes", splits={"train": 2}, size=SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"splits": {}}, "splits must name at least one split"),
        ({"splits": {"train": 0}}, r"1 or more pictures, got \{'train': 0\}"),
        ({"splits": {"../val": 1}}, "splits must name"),
        ({"size": (16, 96)}, r"size must be \(height, width\) of 32 or more, got \(16, 96\)"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
    ],
)
def test_write_scenes_refuses_bad_arguments(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_scenes(tmp_path / "scenes", **{"splits": {"train": 1}, "size": SMALL, **arguments})
    assert list(tmp_path.iterdir()) == []


def canvas() -> Canvas:
    """Camera 1.5 m above the ground; at 10 m a metre is 10 pixels."""
    camera = Camera(width=200, height=100, focal=100, centre=100, horizon=50, eye=1.5, bend=0)
    light = Light(sun=1, haze=(200, 200, 200), sight=1e9, shade=0.5)
    return Canvas(camera, light, np.zeros((100, 200, 3), np.uint8), np.zeros((100, 200), np.uint8))


def test_camera_projects_by_similar_triangles() -> None:
    camera = canvas().camera
    points = np.array([(0, 1.5, 7), (1, 1.5, 10), (-2, 0, 20), (0, 3, 10)])
    assert camera.project(points).tolist() == [[100, 50], [110, 50], [90, 57.5], [100, 35]]
    curved = Camera(200, 100, 100, 100, 50, 1.5, bend=0.01)
    assert curved.project(np.array([[1.0, 0, 10]])).tolist() == [[120, 65]]


def test_frame_turns_what_stands_in_it() -> None:
    local = [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert np.allclose(Frame(5, 9, 0).world(local), [(5, 0, 10), (6, 0, 9), (5, 1, 9)])
    assert np.allclose(Frame(5, 9, np.pi / 2).world(local), [(6, 0, 9), (5, 0, 8), (5, 1, 9)])
    assert np.allclose(facing(5, 9).upright([(2, 3)]), [(7, 3, 9)])


def test_polygon_paints_picture_and_ids_alike() -> None:
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
    seen = {x: set(canvas().box(Frame(x, 10, 0), (0, 4), 1, (0, 2), (90, 90, 90), 26)) for x in (-5, 0, 5)}
    assert seen == {-5: {"rear", "right"}, 0: {"rear"}, 5: {"rear", "left"}}
    assert set(canvas().box(Frame(5, 10, np.pi), (0, 4), 1, (0, 2), (90, 90, 90), 26)) == {"front", "right"}
    rear = canvas().box(Frame(0, 10, 0), (0, 4), 1, (0, 2), (90, 90, 90), 26)["rear"]
    assert rear.tolist() == [[-1, 0, 10], [1, 0, 10], [1, 2, 10], [-1, 2, 10]]
    assert patches(rear, np.array([[0.5, 1, 0, 0.25]])).tolist() == [
        [[0, 0, 10], [1, 0, 10], [1, 0.5, 10], [0, 0.5, 10]]
    ]


def test_far_things_take_the_colour_of_the_haze() -> None:
    paper = canvas()
    paper.light = Light(1, (200.0, 200.0, 200.0), 10.0, 0.5)
    paper.polygon(facing(0, 10).upright([(-1, 0), (1, 0), (1, 2), (-1, 2)]), (0, 100, 200), 26)
    haze = 1 - np.exp(-1)
    expected = [round(200 * haze), round(100 + 100 * haze), 200]
    assert np.asarray(paper.image)[55, 100].tolist() == expected


def test_a_long_vehicle_hides_what_is_behind_and_not_what_is_beside_it() -> None:
    tram = Thing(person, Frame(-5, 8, 0), 30.0)
    outside, behind = Thing(person, Frame(-8, 12, 0)), Thing(person, Frame(-5, 40, 0))
    beside, before = Thing(person, Frame(-2, 12, 0), 4.5), Thing(person, Frame(-8, 6, 0))
    oncoming = Thing(person, Frame(-2, 28, np.pi), 8.0)
    assert oncoming.span() == (20, 28)
    order = _farthest_first([before, tram, beside, outside, oncoming, behind])
    assert order.index(outside) < order.index(tram) < order.index(oncoming) < order.index(beside)
    assert order.index(behind) < order.index(tram) < order.index(before)
