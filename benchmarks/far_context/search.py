"""Does the attention of a disc's pixel find its square: the position with the largest weight, image after image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.far_context.runs import as_batch
from ccgpu.models.ccnet import CCNet
from ccgpu.models.context import NonLocal
from ccgpu.train.runs.settings.training import Settings
from ccgpu.train.scenes.discs import CLASSES, Scene

IMAGES = 100
STRIDE = 8  # pixels between two positions of the feature map
_NEAR = 1  # positions between the square and one whose 3x3 convolution sees it


def farthest_pixel(scene: Scene) -> tuple[int, int, int]:
    """Return the pixel (t, y, x) of a disc that is farthest from its square along its nearer axis, then in all."""
    _, rows, columns = scene.offsets()
    far = np.where(scene.owners >= 0, 1000.0 * np.minimum(rows, columns) + np.hypot(rows, columns), -1)
    t, y, x = np.unravel_index(int(far.argmax()), far.shape)
    return int(t), int(y), int(x)


def region_of(scene: Scene, pixel: tuple[int, int, int], shape: Sequence[int]) -> np.ndarray:
    """Return the positions that see the square of a pixel: bool (T, H', W'), its own and their neighbours."""
    square = scene.squares[scene.owners[pixel]]
    region = np.zeros(shape, bool)
    rows, columns = (
        slice(max(start // STRIDE - _NEAR, 0), (start + square.side - 1) // STRIDE + 1 + _NEAR)
        for start in (square.top, square.left)
    )
    region[square.frame, rows, columns] = True
    return region


@torch.no_grad()
def attention_of(net: CCNet, image: torch.Tensor, pixel: Sequence[int]) -> torch.Tensor | None:
    """Return how much a pixel attends to each position, (T, H', W'); None for a network without attention.

    Args:
        net: in eval mode.
        image: (1, C, H, W) or (1, C, T, H, W), normalised.
        pixel: (y, x), or (t, y, x) of a clip.
    """
    if net.head.cca is not None:
        found = net.attention_map(image, pixel)[0]
    elif isinstance(net.head.context, NonLocal):
        module = net.head.context
        clip = image if image.ndim == 5 else image.unsqueeze(2)
        features = net.head.conva(net.backbone(clip[0].transpose(0, 1))[1])  # (T, C, H', W')
        features = features.transpose(0, 1)[None] if module.dims == 3 else features
        q, k = module.query_conv(features)[0], module.key_conv(features)[0]
        position = net.position_of(pixel, tuple(image.shape[2:]), tuple(q.shape[1:]))
        energies = torch.tensordot(q[(slice(None), *position)], k, dims=1)
        found = energies.flatten().softmax(0).view(energies.shape)
    else:
        return None
    return found if found.ndim == 3 else found[None]


def search(net: CCNet, settings: Settings, scenes: Sequence[Scene]) -> dict[str, Any] | None:
    """Return in how many images the farthest disc's pixel attends most to its square; None without attention.

    Returns:
        "images", "found", "of_classes" (images and found of each class), "mass" (the mean weight on the square's
        positions), "region" (their mean share of all), and "example", the weights of the first scene (T, H', W') in
        ten-thousandths.
    """
    found, mass, region = [], [], []
    of_classes = {name: [0, 0] for name, _ in CLASSES}
    example: list[Any] = []
    for scene in scenes[:IMAGES]:
        if not (scene.owners >= 0).any():
            continue
        pixel = farthest_pixel(scene)
        weights = attention_of(net, as_batch([scene], settings)["image"], pixel if settings.clip > 1 else pixel[1:])
        if weights is None:
            return None
        example = example or torch.round(weights * 10_000).int().tolist()
        positions = region_of(scene, pixel, weights.shape)
        found.append(bool(positions.flat[int(weights.argmax())]))
        counts = of_classes[CLASSES[scene.labels[pixel] - 1][0]]
        counts[0] += 1
        counts[1] += found[-1]
        mass.append(float(weights.numpy()[positions].sum()))
        region.append(float(positions.mean()))
    return {
        "images": len(found),
        "found": sum(found),
        "of_classes": of_classes,
        "mass": float(np.mean(mass)),
        "region": float(np.mean(region)),
        "example": example,
    }
