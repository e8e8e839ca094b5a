import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ccgpu.train.transforms import EvaluationTransform, Normalise, TrainTransform, scaled_window

RAW = Normalise((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def coordinates(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Red 8 y, green 8 x (linear, so bilinear is exact inside); label 16 (y // 4) + x // 4."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([8 * y, 8 * x, np.full_like(x, 7)], axis=2).astype(np.uint8)
    return image, (16 * (y // 4) + x // 4).astype(np.uint8)


def test_normalise_subtracts_the_mean_and_divides_by_the_deviation() -> None:
    image = np.array([[[10, 20, 30], [255, 0, 128]]], dtype=np.uint8)
    result = Normalise((10.0, 10.0, 20.0), (1.0, 2.0, 5.0))(image)
    assert result.dtype == torch.float32
    assert result.is_contiguous()
    assert result.tolist() == [[[0.0, 245.0]], [[5.0, -5.0]], [[2.0, pytest.approx(21.6)]]]


def test_denormalise_inverts_normalise_for_every_value() -> None:
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    assert np.array_equal(Normalise().denormalise(Normalise()(image)), image)
    assert Normalise().denormalise(torch.full((3, 1, 1), 99.0)).tolist() == [[[255, 255, 255]]]
    assert Normalise().denormalise(torch.full((3, 1, 1), -99.0)).tolist() == [[[0, 0, 0]]]


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 30), st.integers(4, 30), st.integers(1, 60), st.integers(1, 60), st.data())
def test_scaled_window_equals_resize_then_cut(
    height: int, width: int, rows: int, columns: int, data: st.DataObject
) -> None:
    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    label = np.random.default_rng(width).integers(0, 19, (height, width), dtype=np.uint8)
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    size = data.draw(st.integers(1, rows - top)), data.draw(st.integers(1, columns - left))
    cut = (slice(top, top + size[0]), slice(left, left + size[1]))
    got_image, got_label = scaled_window(image, label, (rows, columns), (top, left), size)
    whole = Image.fromarray(image).resize((columns, rows), Image.Resampling.BILINEAR)
    # One grey level: the filter's coordinates are rounded differently.
    assert np.abs(got_image.astype(int) - np.asarray(whole)[cut]).max() <= 1
    for y, x in np.ndindex(*got_label.shape):
        nearest = (2 * (y + top) + 1) * height // (2 * rows), (2 * (x + left) + 1) * width // (2 * columns)
        assert got_label[y, x] == label[nearest]


def test_scaled_window_refuses_a_window_outside() -> None:
    image, label = coordinates(8, 8)
    with pytest.raises(ValueError, match=r"inside the resized picture \(8, 8\), got \(8, 8\) at \(0, 1\)"):
        scaled_window(image, label, (8, 8), (0, 1), (8, 8))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.tuples(st.integers(1, 40), st.integers(1, 40)), st.booleans())
def test_train_transform_keeps_image_and_label_aligned(seed: int, crop: tuple[int, int], mirrored: bool) -> None:
    image, label = coordinates(24, 30)
    transform = TrainTransform(crop, (0.75, 2.0), mirror=mirrored, normalise=RAW)
    pixels, classes = transform(image, label, np.random.default_rng(seed))
    assert pixels.shape == (3, *crop)
    assert classes.shape == crop
    assert (pixels.dtype, classes.dtype) == (torch.float32, torch.int64)
    inside = classes != 255
    y, x = pixels[0][inside] / 8, pixels[1][inside] / 8
    # Bilinear gives the pixel's own coordinate, the nearest label one at most 1/2 away; at the border the
    # smoothing of a shrunken picture pulls a little more.
    assert (torch.abs(y - 1.5 - 4 * (classes[inside] // 16)) <= 2.5).all()
    assert (torch.abs(x - 1.5 - 4 * (classes[inside] % 16)) <= 2.5).all()
    assert (pixels[2][inside] == 7).all()
    assert (pixels[:, ~inside] == 0).all()


def test_train_transform_without_change_returns_the_picture() -> None:
    image, label = coordinates(12, 20)
    pixels, classes = TrainTransform((12, 20), (1.0, 1.0), mirror=False, normalise=RAW)(
        image, label, np.random.default_rng(3)
    )
    assert np.array_equal(pixels.numpy().transpose(1, 2, 0), image)
    assert np.array_equal(classes.numpy(), label)


def test_train_transform_mirrors_half_of_the_pictures_along_the_width() -> None:
    image, label = coordinates(12, 20)
    transform = TrainTransform((12, 20), (1.0, 1.0), normalise=RAW)
    mirrored = 0
    for seed in range(400):
        pixels, classes = transform(image, label, np.random.default_rng(seed))
        flipped = bool(pixels[1, 0, 0] > pixels[1, 0, -1])
        expected = image[:, ::-1] if flipped else image
        assert np.array_equal(pixels.numpy().transpose(1, 2, 0), expected)
        assert np.array_equal(classes.numpy(), label[:, ::-1] if flipped else label)
        mirrored += flipped
    assert 160 <= mirrored <= 240  # 200 +- 4 standard deviations


def test_train_transform_pads_at_the_right_and_bottom_with_the_mean_and_255() -> None:
    image, label = coordinates(6, 8)
    pixels, classes = TrainTransform((10, 9), (1.0, 1.0), mirror=False)(image, label, np.random.default_rng(0))
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
    still = TrainTransform((31, 30), (1.0, 1.0), mirror=False, normalise=RAW)
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
    TrainTransform((1, 40), (1.0, 1.0), mirror=False)(image, label, plain)
    assert used.random() == plain.random()  # the same number of draws, whatever the settings


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
        (lambda: Normalise(std=(1.0, 0.0, 1.0)), "std must be positive"),
        (lambda: Normalise(mean=(1.0, float("nan"), 1.0)), "mean must be three finite numbers"),
        (
            lambda: EvaluationTransform()(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5), np.uint8)),
            r"\(4, 5\)",
        ),
        (lambda: EvaluationTransform()(np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8)), "float64"),
    ],
)
def test_transforms_refuse_bad_arguments(build: object, message: str) -> None:
    assert callable(build)
    with pytest.raises(ValueError, match=message):
        build()
