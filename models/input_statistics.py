"""The images that a file's first layer was trained on, as far as its batch norm tells."""

from __future__ import annotations

import torch
from torch import Tensor

# Of natural images: correlation between two channels of a pixel, and the distance in pixels at which that of two pixels
# of a channel falls to 1/e.
_BETWEEN_CHANNELS, _LENGTH = 0.9, 20.0


def trained_deviation(weight: Tensor, variance: Tensor) -> float:
    """Return an estimate of the standard deviation of the images that a first convolution was trained on.

        std = median over filters w of sqrt(variance / (w^T C w))

    C is the covariance of a patch of images of standard deviation 1: exp(-distance / 20 pixels) within a channel, times
    0.9 between two channels. The estimate tells images divided by their std (about 1) from those in 0..255 (about 58);
    it does not tell the order of channels. For the ImageNet weights of EfficientNet-Lite0 and -Lite2, trained on images
    divided by 128, whose deviation is then about 58 / 128 = 0.45, it gives 0.54 and 0.55, and 0.37 to 0.63 for any
    correlation from 0.8 to 0.97 and any length from 5 to 60 pixels.

    Args:
        weight: (filters, channels, height, width), of the convolution.
        variance: (filters,), the running variance of the batch norm behind it.

    Returns:
        The estimate in units of the convolution's input; NaN where all filters are 0.
    """
    filters, channels, height, width = weight.shape
    rows, columns = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], dim=1)
    within = torch.exp(-torch.cdist(places, places) / _LENGTH)
    between = torch.full((channels, channels), _BETWEEN_CHANNELS).fill_diagonal_(1)
    flat = weight.detach().float().cpu().reshape(filters, -1)
    energies = (flat @ torch.kron(between, within) * flat).sum(1)
    alive = energies > 0
    return float((variance.float().cpu()[alive] / energies[alive]).sqrt().nanmedian()) if alive.any() else float("nan")
