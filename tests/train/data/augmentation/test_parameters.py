"""The parameters that are drawn for a sample: their distributions against plain renderings, and what they do."""

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from ccgpu.models.normalisation import Normalise
from ccgpu.train.data.augmentation.crops import is_mixed
from ccgpu.train.data.augmentation.geometry import crop_image, crop_label
from ccgpu.train.data.augmentation.photometric import distort
from ccgpu.train.data.transforms import Parameters, TrainTransform, scale_steps

ALL: dict[str, Any] = {"photometric": True, "random_rotation": 20.0, "cat_max_ratio": 0.75}


def test_options_leave_the_random_numbers_before_them_as_they_are() -> None:
    label = np.random.default_rng(0).integers(0, 2, (40, 60), dtype=np.uint8)
    plain = TrainTransform((16, 20))
    for seed in range(30):
        expected = plain.draw(label, np.random.default_rng(seed))
        assert expected == Parameters(expected.factor, expected.window, 1, expected.flipped, None)
        assert expected.window.angle == 0
        every = dataclasses.replace(plain, **ALL).draw(label, np.random.default_rng(seed))
        assert every.tries == 1  # of random noise, every crop is mixed
        assert every == dataclasses.replace(
            expected, window=dataclasses.replace(expected.window, angle=every.window.angle), distortion=every.distortion
        )
        assert 0 < abs(every.window.angle) <= 20
        turned = dataclasses.replace(plain, random_rotation=20.0).draw(label, np.random.default_rng(seed))
        assert turned.window == every.window


def test_a_sample_is_what_its_parameters_say() -> None:
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    label = np.kron(generator.integers(0, 4, (3, 4), dtype=np.uint8), np.ones((10, 10), np.uint8))
    exchange = np.arange(256, dtype=np.uint8)
    exchange[[1, 2]] = 2, 1
    transform = TrainTransform((24, 36), (0.5, 1.5), exchange=exchange, **ALL)
    flips = set()
    for seed in range(12):
        drawn = transform.draw(label, np.random.default_rng(seed))
        pixels, classes = transform(image, label, np.random.default_rng(seed))
        flips.add(drawn.flipped)
        if drawn.flipped:
            pixels, classes = pixels.flip(-1), classes.flip(-1)
        crop, inside = crop_image(image, drawn.window)
        assert drawn.distortion is not None
        expected = Normalise()(distort(crop, drawn.distortion))
        outside = torch.from_numpy(~inside)
        assert torch.equal(pixels[:, ~outside], expected[:, ~outside])
        assert (pixels[:, outside] == 0).all()
        assert (classes[outside] == 255).all()
        shown = crop_label(label, drawn.window)[inside]
        assert np.array_equal(classes[~outside].numpy(), exchange[shown] if drawn.flipped else shown)
    assert flips == {False, True}


def test_scale_steps_are_those_of_the_authors() -> None:
    label = np.zeros((10, 10), np.uint8)
    transform = TrainTransform((10, 10), (0.7, 2.1), random_scale_step=0.1)
    number = 3000
    drawn = [transform.draw(label, np.random.default_rng(seed)).factor for seed in range(number)]
    # Their code: 0.7 + randint(0, 14) / 10.
    theirs = [0.7 + tenth / 10 for tenth in range(15)]
    found, counts = np.unique(np.round(drawn, 9), return_counts=True)
    assert found.tolist() == pytest.approx(theirs, abs=1e-12)
    expected = number / 15
    assert ((counts - expected) ** 2 / expected).sum() < 36.1  # chi-square of 14 degrees of freedom, 0.1 %
    assert max(drawn) == 2.1


@pytest.mark.parametrize(
    ("scales", "step", "steps"),
    [
        ((0.5, 2.0), 0.25, 6),
        ((0.7, 2.1), 0.1, 14),
        ((0.1, 0.3), 0.1, 2),
        ((1.0, 1.0), 0.5, 0),
        ((0.5, 2.0), 0.4, None),
        ((0.5, 2.0), 2.0, None),
    ],
)
def test_steps_from_the_lowest_to_the_highest_scale(
    scales: tuple[float, float], step: float, steps: int | None
) -> None:
    assert scale_steps(scales, step) == steps


def test_the_long_side_of_the_base_size_is_limited() -> None:
    kept: dict[str, Any] = {"random_short_sides": (40,), "random_long_side": 70}
    # As in mmsegmentation, the image is resized to the largest size whose sides are at most 40 and 70.
    for size, expected in (((50, 60), (40, 48)), ((50, 200), (18, 70)), ((200, 50), (70, 18)), ((20, 35), (40, 70))):
        drawn = TrainTransform((99, 99), (1.0, 1.0), **kept).draw(np.zeros(size, np.uint8), np.random.default_rng(0))
        assert drawn.window.scaled == expected
    doubled = TrainTransform((99, 99), (2.0, 2.0), **kept).draw(np.zeros((50, 200), np.uint8), np.random.default_rng(0))
    assert doubled.window.scaled == (35, 140)  # the scale comes after the limit
    own = TrainTransform((99, 99), (1.0, 1.0), random_long_side=100)
    assert own.draw(np.zeros((50, 80), np.uint8), np.random.default_rng(0)).window.scaled == (50, 80)
    assert own.draw(np.zeros((50, 200), np.uint8), np.random.default_rng(0)).window.scaled == (25, 100)


def theirs_of(label: np.ndarray, crop: int, ratio: float, generator: np.random.Generator) -> tuple[int, int]:
    """Return left and number of tries of mmsegmentation's RandomCrop in a map as high as the crop, written out."""
    positions = label.shape[1] - crop + 1
    left, tries = int(generator.integers(positions)), 1
    for _ in range(10):
        shares: dict[int, int] = {}
        for value in label[:, left : left + crop].ravel().tolist():
            if value != 255:
                shares[value] = shares.get(value, 0) + 1
        if len(shares) > 1 and max(shares.values()) / sum(shares.values()) < ratio:
            break
        left, tries = int(generator.integers(positions)), tries + 1
    return left, tries


def test_crops_of_one_class_become_rare_with_cat_max_ratio() -> None:
    # Of the 100 crops of 11 columns, the 10 across the border of the classes are mixed, with shares of up to 10/11.
    label = np.zeros((11, 110), np.uint8)
    label[:, 60:] = 4
    label[:, :3] = 255
    plain = TrainTransform((11, 11), (1.0, 1.0), random_flip=False)
    chosen = dataclasses.replace(plain, cat_max_ratio=0.95)
    number, crossing, others = 1500, range(50, 60), np.random.default_rng(0)
    pure = dict.fromkeys(("plain", "chosen", "theirs"), 0)
    tries, lefts = [], []
    for seed in range(number):
        drawn = chosen.draw(label, np.random.default_rng(seed))
        tries.append(drawn.tries)
        left = drawn.window.start[1]
        lefts.append(left)
        pure["plain"] += plain.draw(label, np.random.default_rng(seed)).window.start[1] not in crossing
        pure["chosen"] += left not in crossing
        pure["theirs"] += theirs_of(label, 11, 0.95, others)[0] not in crossing
    deviation = 4 * 0.5 / number**0.5
    # Ten crops are looked at, and the eleventh is taken as it is: all eleven are of one class in 0.9^11 = 31 %.
    for name, share in (("plain", 0.9), ("chosen", 0.9**11), ("theirs", 0.9**11)):
        assert pure[name] / number == pytest.approx(share, abs=deviation)
    assert max(tries) == 11
    assert np.mean(np.array(tries) == 1) == pytest.approx(0.1, abs=deviation)
    assert np.mean(np.array(tries) == 11) == pytest.approx(0.9**10, abs=deviation)
    # The crops across the border are taken equally often.
    counts = np.bincount(lefts, minlength=100)[50:60]
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 27.9  # chi-square of 9 degrees of freedom, 0.1 %


def test_the_same_crops_are_refused_as_by_mmsegmentation() -> None:
    generator = np.random.default_rng(3)
    label = np.kron(generator.choice(np.array([0, 0, 0, 1, 2, 255], np.uint8), (1, 30)), np.ones((6, 5), np.uint8))
    transform = TrainTransform((6, 20), (1.0, 1.0), cat_max_ratio=0.6)
    tries = set()
    for seed in range(60):
        ours = transform.draw(label, np.random.default_rng(seed))

        class Same:
            """The random numbers of `ours` for the rendering, whose first corner comes before the flip's number."""

            numbers = np.random.default_rng(seed)
            calls = 0

            def integers(self, positions: int) -> int:
                if self.calls == 0:
                    self.numbers.random()
                self.numbers.integers(1)
                found = int(self.numbers.integers(positions))
                if self.calls == 0:
                    self.numbers.random()
                self.calls += 1
                return found

        assert (ours.window.start[1], ours.tries) == theirs_of(label, 20, 0.6, Same())  # type: ignore[arg-type]
        tries.add(ours.tries)
    assert len(tries) > 3


def test_cat_max_ratio_looks_at_the_turned_crops_of_all_frames() -> None:
    labels = np.zeros((2, 40, 40), np.uint8)
    labels[1] = 1  # each frame is of one class, both together are not
    transform = TrainTransform((20, 20), (1.0, 1.0), cat_max_ratio=0.6)
    assert transform.draw(labels, np.random.default_rng(0)).tries == 1
    assert transform.draw(labels[0], np.random.default_rng(0)).tries == 11
    corner = np.zeros((20, 20), np.uint8)
    corner[:3, :3] = 1  # which a crop of all of the image holds, and by 45 degrees turned does not
    turned = dataclasses.replace(transform, cat_max_ratio=0.999, random_rotation=180.0)
    for seed in range(10):
        drawn = turned.draw(corner, np.random.default_rng(seed))
        assert (drawn.tries == 1) == is_mixed(crop_label(corner, drawn.window), 0.999)


def test_half_of_the_images_are_brighter_or_darker_and_their_padding_stays_the_mean_colour() -> None:
    image, label = np.full((8, 8, 3), 128, np.uint8), np.zeros((8, 8), np.uint8)
    transform = TrainTransform((8, 12), (1.0, 1.0), random_flip=False, photometric=True)
    changed = 0
    for seed in range(300):
        pixels, classes = transform(image, label, np.random.default_rng(seed))
        values = Normalise().values(pixels[:, :, :8]).round()
        assert np.ptp(values) == 0  # grey stays grey
        assert (pixels[:, :, 8:] == 0).all()
        assert (classes[:, :8] == 0).all()
        changed += bool((values != 128).any())
    # Brightness or contrast, each with probability 1/2; 1 in 64 and 1 in 128 of them are below a grey level.
    assert changed / 300 == pytest.approx(0.75, abs=4 * 0.43 / 300**0.5)


def test_angles_are_uniform() -> None:
    transform = TrainTransform((8, 8), random_rotation=30.0)
    label = np.zeros((20, 20), np.uint8)
    angles = np.array([transform.draw(label, np.random.default_rng(seed)).window.angle for seed in range(1000)])
    assert -30 <= angles.min() < -29.5
    assert 29.5 < angles.max() <= 30
    assert angles.mean() == pytest.approx(0, abs=4 * 30 / 3**0.5 / 1000**0.5)
    assert np.abs(angles).mean() == pytest.approx(15, abs=4 * 30 / 12**0.5 / 1000**0.5)


def test_every_option_does_the_same_to_all_frames_and_is_a_function_of_the_generator() -> None:
    generator = np.random.default_rng(1)
    images = generator.integers(0, 256, (2, 20, 30, 3), dtype=np.uint8)
    labels = np.repeat(generator.integers(0, 3, (1, 20, 30), dtype=np.uint8), 2, axis=0)
    transform = pickle.loads(pickle.dumps(TrainTransform((18, 22), (0.5, 2.0), random_scale_step=0.25, **ALL)))
    for seed in range(5):
        pixels, classes = transform(images, labels, np.random.default_rng(seed))
        for frame in range(2):
            expected = transform(images[frame], labels[frame], np.random.default_rng(seed))
            assert torch.equal(pixels[:, frame], expected[0])
            assert torch.equal(classes[frame], expected[1])
