"""Conversion of images to a network's input and back, by mean and standard deviation of each channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# Mean and standard deviation of ImageNet's training images, RGB in 0..255: the normalisation of ImageNet backbones.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


def for_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return a mean or std of red, green and blue for images of `channels`: their average for each, unless it is 3."""
    return tuple(values) if channels == len(values) else (sum(values) / len(values),) * channels


@dataclass(frozen=True)
class Normalise:
    """Image or clip -> network input: (value - mean) / std per channel, float32, channels first.

    Args:
        mean: subtracted, one number for each channel, in units of the images' values; for RGB in 0..255.
        std: divisor, likewise, positive.

    Raises:
        ValueError: mean and std are not finite numbers, as many of one as of the other, or a std is not positive.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not values or len(values) != len(self.mean) or not np.isfinite(values).all():
                raise ValueError(
                    f"Normalise: {name} must be a finite number for each channel, got {values} for {len(self.mean)} "
                    "channels; give them in the channels' order, such as R, G, B."
                )
        if min(self.std) <= 0:
            raise ValueError(f"Normalise: std must be positive, got {self.std}; give 1 to keep the scale.")

    def __call__(self, image: np.ndarray) -> torch.Tensor:
        """Return the normalised image or clip.

        Args:
            image: (H, W, C) or (T, H, W, C), of any dtype.

        Returns:
            float32 (C, H, W) or (C, T, H, W), contiguous.

        Raises:
            ValueError: the image has another number of channels than mean and std.
        """
        if image.shape[-1] != len(self.mean):
            raise ValueError(
                f"Normalise: image must have {len(self.mean)} channels on its last axis, got shape {image.shape}; pass "
                "an image of the network's channels."
            )
        scaled = (image.astype(np.float32) - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(scaled, -1, 0)))

    def values(self, image: torch.Tensor) -> np.ndarray:
        """Return the image or clip of a network input in units of its values: the inverse of the call, unrounded.

        Args:
            image: floating point (C, H, W) or (C, T, H, W), any device.

        Returns:
            float32 (H, W, C) or (T, H, W, C).
        """
        values = np.moveaxis(image.detach().cpu().float().numpy(), 0, -1)
        return values * np.array(self.std, np.float32) + np.array(self.mean, np.float32)
