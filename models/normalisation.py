"""Conversion of images to a network's input and back, by mean and standard deviation of each channel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

# Mean and standard deviation of ImageNet's training images, RGB in 0..255: the normalisation of ImageNet backbones.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Normalise:
    """Image or clip -> network input: (value - mean) / std per channel, float32, channels first.

    Args:
        mean: subtracted, RGB in 0..255.
        std: divisor, RGB in 0..255, positive.

    Raises:
        ValueError: mean or std is not three finite values, or a std is not positive.
    """

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not np.isfinite(values).all():
                raise ValueError(f"Normalise: {name} must be three finite numbers, got {values}; give R, G, B.")
        if min(self.std) <= 0:
            raise ValueError(f"Normalise: std must be positive, got {self.std}; give 1 to keep the scale.")

    def __call__(self, image: np.ndarray) -> torch.Tensor:
        """Return the normalised image or clip.

        Args:
            image: uint8 (H, W, 3) or (T, H, W, 3), RGB.

        Returns:
            float32 (3, H, W) or (3, T, H, W), contiguous.
        """
        scaled = (image.astype(np.float32) - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(scaled, -1, 0)))

    def denormalise(self, image: torch.Tensor) -> np.ndarray:
        """Return the image or clip of a network input, rounded and clipped to 0..255: the inverse of the call.

        Args:
            image: floating point (3, H, W) or (3, T, H, W), any device.

        Returns:
            uint8 (H, W, 3) or (T, H, W, 3), RGB.
        """
        values = np.moveaxis(image.detach().cpu().float().numpy(), 0, -1)
        pixels = values * np.array(self.std, np.float32) + np.array(self.mean, np.float32)
        return pixels.round().clip(0, 255).astype(np.uint8)
