"""Synthetic people: determined by the generator, with left and right from the person's own view."""

import numpy as np
import pytest

from ccgpu.train.scenes.canvas import Camera, Canvas, Light, facing
from ccgpu.train.scenes.people import PARTS, Limb, Person, draw_people


def test_a_limb_is_covered_from_share_to_share() -> None:
    arm = Limb("left", ((0.0, 2.0), (0.0, 1.0), (1.0, 1.0)))
    assert arm.until(1.0) == [((0.0, 2.0), (0.0, 1.0)), ((0.0, 1.0), (1.0, 1.0))]
    assert arm.until(0.25) == [((0.0, 2.0), (0.0, 1.5))]
    assert arm.until(0.75, 0.5) == [((0.0, 1.0), (0.5, 1.0))]
    assert arm.until(0.5, 0.5) == []


@pytest.mark.parametrize("size", [(96, 64), (64, 96), (33, 47)])
def test_people_are_a_function_of_the_generator_in_the_size_asked_for(size: tuple[int, int]) -> None:
    pixels, parts = draw_people(size, np.random.default_rng(1))
    assert (pixels.shape, parts.shape) == ((*size, 3), size)
    assert pixels.dtype == parts.dtype == np.uint8
    again = draw_people(size, np.random.default_rng(1))
    assert np.array_equal(pixels, again[0])
    assert np.array_equal(parts, again[1])
    assert not np.array_equal(pixels, draw_people(size, np.random.default_rng(2))[0])


def test_left_is_the_persons_own() -> None:
    """The left side of a person is on the right of the image if the person faces the camera, else on the left."""
    camera = Camera(width=120, height=160, focal=80, centre=60, horizon=75, eye=1.0, bend=0)
    light = Light(sun=1, haze=(0, 0, 0), sight=1e9, shade=1)
    seen = []
    for seed in range(20):
        canvas = Canvas(camera, light, np.zeros((160, 120, 3), np.uint8), np.zeros((160, 120), np.uint8))
        person = Person(canvas, facing(0, 1), np.random.default_rng(seed))
        person.paint()
        left, right = (
            np.argwhere(np.asarray(canvas.ids) == PARTS.index(f"{side}-shoe"))[:, 1].mean()
            for side in ("left", "right")
        )
        assert (left > right) == person.seen
        assert (PARTS.index("face") in np.asarray(canvas.ids)) == person.seen
        seen.append(person.seen)
    assert 2 <= seen.count(False) <= 10
