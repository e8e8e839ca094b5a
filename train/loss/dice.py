"""The soft Dice loss: one minus the overlap of the predicted probabilities and the labels, averaged over classes."""

from __future__ import annotations

import torch

from ccgpu.models.labels import IGNORE
from ccgpu.train.distributed import differentiable_sum
from ccgpu.train.loss.inputs import check_shapes, precise

# s, in pixels: it keeps the loss of a class of few pixels smooth, and is nothing beside a class of many.
SMOOTH = 1.0


def dice_loss(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return the soft Dice loss of the global batch.

        dice = 1 - 1 / |C| sum over c in C of (2 sum_i p_ic y_ic + s) / (sum_i p_ic + sum_i y_ic + s),    s = 1 pixel

    p = softmax(logits), y_ic is 1 where pixel i is of class c and 0 elsewhere; i runs over the labelled pixels of all
    images of all processes, and C are the classes that occur in them. Every class has the same share of the loss,
    however few its pixels. Without a labelled pixel, loss and gradients are 0.

    Every process returns the loss of the global batch, and gradients averaged over the processes
    (`DistributedDataParallel`) equal those of one process with the global batch. Saved for backward: 5 bytes for each
    logit (float32).

    Args:
        logits: (B, classes, *S), floating point; computed in float32 at least.
        label: (B, *S) int64, 0 .. classes - 1, or 255 for ignored pixels.

    Returns:
        0-d tensor, 0 .. 1.

    Raises:
        ValueError: the shapes do not fit each other.

    Source: Milletari et al., "V-Net: Fully Convolutional Neural Networks for Volumetric Medical Image Segmentation",
    2016, whose divisor has p squared; the plain sum is Dice's own coefficient for y and p of 0 and 1.

    Examples:
        >>> import torch
        >>> from ccgpu.train.loss.dice import dice_loss
        >>> round(dice_loss(torch.zeros(1, 2, 1, 4), torch.tensor([[[0, 0, 0, 255]]])).item(), 4)
        0.2727
    """
    check_shapes("dice_loss", logits, label)
    # Autocast would compute the matrix product in half precision.
    with torch.autocast(logits.device.type, enabled=False):
        probabilities = torch.softmax(precise(logits), dim=1).flatten(2)  # (B, K, N)
        # One byte each, because the comparison reads the labels once for every class.
        truth = label.flatten(1)[:, None].to(torch.uint8)  # (B, 1, N)
        member = truth == torch.arange(logits.shape[1], dtype=torch.uint8, device=label.device)[:, None]
        labelled = (truth != IGNORE).to(probabilities.dtype)
        # Sums over masked maps, because indexing by class would sum with atomics in backward, in varying order.
        overlap = torch.where(member, probabilities, 0).sum((0, 2))
        predicted = (probabilities @ labelled.mT).sum((0, 2))
        pixels = member.sum((0, 2), dtype=probabilities.dtype)
        # Over all processes; `category_consistent_loss` says why the averaged gradients are those of one process.
        overlap, predicted, pixels = differentiable_sum(torch.stack([overlap, predicted, pixels]))
        present = pixels > 0
        missed = 1 - (2 * overlap + SMOOTH) / (predicted + pixels + SMOOTH)
        return (missed * present).sum() / present.sum().clamp(min=1)
