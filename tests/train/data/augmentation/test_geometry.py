"""Windows of resized and turned images: what each pixel shows, by hand and against plain renderings."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ccgpu.train.data.augmentation.geometry import Window, crop_image, crop_label, image_window, label_window


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 30), st.integers(4, 30), st.integers(1, 60), st.integers(1, 60), st.data())
def test_windows_equal_resize_then_cut(height: int, width: int, rows: int, columns: int, data: st.DataObject) -> None:
    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    label = np.random.default_rng(width).integers(0, 19, (height, width), dtype=np.uint8)
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    size = data.draw(st.integers(1, rows - top)), data.draw(st.integers(1, columns - left))
    cut = (slice(top, top + size[0]), slice(left, left + size[1]))
    got_image = image_window(image, (rows, columns), (top, left), size)
    got_label = label_window(label, (rows, columns), (top, left), size)
    whole = Image.fromarray(image).resize((columns, rows), Image.Resampling.BILINEAR)
    # Up to one grey level for each of the two passes, because the filter's coordinates are rounded differently.
    assert np.abs(got_image.astype(int) - np.asarray(whole)[cut]).max() <= 2
    for y, x in np.ndindex(*got_label.shape):
        nearest = (2 * (y + top) + 1) * height // (2 * rows), (2 * (x + left) + 1) * width // (2 * columns)
        assert got_label[y, x] == label[nearest]


def bilinear_weights(old: int, new: int, begin: int, length: int) -> np.ndarray:
    """Return the weights (length, old) of an axis resized from old to new, of the window that begins at `begin`.

    The definition of Pillow's bilinear filter: a triangle, as wide as the step between two results where this is more
    than a pixel.
    """
    step = old / new
    width = max(step, 1.0)
    centres = (begin + np.arange(length) + 0.5) * step
    distances = np.abs(np.arange(old) + 0.5 - centres[:, None]) / width
    weights = np.clip(1 - distances, 0, None)
    return weights / weights.sum(axis=1, keepdims=True)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([np.uint8, np.uint16, np.float32]),
    st.sampled_from([1, 2, 4, 7]),
    st.integers(4, 30),
    st.integers(4, 30),
    st.integers(1, 60),
    st.integers(1, 60),
    st.data(),
)
def test_a_window_of_any_channels_equals_the_definition(
    dtype: type, channels: int, height: int, width: int, rows: int, columns: int, data: st.DataObject
) -> None:
    generator = np.random.default_rng(height)
    image = (generator.random((height, width, channels)) * (200 if dtype is np.uint8 else 60000)).astype(dtype)
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    size = data.draw(st.integers(1, rows - top)), data.draw(st.integers(1, columns - left))
    found = image_window(image, (rows, columns), (top, left), size)
    down = bilinear_weights(height, rows, top, size[0])
    across = bilinear_weights(width, columns, left, size[1])
    expected = np.einsum("yh,hwc,xw->yxc", down, image.astype(np.float64), across)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * image.max())


def test_rgb_of_bytes_is_resized_as_pillow_resizes_it() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    found = image_window(image, (31, 77), (0, 0), (31, 77))
    whole = Image.fromarray(image).resize((77, 31), Image.Resampling.BILINEAR, box=(0, 0, 50, 40))
    assert found.dtype == np.uint8
    assert np.array_equal(found, whole)


def test_label_window_takes_the_right_pixel_where_a_centre_lies_on_a_border() -> None:
    label = np.arange(16, dtype=np.uint8).reshape(4, 4)
    got = label_window(label, (1, 49), (0, 24), (1, 1))
    assert got.tolist() == [[10]]  # (24 + 1/2) * 4/49 = 2, which in floating point is a little less


def test_a_window_outside_of_the_image_is_refused() -> None:
    message = r"inside the resized image \(8, 8\), got \(8, 8\) at \(0, 1\)"
    with pytest.raises(ValueError, match=f"image_window: size must lie {message}"):
        image_window(np.zeros((8, 8, 3), np.uint8), (8, 8), (0, 1), (8, 8))
    with pytest.raises(ValueError, match=f"label_window: size must lie {message}"):
        label_window(np.zeros((8, 8), np.uint8), (8, 8), (0, 1), (8, 8))


# Turned crops


def turned_by_hand(image: np.ndarray, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Return the turned crop of an image (H, W, C) at its own size, pixel by pixel, and which pixels are inside."""
    (height, width), (rows, columns) = image.shape[:2], window.crop
    crop, inside = np.zeros((rows, columns, image.shape[2])), np.zeros((rows, columns), bool)
    angle = window.angle * math.pi / 180
    # A complex number for each point, real part to the right and imaginary part upwards: a factor turns it.
    middle = complex(window.start[1] + min(width, columns) / 2, -(window.start[0] + min(height, rows) / 2))
    for row, column in np.ndindex(rows, columns):
        point = complex(window.start[1] + column + 0.5, -(window.start[0] + row + 0.5))
        source = middle + (point - middle) * complex(math.cos(-angle), math.sin(-angle))
        x, y = source.real, -source.imag
        if not (0 <= x < width and 0 <= y < height):
            continue
        inside[row, column] = True
        left, top = math.floor(x - 0.5), math.floor(y - 0.5)
        for j, i in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
            weight = (1 - abs(y - 0.5 - j)) * (1 - abs(x - 0.5 - i))
            crop[row, column] += weight * image[min(max(j, 0), height - 1), min(max(i, 0), width - 1)]
    return crop, inside


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 16), st.integers(1, 16)),
    st.tuples(st.integers(1, 16), st.integers(1, 16)),
    st.floats(-180, 180).filter(bool),
    st.sampled_from([(np.uint8, 3), (np.uint8, 1), (np.uint16, 2), (np.float32, 5)]),
    st.data(),
)
def test_a_turned_crop_equals_one_turned_by_hand(
    size: tuple[int, int], crop: tuple[int, int], angle: float, kind: tuple[type, int], data: st.DataObject
) -> None:
    dtype, channels = kind
    image = (np.random.default_rng(size).random((*size, channels)) * 250).astype(dtype)
    start = tuple(data.draw(st.integers(0, max(0, own - new))) for own, new in zip(size, crop, strict=True))
    window = Window(size, crop, (start[0], start[1]), angle)
    found, inside = crop_image(image, window)
    expected, expected_inside = turned_by_hand(image, window)
    # A centre on the border of the image is inside or not by rounding.
    assert (inside != expected_inside).sum() <= (angle % 45 == 0) * sum(crop)
    both = inside & expected_inside
    rounding = 0.51 if (dtype, channels) == (np.uint8, 3) else 1e-2
    assert found.dtype == (np.uint8 if (dtype, channels) == (np.uint8, 3) else np.float32)
    assert np.abs(found[both] - expected[both]).max(initial=0) <= rounding
    assert not found[~inside].any()
    assert ((crop_label(np.zeros(size, np.uint8), window) == 0) == inside).all()


@pytest.mark.parametrize("side", [5, 6])
@pytest.mark.parametrize("turns", [-1, 1, 2])
def test_right_angles_are_those_of_rot90(side: int, turns: int) -> None:
    generator = np.random.default_rng(side)
    images = generator.integers(0, 256, (2, 9, 11, 3), dtype=np.uint8)
    labels = generator.integers(0, 19, (2, 9, 11), dtype=np.uint8)
    window = Window((9, 11), (side, side), (2, 3), 90.0 * turns)
    found, inside = crop_image(images, window)
    cut = np.s_[:, 2 : 2 + side, 3 : 3 + side]
    assert np.array_equal(found, np.rot90(images[cut], turns, axes=(1, 2)))
    assert np.array_equal(crop_label(labels, window), np.rot90(labels[cut], turns, axes=(1, 2)))
    assert inside.all()


def test_the_corners_of_a_turned_crop_show_what_lies_there_in_the_image() -> None:
    image, label = np.full((40, 50, 3), 200, np.uint8), np.full((40, 50), 3, np.uint8)
    # Half the diagonal of a crop of 20x20 is 14.1: there are 15 pixels or more around its centre.
    for start in ((5, 5), (5, 25), (15, 25)):
        for angle in (-180.0, -33.0, 7.5, 45.0, 100.0):
            crop, inside = crop_image(image, Window((40, 50), (20, 20), start, angle))
            assert inside.all()
            assert (crop == 200).all()
            assert (crop_label(label, Window((40, 50), (20, 20), start, angle)) == 3).all()
    image = np.full((200, 200, 3), 200, np.uint8)
    crop, inside = crop_image(image, Window((200, 200), (100, 100), (0, 0), 45.0))
    # In the corner of the image a crop that is turned by 45 degrees looks out at two sides. Half its diagonal is 70.7,
    # of which 50 lie inside: what looks out is a triangle of the area (70.7 - 50)^2.
    assert (~inside).sum() == pytest.approx(2 * (5000**0.5 - 50) ** 2, abs=25)
    assert (crop[inside] == 200).all()


def test_a_turned_crop_larger_than_the_image_shows_the_images_corners() -> None:
    image = np.full((10, 10, 3), 200, np.uint8)
    crop, inside = crop_image(image, Window((10, 10), (30, 30), (0, 0), 45.0))
    # Turned about (5, 5), 7.1 pixels reach to each side: to the right and below there is room for them.
    shown = np.argwhere(inside)
    assert tuple(shown.max(axis=0)) == (11, 11)
    assert tuple(shown.min(axis=0)) == (0, 0)
    assert (crop[inside] == 200).all()


def test_images_and_labels_are_resized_and_turned_together() -> None:
    y, x = np.mgrid[:60, :80]
    image = np.stack([4 * y, 3 * x, np.full_like(x, 7)], axis=2).astype(np.uint8)
    label = (10 * (y // 6) + x // 8).astype(np.uint8)
    for angle in (-71.0, -8.0, 3.0, 29.0, 150.0):
        window = Window((90, 120), (50, 70), (20, 25), angle)
        pixels, inside = crop_image(image, window)
        classes = crop_label(label, window)
        assert ((classes != 255) == inside).all()
        assert inside.mean() > 0.7
        rows, columns = classes[inside] // 10, classes[inside] % 10
        assert (np.abs(pixels[inside][:, 0] / 4 - (6 * rows + 2.5)) <= 4).all()
        assert (np.abs(pixels[inside][:, 1] / 3 - (8 * columns + 3.5)) <= 5).all()
        assert (pixels[inside][:, 2] == 7).all()


def test_a_crop_that_begins_outside_of_the_image_is_refused() -> None:
    image, label = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)
    for angle in (0.0, 10.0):
        window = Window((8, 8), (4, 4), (0, 5), angle)
        with pytest.raises(ValueError, match=r"inside the resized image \(8, 8\), got \(4, 4\) at \(0, 5\)"):
            crop_image(image, window)
        with pytest.raises(ValueError, match=r"inside the resized image \(8, 8\), got \(4, 4\) at \(0, 5\)"):
            crop_label(label, window)
