"""What the presets draw for their training samples has the distributions of the published code."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ccgpu.models.normalisation import Normalise
from ccgpu.train.data.augmentation.geometry import crop_label
from tests.train.recipes import mmsegmentation
from tests.train.recipes.drawn import Crop, distance
from tests.train.recipes.published import TRAININGS, Training

SAMPLES = 600
# Two samples of 600 numbers of one distribution are further apart than this once in 20,000 times.
CLOSE = 0.12
SHRUNK = 8  # images and crops of the datasets are this much smaller here
RAW = Normalise((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
MMSEGMENTATION = TRAININGS[1:]


def label_map(size: tuple[int, int]) -> np.ndarray:
    """A map of which most is one class, with a part of small pieces of others, and an ignored border."""
    label = np.zeros(size, np.uint8)
    y, x = np.mgrid[: size[0], : size[1]]
    pieces = (1 + y * 6 // size[0] % 3 + 3 * (x * 12 // size[1] % 2)).astype(np.uint8)
    right = x > 0.62 * size[1]
    label[right] = pieces[right]
    label[:2] = 255
    return label


def smaller(training: Training) -> tuple[Training, np.ndarray]:
    image = (training.image[0] // SHRUNK, training.image[1] // SHRUNK)
    scale = None if training.scale is None else (training.scale[0] // SHRUNK, training.scale[1] // SHRUNK)
    return dataclasses.replace(training, image=image, scale=scale), label_map(image)


def ours(training: Training, label: np.ndarray) -> list[tuple[Crop, np.ndarray]]:
    settings = training.settings()
    long_side = settings.random_long_side
    settings = dataclasses.replace(
        settings,
        crop=(settings.crop[0] // SHRUNK, settings.crop[1] // SHRUNK),
        random_short_sides=tuple(side // SHRUNK for side in settings.random_short_sides),
        random_long_side=None if long_side is None else long_side // SHRUNK,
    )
    transform, generator, drawn = settings.transform(RAW), np.random.default_rng(0), []
    for _ in range(SAMPLES):
        found = transform.draw(label, generator)
        drawn.append((Crop(found.window.scaled, found.window.start, found.flipped), crop_label(label, found.window)))
    return drawn


def theirs(training: Training, label: np.ndarray) -> list[tuple[Crop, np.ndarray]]:
    height, width = training.settings().crop
    generator = np.random.default_rng(1)
    crop = (height // SHRUNK, width // SHRUNK)
    return [training.draw(label, training.scale, crop, generator) for _ in range(SAMPLES)]


def largest_share(label: np.ndarray) -> float:
    """The share of the labelled pixels that the most frequent class has."""
    counts = np.bincount(label[label != 255].ravel())
    return float(counts.max() / counts.sum())


@pytest.mark.parametrize("training", TRAININGS, ids=str)
def test_sizes_corners_and_flips_have_the_published_distributions(training: Training) -> None:
    training, label = smaller(training)
    crop = training.settings().crop
    mine, published = ours(training, label), theirs(training, label)
    for axis in (0, 1):
        sizes = [np.array([crop.size[axis] for crop, _ in drawn]) for drawn in (mine, published)]
        assert distance(*sizes) < CLOSE
        # A size is rounded to a pixel in other places of the formula.
        assert np.abs(np.sort(sizes[0])[[0, -1]] - np.sort(sizes[1])[[0, -1]]).max() <= 2
        corners = []
        for drawn, own in zip((mine, published), sizes, strict=True):
            room = own - crop[axis] // SHRUNK
            corner = np.array([crop.corner[axis] for crop, _ in drawn])
            assert (corner[room <= 0] == 0).all()
            corners.append(corner[room > 0] / room[room > 0])
        if len(corners[1]) > 100:
            assert distance(*corners) < CLOSE * (SAMPLES / len(corners[1])) ** 0.5
    for drawn in (mine, published):
        assert np.mean([crop.flipped for crop, _ in drawn]) == pytest.approx(0.5, abs=0.07)


def test_the_authors_scale_is_one_of_fifteen() -> None:
    training, label = smaller(TRAININGS[0])
    sizes = [[crop.size for crop, _ in drawn] for drawn in (ours(training, label), theirs(training, label))]
    assert set(sizes[0]) == set(sizes[1])
    assert len(set(sizes[0])) == 15
    for size in set(sizes[0]):
        assert sizes[0].count(size) / SAMPLES == pytest.approx(1 / 15, abs=0.04)


@pytest.mark.parametrize("training", MMSEGMENTATION, ids=str)
def test_crops_are_taken_by_the_share_of_their_largest_class(training: Training) -> None:
    training, label = smaller(training)
    mine, published = (
        np.array([largest_share(window) for _, window in drawn])
        for drawn in (ours(training, label), theirs(training, label))
    )
    assert distance(mine, published, within=0.02) < CLOSE  # a pixel more or less, of small crops
    assert (mine >= 0.75).mean() == pytest.approx((published >= 0.75).mean(), abs=0.07)


def test_crops_of_one_class_are_taken_less_often_than_without_the_rule() -> None:
    training, label = smaller(MMSEGMENTATION[0])
    shares = np.array([largest_share(window) for _, window in ours(training, label)])
    settings = dataclasses.replace(training.settings(), cat_max_ratio=1.0, crop=(64, 128))
    transform, generator = settings.transform(RAW), np.random.default_rng(2)
    free = [largest_share(crop_label(label, transform.draw(label, generator).window)) for _ in range(SAMPLES)]
    assert (shares >= 0.75).mean() < 0.6 * np.mean(np.array(free) >= 0.75)


def colours(image: np.ndarray, changed: np.ndarray) -> tuple[float, ...]:
    """Mean value, contrast, mean saturation, and how far the hue of the image was turned, in degrees."""
    (before, _, _), (hue, saturation, value) = mmsegmentation.hsv(image), mmsegmentation.hsv(changed)
    weight = saturation * value
    turn = np.exp(1j * np.deg2rad(hue - before))
    return value.mean(), changed.std(), saturation.mean(), float(np.rad2deg(np.angle((weight * turn).sum())))


def test_colours_have_the_published_distributions() -> None:
    images = np.random.default_rng(3)
    one, other = np.random.default_rng(4), np.random.default_rng(5)
    settings = dataclasses.replace(
        MMSEGMENTATION[0].settings(), crop=(16, 16), random_scale=(1.0, 1.0), random_flip=False, cat_max_ratio=1.0
    )
    transform, label = settings.transform(RAW), np.zeros((16, 16), np.uint8)
    found: tuple[list[tuple[float, ...]], list[tuple[float, ...]]] = ([], [])
    unchanged = np.zeros(2)
    for _ in range(SAMPLES):
        # Dark and bright, pale and colourful pixels around a colour of the image.
        image = (images.normal(images.uniform(40, 215, 3), 30, (16, 16, 3))).clip(0, 255).astype(np.uint8)
        mine = transform(image, label, one)[0].numpy().transpose(1, 2, 0).astype(np.float64)
        published = mmsegmentation.distorted(image, other)
        for place, changed in enumerate((mine, published)):
            found[place].append(colours(image.astype(np.float64), changed))
            unchanged[place] += np.abs(changed - image).max() == 0
    names = ("value", "contrast", "saturation", "hue")
    for name, mine, published in zip(names, *map(np.transpose, found), strict=True):
        if name == "hue":  # 8-bit hues turn an image that is not turned by a fraction of a degree
            mine, published = np.round(mine / 4), np.round(published / 4)
        assert distance(mine, published) < CLOSE, name
    assert unchanged / SAMPLES == pytest.approx([1 / 16, 1 / 16], abs=0.035)
