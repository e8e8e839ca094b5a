"""Photometric distortion: each step by hand and against colorsys, and the random numbers of a distortion."""

import colorsys

import numpy as np
import pytest

from ccgpu.train.data.augmentation.photometric import Distortion, distort, draw_distortion


def colours(*values: tuple[int, int, int]) -> np.ndarray:
    return np.array([values], np.uint8)


def test_steps_by_hand() -> None:
    image = colours((10, 100, 250), (128, 128, 128))
    assert np.array_equal(distort(image, Distortion()), image)
    assert distort(image, Distortion(brightness=20.7)).tolist() == [[[30, 120, 255], [148, 148, 148]]]
    assert distort(image, Distortion(brightness=-20.2)).tolist() == [[[0, 79, 229], [107, 107, 107]]]
    assert distort(image, Distortion(contrast=0.55)).tolist() == [[[5, 55, 137], [70, 70, 70]]]
    # Brightness is clipped before contrast, whether this comes first or last.
    for first in (True, False):
        both = Distortion(brightness=30.0, contrast=0.5, contrast_first=first)
        assert distort(image, both).tolist() == [[[20, 65, 127], [79, 79, 79]]]
    # Red, turned by 30 degrees, has half as much green as red; grey has no hue.
    turned = distort(colours((200, 0, 0), (9, 9, 9)), Distortion(hue=30.0)).astype(int)
    assert np.abs(turned - [[[200, 100, 0], [9, 9, 9]]]).max() <= 2
    # By half as much saturation, the least value comes half as far below the largest one.
    pale = distort(colours((200, 100, 50)), Distortion(saturation=0.5)).astype(int)
    assert np.abs(pale - [[[200, 150, 125]]]).max() <= 2


def test_contrast_comes_before_or_after_saturation_and_hue() -> None:
    image = colours((220, 200, 40))
    first = distort(image, Distortion(contrast=1.5, saturation=0.5)).astype(int)
    last = distort(image, Distortion(contrast=1.5, saturation=0.5, contrast_first=False)).astype(int)
    assert np.abs(first - [[[255, 255, 157]]]).max() <= 2  # 255, 255, 60 with half the saturation
    assert np.abs(last - [[[255, 255, 195]]]).max() <= 3  # 220, 210, 130 times 1.5


@pytest.mark.parametrize(
    "distortion",
    [
        Distortion(saturation=0.5),
        Distortion(saturation=1.5),
        Distortion(hue=34.0),
        Distortion(hue=-36.0),
        Distortion(saturation=1.3, hue=20.0),
    ],
)
def test_saturation_and_hue_are_those_of_colorsys(distortion: Distortion) -> None:
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (30, 30, 3))
    pale = generator.integers(100, 250, (30, 1, 1)) + generator.integers(-30, 31, (30, 30, 3))
    image = np.concatenate([noise, pale]).clip(0, 255).astype(np.uint8)
    expected = np.empty(image.shape)
    for y, x in np.ndindex(*image.shape[:2]):
        hue, saturation, value = colorsys.rgb_to_hsv(*(image[y, x] / 255))
        hue, saturation = (hue + distortion.hue / 360) % 1, min(1.0, saturation * distortion.saturation)
        expected[y, x] = [255 * part for part in colorsys.hsv_to_rgb(hue, saturation, value)]
    difference = distort(image, distortion) - expected
    # A hue is exact to 3/2 of 255 steps, which are 6 * 255 / 255 values each where the saturation is full, and the
    # saturation to 2 steps.
    assert np.abs(difference).max() <= 12
    assert np.abs(difference).mean() <= 2
    assert np.abs(difference.mean(axis=(0, 1))).max() <= 1.5


def test_hues_go_round() -> None:
    near_red = colours((255, 0, 40), (255, 40, 0))
    for hue in (30.0, -30.0):
        turned = distort(near_red, Distortion(hue=hue)) / 255
        found = [360 * colorsys.rgb_to_hsv(*colour)[0] for colour in turned[0]]
        expected = [(360 * colorsys.rgb_to_hsv(*colour)[0] + hue) % 360 for colour in near_red[0] / 255]
        assert found == pytest.approx(expected, abs=2.5)


def test_frames_of_a_clip_are_distorted_alike() -> None:
    clip = np.random.default_rng(0).integers(0, 256, (3, 8, 9, 3), dtype=np.uint8)
    distortion = Distortion(20.0, 1.2, 0.7, 16.0, False)
    whole = distort(clip, distortion)
    assert whole.dtype == np.uint8
    for frame, expected in zip(clip, whole, strict=True):
        assert np.array_equal(distort(frame, distortion), expected)


def test_other_images_are_refused() -> None:
    for image in (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 1), np.uint8)):
        with pytest.raises(ValueError, match=r"distort: image must be 8-bit RGB, uint8 \(..., 3\), got "):
            distort(image, Distortion())


def test_distortions_are_drawn_uniformly_and_independently() -> None:
    generator = np.random.default_rng(0)
    drawn = [draw_distortion(generator) for _ in range(4000)]
    still = Distortion()
    changed = np.array(
        [[d.brightness != 0, d.contrast != 1, d.saturation != 1, d.hue != 0, not d.contrast_first] for d in drawn]
    )
    # A hue of 0 is drawn too: 1 of 36.
    expected = np.array([0.5, 0.5, 0.5, 0.5 * 35 / 36, 0.5])
    assert np.abs(changed.mean(axis=0) - expected).max() <= 4 * 0.5 / 4000**0.5
    correlation = np.corrcoef(changed.T) - np.eye(5)
    assert np.abs(correlation).max() <= 4 / 4000**0.5
    for name, low, high in (("brightness", -32, 32), ("contrast", 0.5, 1.5), ("saturation", 0.5, 1.5)):
        values = np.array([getattr(d, name) for d in drawn])
        values = values[values != getattr(still, name)]
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=4 * (high - low) / 12**0.5 / len(values) ** 0.5)
        assert values.std() == pytest.approx((high - low) / 12**0.5, rel=0.05)
    assert {d.hue for d in drawn} == {float(hue) for hue in range(-36, 35, 2)}
    assert isinstance(drawn[0].hue, float)


def test_a_distortion_takes_the_same_number_of_random_numbers_whatever_they_are() -> None:
    after = set()
    for seed in range(20):
        generator, counted = np.random.default_rng(seed), np.random.default_rng(seed)
        draw_distortion(generator)
        counted.random(8)
        counted.integers(36)
        after.add(generator.random() == counted.random())
    assert after == {True}
