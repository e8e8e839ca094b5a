"""Augmentation: image and label map stay aligned, random numbers are uniform and come from the generator alone."""

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ccgpu.models.normalisation import Normalise
from ccgpu.train.data.augmentation.geometry import image_window, label_window
from ccgpu.train.data.transforms import EvaluationTransform, TrainTransform

RAW = Normalise((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def coordinates(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return red = 8 y, green = 8 x (linear, so bilinear resizing is exact inside) and label 16 (y // 4) + x // 4."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([8 * y, 8 * x, np.full_like(x, 7)], axis=2).astype(np.uint8)
    return image, (16 * (y // 4) + x // 4).astype(np.uint8)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_train_transform_takes_clips_of_any_channels_and_pads_with_the_mean(dtype: type) -> None:
    images = np.random.default_rng(0).integers(0, 200, (2, 18, 24, 5)).astype(dtype)
    labels = np.ones((2, 18, 24), np.uint8)
    transform = TrainTransform((30, 20), (1.0, 1.0), normalise=Normalise((100.0,) * 5, (10.0,) * 5))
    pixels, classes = transform(images, labels, np.random.default_rng(1))
    assert pixels.shape == (5, 2, 30, 20)
    assert not pixels[:, :, 18:].any()
    assert (classes[:, 18:] == 255).all()
    for frame in range(2):
        expected, _ = transform(images[frame], labels[frame], np.random.default_rng(1))
        assert torch.equal(pixels[:, frame], expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.tuples(st.integers(1, 40), st.integers(1, 40)), st.booleans())
def test_train_transform_keeps_image_and_label_aligned(seed: int, crop: tuple[int, int], flipped: bool) -> None:
    image, label = coordinates(24, 30)
    transform = TrainTransform(crop, (0.75, 2.0), random_flip=flipped, normalise=RAW)
    pixels, classes = transform(image, label, np.random.default_rng(seed))
    assert pixels.shape == (3, *crop)
    assert classes.shape == crop
    assert (pixels.dtype, classes.dtype) == (torch.float32, torch.int64)
    inside = classes != 255
    y, x = pixels[0][inside] / 8, pixels[1][inside] / 8
    # Bilinear resizing gives the coordinate of the pixel, the nearest label is at most 1/2 away; at the border the
    # smoothing of a shrunken image adds a little.
    assert (torch.abs(y - 1.5 - 4 * (classes[inside] // 16)) <= 2.5).all()
    assert (torch.abs(x - 1.5 - 4 * (classes[inside] % 16)) <= 2.5).all()
    assert (pixels[2][inside] == 7).all()
    assert (pixels[:, ~inside] == 0).all()


def test_train_transform_without_change_returns_the_image() -> None:
    image, label = coordinates(12, 20)
    pixels, classes = TrainTransform((12, 20), (1.0, 1.0), random_flip=False, normalise=RAW)(
        image, label, np.random.default_rng(3)
    )
    assert np.array_equal(pixels.numpy().transpose(1, 2, 0), image)
    assert np.array_equal(classes.numpy(), label)


def test_train_transform_flips_half_of_the_images_along_the_width() -> None:
    image, label = coordinates(12, 20)
    transform = TrainTransform((12, 20), (1.0, 1.0), normalise=RAW)
    count = 0
    for seed in range(400):
        pixels, classes = transform(image, label, np.random.default_rng(seed))
        flipped = bool(pixels[1, 0, 0] > pixels[1, 0, -1])
        expected = image[:, ::-1] if flipped else image
        assert np.array_equal(pixels.numpy().transpose(1, 2, 0), expected)
        assert np.array_equal(classes.numpy(), label[:, ::-1] if flipped else label)
        count += flipped
    assert 160 <= count <= 240  # 200 +- 4 standard deviations


def test_train_transform_pads_at_the_right_and_bottom_with_the_mean_and_255() -> None:
    image, label = coordinates(6, 8)
    pixels, classes = TrainTransform((10, 9), (1.0, 1.0), random_flip=False)(image, label, np.random.default_rng(0))
    assert np.array_equal(classes[:6, :8].numpy(), label)
    assert np.array_equal(pixels[:, :6, :8].numpy(), Normalise()(image).numpy())
    for part in (np.s_[..., 6:, :], np.s_[..., 8:]):
        assert (pixels[part] == 0).all()
        assert (classes[part] == 255).all()


def test_train_transform_scales_and_crops_uniformly() -> None:
    image = np.zeros((100, 100, 3), dtype=np.uint8)
    label = np.zeros((100, 100), dtype=np.uint8)
    transform = TrainTransform((200, 200), (0.5, 2.0))
    sides = [int((transform(image, label, np.random.default_rng(seed))[1] != 255).any(0).sum()) for seed in range(300)]
    assert min(sides) in range(50, 56)
    assert max(sides) in range(195, 201)
    assert np.mean(sides) == pytest.approx(125, abs=4 * 43.3 / 300**0.5)
    image, label = coordinates(32, 32)
    still = TrainTransform((31, 30), (1.0, 1.0), random_flip=False, normalise=RAW)
    corners = [still(image, label, np.random.default_rng(seed))[0][:2, 0, 0].tolist() for seed in range(60)]
    assert {tuple(corner) for corner in corners} == {(8.0 * y, 8.0 * x) for y in range(2) for x in range(3)}


def test_train_transform_is_a_function_of_the_generator() -> None:
    image, label = coordinates(24, 30)
    transform = pickle.loads(pickle.dumps(TrainTransform((16, 16))))
    first, again, other = (transform(image, label, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    used, plain = np.random.default_rng(5), np.random.default_rng(5)
    transform(image, label, used)
    TrainTransform((1, 40), (1.0, 1.0), random_flip=False)(image, label, plain)
    assert used.random() == plain.random()  # the same number of draws, whatever the settings


def coverage(transform: TrainTransform, size: tuple[int, int], seed: int) -> tuple[int, int]:
    """Return height and width of the part of the crop that the image fills."""
    image, label = np.zeros((*size, 3), dtype=np.uint8), np.zeros(size, dtype=np.uint8)
    shown = transform(image, label, np.random.default_rng(seed))[1] != 255
    return int(shown.any(1).sum()), int(shown.any(0).sum())


def test_train_transform_draws_the_short_side_and_scales_it() -> None:
    still = TrainTransform((100, 100), (1.0, 1.0), random_short_sides=(30, 40, 60))
    for size, sides in (
        ((50, 80), {(30, 48), (40, 64), (60, 96)}),
        ((80, 50), {(48, 30), (64, 40), (96, 60)}),
        ((7, 7), {(30, 30), (40, 40), (60, 60)}),
    ):
        seen = [coverage(still, size, seed) for seed in range(150)]
        assert set(seen) == sides
        assert all(30 <= seen.count(side) <= 70 for side in sides)  # 50 +- 3.5 standard deviations
    scaled = TrainTransform((150, 150), (0.5, 2.0), random_short_sides=(40,))
    short, long = zip(*(coverage(scaled, (50, 80), seed) for seed in range(100)), strict=True)
    assert min(short) in range(20, 24)
    assert max(short) in range(77, 81)
    assert all(abs(high - 1.6 * low) <= 1.3 for low, high in zip(short, long, strict=True))


@settings(max_examples=60, deadline=None)
@given(*[st.integers(1, 90)] * 4, st.integers(0, 10**6))
def test_train_transform_fits_the_image_into_the_crop(
    height: int, width: int, rows: int, columns: int, seed: int
) -> None:
    fitted = coverage(TrainTransform((rows, columns), (1.0, 1.0), fit_crop=True), (height, width), seed)
    ratio = min(rows / height, columns / width)
    assert fitted == (max(1, round(height * ratio)), max(1, round(width * ratio)))
    assert fitted[0] == rows or fitted[1] == columns
    halved = coverage(TrainTransform((rows, columns), (0.5, 0.5), fit_crop=True), (height, width), seed)
    assert all(abs(half - max(1, full / 2)) <= 0.75 for half, full in zip(halved, fitted, strict=True))


def test_train_transform_scales_by_the_same_number_with_and_without_fit() -> None:
    image, label = coordinates(16, 32)
    plain = TrainTransform((16, 32), (0.5, 2.0))
    for seed in range(20):
        expected = plain(image, label, np.random.default_rng(seed))
        got = dataclasses.replace(plain, fit_crop=True)(image, label, np.random.default_rng(seed))
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


def test_train_transform_draws_the_short_side_before_everything_else() -> None:
    image, label = coordinates(24, 30)
    for seed in range(10):
        used = np.random.default_rng(seed)
        got = TrainTransform((16, 16), random_short_sides=(24,))(image, label, used)
        skipped = np.random.default_rng(seed)
        skipped.integers(1)
        expected = TrainTransform((16, 16))(image, label, skipped)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        assert used.random() == skipped.random()


def test_train_transform_exchanges_classes_in_flipped_images_alone() -> None:
    image, label = coordinates(12, 20)
    label = (label % 4).astype(np.uint8)
    label[0] = 255
    exchange = np.arange(256, dtype=np.uint8)
    exchange[[1, 3]] = 3, 1
    transform = TrainTransform((14, 22), (1.0, 1.0), normalise=RAW, exchange=exchange)
    still = dataclasses.replace(transform, random_flip=False)
    names = {0: 0, 1: 3, 2: 2, 3: 1, 255: 255}
    flipped = 0
    for seed in range(40):
        pixels, classes = transform(image, label, np.random.default_rng(seed))
        plain_pixels, plain_classes = still(image, label, np.random.default_rng(seed))
        if torch.equal(pixels, plain_pixels):
            assert torch.equal(classes, plain_classes)
            assert np.array_equal(classes[:12, :20].numpy(), label)
            continue
        flipped += 1
        assert torch.equal(pixels, plain_pixels.flip(-1))
        expected = [[names[value] for value in reversed(row)] for row in plain_classes.tolist()]
        assert classes.tolist() == expected
    assert 8 <= flipped <= 32  # 20 +- 4 standard deviations


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([{}, {"fit_crop": True}, {"random_short_sides": (9, 30)}])
)
def test_transforms_do_the_same_to_every_frame_of_a_clip(seed: int, length: int, base: dict[str, Any]) -> None:
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (length, 18, 24, 3), dtype=np.uint8)
    labels = generator.integers(0, 19, (length, 18, 24), dtype=np.uint8)
    transform = TrainTransform((15, 20), (0.5, 2.0), exchange=np.arange(256, dtype=np.uint8)[::-1].copy(), **base)
    pixels, classes = transform(images, labels, np.random.default_rng(seed))
    assert pixels.shape == (3, length, 15, 20)
    assert classes.shape == (length, 15, 20)
    whole, whole_classes = EvaluationTransform()(images, labels)
    assert whole.shape == (3, length, 18, 24)
    assert np.array_equal(Normalise().values(whole).round(), images)
    for frame in range(length):
        expected = transform(images[frame], labels[frame], np.random.default_rng(seed))
        assert torch.equal(pixels[:, frame], expected[0])
        assert torch.equal(classes[frame], expected[1])
        assert torch.equal(whole[:, frame], Normalise()(images[frame]))
        assert np.array_equal(whole_classes[frame].numpy(), labels[frame])


def test_train_transform_draws_scale_top_left_flip_in_this_order() -> None:
    image, label = coordinates(40, 50)
    for seed in range(20):
        draws = np.random.default_rng(seed)
        factor = 0.75 + 1.25 * draws.random()
        scaled = round(40 * factor), round(50 * factor)
        size = min(scaled[0], 32), min(scaled[1], 36)
        start = int(draws.integers(scaled[0] - size[0] + 1)), int(draws.integers(scaled[1] - size[1] + 1))
        expected, expected_label = image_window(image, scaled, start, size), label_window(label, scaled, start, size)
        pixels, classes = TrainTransform((32, 36), normalise=RAW)(image, label, np.random.default_rng(seed))
        if draws.random() < 0.5:
            pixels, classes = pixels.flip(-1), classes.flip(-1)
        assert np.array_equal(pixels[:, : size[0], : size[1]].numpy().transpose(1, 2, 0), expected)
        assert np.array_equal(classes[: size[0], : size[1]].numpy(), expected_label)


def test_evaluation_transform_normalises_only() -> None:
    image, label = coordinates(5, 9)
    pixels, classes = EvaluationTransform(RAW)(image, label)
    assert np.array_equal(pixels.numpy().transpose(1, 2, 0), image)
    assert np.array_equal(classes.numpy(), label)
    assert classes.dtype == torch.int64


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TrainTransform((0, 5)), r"crop must be \(height, width\) >= 1, got \(0, 5\)"),
        (lambda: TrainTransform((5, 5), (0.0, 1.0)), r"scale must be 0 < low <= high, got \(0.0, 1.0\)"),
        (lambda: TrainTransform((5, 5), (2.0, 1.0)), r"scale must be 0 < low <= high, got \(2.0, 1.0\)"),
        (lambda: TrainTransform((5, 5), (1.0, float("nan"))), "scale must be 0 < low <= high"),
        (lambda: TrainTransform((5, 5), random_short_sides=(5, 0)), r"random_short_sides must be >= 1.*got \(5, 0\)"),
        (
            lambda: TrainTransform((5, 5), random_short_sides=(5,), fit_crop=True),
            r"none with fit_crop, got \(5,\) and fit_crop=True",
        ),
        (lambda: TrainTransform((5, 5), (0.5, 2.0), random_scale_step=0.4), r"from 0.5 to 2.0 in whole steps, got 0.4"),
        (lambda: TrainTransform((5, 5), random_scale_step=-0.1), r"in whole steps, got -0.1"),
        (lambda: TrainTransform((5, 5), random_long_side=0), r"random_long_side must be >= 1, got 0"),
        (lambda: TrainTransform((5, 5), cat_max_ratio=0.0), r"cat_max_ratio must be above 0 and at most 1, got 0.0"),
        (lambda: TrainTransform((5, 5), cat_max_ratio=75.0), r"cat_max_ratio must be above 0 and at most 1, got 75.0"),
        (lambda: TrainTransform((5, 5), random_rotation=-1.0), r"random_rotation must be from 0 to 180, got -1.0"),
        (lambda: TrainTransform((5, 5), random_rotation=float("nan")), r"from 0 to 180, got nan"),
        (
            lambda: TrainTransform((5, 5), photometric=True, normalise=Normalise((1.0,), (1.0,)))(
                np.zeros((4, 4, 1), np.uint8), np.zeros((4, 4), np.uint8), np.random.default_rng(0)
            ),
            r"image must be 8-bit RGB, uint8 \(..., 3\), got .* \(5, 5, 1\)",
        ),
        (lambda: TrainTransform((5, 5), exchange=np.arange(256)), r"uint8 \(256,\), got int64 \(256,\)"),
        (lambda: TrainTransform((5, 5), exchange=np.zeros(19, np.uint8)), r"got uint8 \(19,\)"),
        (
            lambda: EvaluationTransform()(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5), np.uint8)),
            r"\(4, 5\)",
        ),
        (lambda: EvaluationTransform()(np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8)), "float64"),
        (
            lambda: EvaluationTransform()(np.zeros((2, 4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)),
            r"\(2, 4, 4, 3\) and uint8 \(4, 4\)",
        ),
    ],
)
def test_transforms_refuse_bad_arguments(build: object, message: str) -> None:
    assert callable(build)
    with pytest.raises(ValueError, match=message):
        build()
