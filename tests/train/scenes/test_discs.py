"""Discs and squares: the labels follow from the image alone, and distances are those of plain loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ccgpu.train.scenes.discs import CLASSES, MARKERS, Scene, draw_scene

KINDS = [(1, 1), (4, 1), (8, 1), (1, 3), (3, 2)]


def scene(seed: int, markers: int, frames: int, size: tuple[int, int] = (96, 128)) -> Scene:
    return draw_scene(size, np.random.default_rng(seed), markers=markers, frames=frames)


def nearest(pixels: np.ndarray, colours: list[tuple[int, int, int]]) -> np.ndarray:
    """Return the index of the colour that is nearest to each pixel, -1 where none is within 40."""
    distances = np.linalg.norm(pixels[..., None, :].astype(float) - np.array(colours, float), axis=-1)
    return np.where(distances.min(-1) < 40, distances.argmin(-1), -1)


@pytest.mark.parametrize(("markers", "frames"), KINDS)
def test_the_generator_determines_the_scene(markers: int, frames: int) -> None:
    first, again, other = (scene(seed, markers, frames) for seed in (0, 0, 1))
    assert (first.pixels == again.pixels).all()
    assert (first.labels == again.labels).all()
    assert first.squares == again.squares
    assert (first.pixels != other.pixels).any()
    assert first.pixels.shape == (frames, 96, 128, 3)
    assert first.labels.shape == first.owners.shape == (frames, 96, 128)


@pytest.mark.parametrize(("markers", "frames"), KINDS)
def test_labels_follow_from_the_colours_of_the_image(markers: int, frames: int) -> None:
    """Whoever sees the whole image can tell each disc's class: by its colour the square's frame, then its inside."""
    discs = 0
    for seed in range(6):
        found = scene(seed, markers, frames)
        kinds = [square.marker for square in found.squares]
        assert len({*kinds}) == len(kinds) <= markers
        assert {*kinds} <= {*range(markers)}
        shown = {}
        for square in found.squares:
            side, inside = square.side, slice(square.border, -square.border)
            place = found.pixels[square.frame, square.top : square.top + side, square.left : square.left + side]
            assert place.shape == (side, side, 3)
            inner = place[inside, inside]
            border = np.ones((side, side), bool)
            border[inside, inside] = False
            marker, label = (
                nearest(np.median(place[border], 0), [*MARKERS]),
                nearest(np.median(inner, (0, 1)), [colour for _, colour in CLASSES]),
            )
            shown[int(marker)] = int(label) + 1
        assert shown == {square.marker: square.label for square in found.squares}
        on_disc = found.labels > 0
        assert (on_disc == (found.owners >= 0)).all()
        markers_of = nearest(found.pixels, [*MARKERS])
        own = np.array(kinds)[found.owners[on_disc]]
        assert (markers_of[on_disc] == own).mean() > 0.999  # but for noise
        wanted = [shown[int(kind)] for kind in own]
        assert (found.labels[on_disc] == wanted).all()
        discs += int(on_disc.sum())
        for square in found.squares:  # nothing covers a square
            rows, columns = (slice(start, start + square.side) for start in (square.top, square.left))
            assert not on_disc[square.frame, rows, columns].any()
        if frames > 1:  # the squares lie in one frame, the discs in all others
            home = found.squares[0].frame
            assert [bool(frame.any()) for frame in on_disc] == [frame != home for frame in range(frames)]
            assert {square.frame for square in found.squares} == {home}
    assert discs > 6 * 500


def test_all_classes_markers_and_frames_occur_alike() -> None:
    found = [scene(seed, 4, 3) for seed in range(200)]
    labels = np.bincount([square.label for one in found for square in one.squares], minlength=5)
    assert labels[0] == 0
    assert labels[1:].min() > 90  # of 125 expected
    assert np.bincount([len(one.squares) for one in found], minlength=5)[1:].min() > 30  # of 50
    markers = np.bincount([square.marker for one in found for square in one.squares], minlength=4)
    assert markers.min() > 90  # of 125
    assert np.bincount([one.squares[0].frame for one in found], minlength=3).min() > 45  # of 67


@pytest.mark.parametrize(("markers", "frames"), [(2, 1), (1, 3)])
def test_offsets_are_the_least_distances_along_each_axis(markers: int, frames: int) -> None:
    found = scene(3, markers, frames, (64, 80))
    offsets = found.offsets()
    assert offsets.shape == (3, frames, 64, 80)
    assert (offsets[:, found.owners < 0] == -1).all()
    inside = [*zip(*np.nonzero(found.owners >= 0), strict=True)]
    for pixel in inside[:: max(len(inside) // 200, 1)]:
        square = found.squares[found.owners[pixel]]
        covered = itertools.product(range(square.side), repeat=2)
        cells = np.array([(square.frame, square.top + y, square.left + x) for y, x in covered])
        assert offsets[(slice(None), *pixel)].tolist() == np.abs(cells - pixel).min(0).tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (63, 128)}, r"size must be \(height, width\) of 64 or more, got \(63, 128\)"),
        ({"markers": 8}, r"size must have room for 8 squares of 24 pixels, got \(64, 64\)"),
        ({"markers": 0}, "markers must be 1 to 8, got 0"),
        ({"markers": 9}, "markers must be 1 to 8, got 9"),
        ({"frames": 0}, "frames must be 1 or more, got 0"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, object], message: str) -> None:
    arguments = {"size": (64, 64), "generator": np.random.default_rng(0), **changes}
    with pytest.raises(ValueError, match=f"draw_scene: {message}"):
        draw_scene(**arguments)  # type: ignore[arg-type]


def test_the_smallest_image_has_room_for_all_squares() -> None:
    for seed in range(50):
        squares = scene(seed, 8, 1, (72, 72)).squares
        for one, other in itertools.combinations(squares, 2):
            assert max(abs(one.top - other.top), abs(one.left - other.left)) >= one.side
        assert all(0 <= start <= 72 - square.side for square in squares for start in (square.top, square.left))
