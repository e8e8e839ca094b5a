"""Images are evaluated with a preset as the published code evaluates them: at its size, whole or in its windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.train.recipes.published import TRAININGS, Training


def network(images: Tensor) -> Tensor:
    """Logits of three classes that depend on where a window ends, because the network pads it with 0."""
    weight = torch.tensor([[0.5, -0.3, 0.2], [0.1, 0.4, -0.6], [-0.2, 0.3, 0.7]])
    return F.conv2d(images, weight[:, :, None, None].expand(3, 3, 3, 3), torch.ones(3), padding=1)


def drawn(size: tuple[int, int]) -> Tensor:
    """An image of waves, normalised."""
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    return torch.stack([(y / 37 + channel).sin() * (x / (53 + 9 * channel)).cos() for channel in range(3)])[None]


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear interpolation between the centres of pixels, edges aligned, without smoothing."""
    if maps.shape[2:] == size:
        return maps
    values = maps.numpy()
    for axis, new in ((2, size[0]), (3, size[1])):
        old = values.shape[axis]
        places = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
        low = places.astype(int)
        share = (places - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(4)])
        values = values.take(low, axis) * (1 - share) + values.take(np.minimum(low + 1, old - 1), axis) * share
    return torch.from_numpy(values)


@pytest.mark.parametrize("training", TRAININGS, ids=str)
def test_an_image_is_evaluated_as_published(training: Training) -> None:
    predict = training.settings().prediction(())
    images = drawn(training.image)
    assert predict.seen_size(*training.image) == training.seen
    expected = resized(training.predict(network, resized(images, training.seen)), training.image)
    if predict.average == "probabilities":  # of one pass: the same classes
        expected = expected.softmax(1)
    torch.testing.assert_close(predict(network, images), expected, rtol=0, atol=1e-4)


def test_several_scales_and_flipped_images_are_averaged_as_probabilities() -> None:
    training = TRAININGS[4]
    predict = training.settings(scales=(1.0, 1.5), flip=True).prediction(())
    images, total = drawn(training.image), torch.zeros(())
    for size in (training.seen, (768, 1024)):
        seen = resized(images, size)
        for plain in (True, False):
            logits = network(seen) if plain else network(seen.flip(3)).flip(3)
            total = total + resized(logits, training.image).softmax(1) / 4
    torch.testing.assert_close(predict(network, images), total, rtol=0, atol=1e-4)
