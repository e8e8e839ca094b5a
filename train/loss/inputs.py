"""Logits and labels as the losses take them: their shapes compared, their precision, labels at other sizes."""

from __future__ import annotations

import torch


def precise(scores: torch.Tensor) -> torch.Tensor:
    """Return scores in float32 at least, because losses of half-precision logits are computed in float32."""
    return scores if scores.dtype == torch.float64 else scores.float()


def check_shapes(function: str, logits: torch.Tensor, label: torch.Tensor) -> None:
    """Raise ValueError unless label (B, *S) fits logits (B, classes, *S)."""
    if logits.ndim < 3 or label.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(
            f"{function}: label must have the shape (B, *S) of logits (B, classes, *S), got {tuple(label.shape)} for "
            f"{tuple(logits.shape)}; upsample the logits first."
        )


def label_at(label: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Return a label map resized to the positions of a feature map: nearest neighbour, corners aligned.

    Position i of n' takes pixel round(i (n - 1) / (n' - 1)) of n, halves rounded up; if n' is 1, it takes pixel 0.

    Args:
        label: (B, *S) of any dtype.
        size: shape of the feature map, (H', W') or (T, H', W'), each 1 or more.

    Returns:
        (B, *size), of label's dtype.

    Raises:
        ValueError: size has another number of axes, or an extent below 1.

    Examples:
        >>> import torch
        >>> from ccgpu.train.loss.inputs import label_at
        >>> label_at(torch.arange(9)[None], (4,))
        tensor([[0, 3, 5, 8]])
    """
    if label.ndim != 1 + len(size) or min(size, default=1) < 1:
        raise ValueError(
            f"label_at: size must be an extent of 1 or more for each axis but the first of label, got {size} for "
            f"{tuple(label.shape)}; pass the map's shape from its third axis on."
        )
    axes = []
    for extent, positions in zip(label.shape, (len(label), *size), strict=True):
        span = max(positions - 1, 1)
        index = torch.arange(positions, device=label.device)
        axes.append((2 * index * (extent - 1) + span) // (2 * span))
    return label[torch.meshgrid(*axes, indexing="ij")]
