"""`predict_classes`: large images in windows, or shrunk for a network that expects a whole image."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ccgpu.models.prediction import Prediction, predict_classes


def local(images: Tensor) -> Tensor:
    """A network that looks 3 pixels far: 5 classes."""
    kernel = torch.randn(5, 3, 7, 7, generator=torch.Generator().manual_seed(1), dtype=images.dtype)
    return F.conv2d(F.pad(images, (3, 3, 3, 3), mode="replicate"), kernel)


@pytest.mark.parametrize("size", [(70, 90), (33, 200), (200, 33), (64, 65), (97, 97)])
def test_windows_give_what_the_whole_image_gives_a_network_that_looks_less_far(size: tuple[int, int]) -> None:
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    seen = []

    def net(images: Tensor) -> Tensor:
        seen.append(images.shape[-2:])
        return local(images)

    whole = predict_classes(local, image, Prediction())
    assert torch.equal(whole, local(image)[0].argmax(0))
    windows = predict_classes(net, image, Prediction(), window=32, overlap=8)
    assert torch.equal(windows, whole)
    assert max(max(side) for side in seen) == 32
    assert len(seen) > 1


def test_small_images_and_window_zero_are_seen_whole() -> None:
    seen = []

    def net(images: Tensor) -> Tensor:
        seen.append(tuple(images.shape[-2:]))
        return local(images)

    predict_classes(net, torch.randn(1, 3, 32, 64), Prediction(), window=32, overlap=8)
    predict_classes(net, torch.randn(1, 3, 80, 64), Prediction(), window=0)
    assert seen == [(32, 64), (80, 64)]
    with pytest.raises(ValueError, match=r"overlap must be in 0\.\.31, got 32"):
        predict_classes(net, torch.randn(1, 3, 80, 64), Prediction(), window=32, overlap=32)


def test_large_images_of_a_network_with_a_size_of_its_own_are_shrunk_first() -> None:
    image = torch.zeros(1, 3, 100, 200)
    image[..., 100:] = 1

    def net(images: Tensor) -> Tensor:
        assert images.shape[-2:] == (12, 24)
        return torch.stack([0.5 - images[:, 0], images[:, 0] - 0.5], dim=1)

    classes = predict_classes(net, image, Prediction(short_side=12), window=32, overlap=8)
    assert classes.shape == (100, 200)
    assert not classes[:, :95].any()
    assert classes[:, 105:].all()
