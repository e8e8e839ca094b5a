"""`predict_classes`: large images in tiles, or shrunk for a network that expects a whole image."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ccgpu.models.network_input import PixelInput, TensorInput
from ccgpu.models.normalisation import Normalise
from ccgpu.models.prediction import NonFiniteScores, Prediction
from ccgpu.models.tiles import Tile, predict_classes


def local(images: Tensor) -> Tensor:
    """A network that looks 3 pixels far: 5 classes."""
    kernel = torch.randn(5, 3, 7, 7, generator=torch.Generator().manual_seed(1), dtype=images.dtype)
    return F.conv2d(F.pad(images, (3, 3, 3, 3), mode="replicate"), kernel)


@pytest.mark.parametrize("size", [(70, 90), (33, 200), (200, 33), (64, 65), (97, 97)])
def test_tiles_give_what_the_whole_image_gives_a_network_that_looks_less_far(size: tuple[int, int]) -> None:
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    seen = []

    def net(images: Tensor) -> Tensor:
        seen.append(images.shape[-2:])
        return local(images)

    whole = predict_classes(local, image, Prediction())
    assert whole.dtype == torch.uint8
    assert torch.equal(whole, local(image)[0].argmax(0).byte())
    tiles = predict_classes(net, image, Prediction(), tile=32, overlap=8)
    assert torch.equal(tiles, whole)
    assert max(max(side) for side in seen) == 32
    assert len(seen) > 1


def test_small_images_and_tile_zero_are_seen_whole() -> None:
    seen = []

    def net(images: Tensor) -> Tensor:
        seen.append(tuple(images.shape[-2:]))
        return local(images)

    predict_classes(net, torch.randn(1, 3, 32, 64), Prediction(), tile=32, overlap=8)
    predict_classes(net, torch.randn(1, 3, 80, 64), Prediction(), tile=0)
    assert seen == [(32, 64), (80, 64)]
    with pytest.raises(ValueError, match=r"overlap must be in 0\.\.31, got 32"):
        predict_classes(net, torch.randn(1, 3, 80, 64), Prediction(), tile=32, overlap=32)


def test_large_images_of_a_network_with_a_size_of_its_own_are_shrunk_first() -> None:
    image = torch.zeros(1, 3, 100, 200)
    image[..., 100:] = 1

    def net(images: Tensor) -> Tensor:
        assert images.shape[-2:] == (12, 24)
        return torch.stack([0.5 - images[:, 0], images[:, 0] - 0.5], dim=1)

    classes = predict_classes(net, image, Prediction(short_side=12), tile=32, overlap=8)
    assert classes.shape == (100, 200)
    assert not classes[:, :95].any()
    assert classes[:, 105:].all()


# Decoded files


def photo(height: int, width: int, seed: int = 3) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 7 + 1, width // 7 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def normalised(pixels: np.ndarray) -> Tensor:
    return Normalise()(pixels)[None]


@pytest.mark.parametrize("tile", [0, 32, 64])
@pytest.mark.parametrize("prediction", [Prediction(), Prediction(scales=(0.75, 1.25), flip=True)])
def test_a_decoded_file_gives_what_its_tensor_gives(tile: int, prediction: Prediction) -> None:
    image = photo(90, 131)
    tensor = normalised(np.asarray(image))
    overlap = tile // 4
    expected = predict_classes(local, tensor, prediction, tile=tile, overlap=overlap)
    found = predict_classes(local, PixelInput(image, normalised), prediction, tile=tile, overlap=overlap)
    assert torch.equal(found, expected)
    assert len(found.unique()) > 2


@pytest.mark.parametrize("size", [(45, 60), (30, 131), (89, 1), (1, 1), (7, 9)])
def test_a_file_is_shrunk_like_its_tensor_within_the_rounding_of_pixels(size: tuple[int, int]) -> None:
    image = photo(90, 131)

    def plain(pixels: np.ndarray) -> Tensor:
        return Normalise((0, 0, 0), (1, 1, 1))(pixels)[None]

    found = PixelInput(image, plain).shrink(*size)
    expected = TensorInput(plain(np.asarray(image))).shrink(*size)
    assert found.shape == expected.shape == (1, 3, *size)
    assert (found - expected).abs().max() <= 1.0 + 1e-3


def test_a_large_file_of_a_network_with_a_size_of_its_own_is_shrunk() -> None:
    image = photo(100, 203)
    sizes = []

    def net(images: Tensor) -> Tensor:
        sizes.append(tuple(images.shape[-2:]))
        return local(images)

    prediction = Prediction(short_side=24)
    expected = predict_classes(net, normalised(np.asarray(image)), prediction, tile=32)
    found = predict_classes(net, PixelInput(image, normalised), prediction, tile=32)
    assert sizes[0] == sizes[1]
    assert found.shape == (100, 203)
    assert (found == expected).float().mean() > 0.97  # the others differ by the rounding of the small image


def test_memory_holds_tiles_and_one_byte_a_pixel() -> None:
    """numpy's and Pillow's memory are counted; a float32 copy of the image would be 12 bytes a pixel."""
    height, width = 1500, 2000
    source = PixelInput(Image.new("RGB", (width, height), (90, 30, 200)), normalised)

    def net(images: Tensor) -> Tensor:
        assert images.shape[-2:] == (64, 64)
        return images

    tracemalloc.start()
    predict_classes(net, source, Prediction(), tile=64, overlap=16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * height * width


def test_progress_gets_the_tiles_of_large_images_alone_and_may_stop() -> None:
    seen: list[int] = []

    class Stopped(Exception):
        pass

    def progress(tiles: Sequence[Tile]) -> Iterator[Tile]:
        for number, tile in enumerate(tiles):
            if number == 3:
                raise Stopped
            seen.append(len(tiles))
            yield tile

    predict_classes(local, torch.randn(1, 3, 32, 64), Prediction(), tile=32, overlap=8, progress=progress)
    assert not seen
    with pytest.raises(Stopped):
        predict_classes(local, torch.randn(1, 3, 80, 80), Prediction(), tile=32, overlap=8, progress=progress)
    assert seen == [9, 9, 9]


# Scores


@pytest.mark.parametrize("tile", [0, 32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_are_refused(tile: int, value: float) -> None:
    image = torch.randn(1, 3, 80, 80)
    image[0, 1, 70, 75] = value
    with pytest.raises(NonFiniteScores, match="scores of an image must be finite, got NaN or infinity; with --amp"):
        predict_classes(lambda images: images, image, Prediction(), tile=tile, overlap=8 if tile else 0)


def test_many_classes_need_more_than_a_byte() -> None:
    scores = torch.zeros(1, 300, 2, 2)
    scores[0, 299] = 1
    found = predict_classes(lambda images: scores, torch.zeros(1, 3, 2, 2), Prediction())
    assert found.dtype == torch.int64
    assert found.unique().tolist() == [299]
