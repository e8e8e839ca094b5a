"""The training loss: cross-entropy over the valid pixels of the global batch, plus the auxiliary head's."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ccgpu.train.distributed import sum_over_processes, world_size
from ccgpu.train.labels import IGNORE

# Weight of the auxiliary head's loss (Huang et al., TPAMI 2020, section 4.2; PSPNet uses the same).
AUXILIARY_WEIGHT = 0.4


class Loss(NamedTuple):
    """`total` is differentiable; `main` and `auxiliary` are its parts, detached and unweighted (0-d)."""

    total: torch.Tensor
    main: torch.Tensor
    auxiliary: torch.Tensor


def global_cross_entropy(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Compute this process's share of the cross-entropy of the global batch.

    share = world_size / N * sum over own valid pixels of -log softmax(logits)[label]

    N counts the valid pixels (label != 255) of *all* processes. `DistributedDataParallel` averages gradients
    over processes, so the factor world_size makes the averaged gradient that of the mean over the global
    batch, whatever the share of ignored pixels in each process. In one process it is the mean over the valid
    pixels.

    Args:
        logits: (B, classes, H, W), floating point; computed in float32 at least.
        label: (B, H, W) int64, 0 .. classes - 1, or 255 for ignored pixels.

    Returns:
        0-d tensor; the mean of the shares over the processes is the loss of the global batch. Where no
        process has a valid pixel it is 0 and the gradients are 0.

    Raises:
        ValueError: where the shapes do not belong together.
    """
    if logits.ndim != 4 or label.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(
            "global_cross_entropy: label must have the shape (B, H, W) of logits (B, classes, H, W), "
            f"got {tuple(label.shape)} for {tuple(logits.shape)}; upsample the logits first."
        )
    precise = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(precise, label, ignore_index=IGNORE, reduction="sum")
    valid = sum_over_processes((label != IGNORE).sum())
    return total * (world_size() / valid.clamp(min=1).to(total.dtype))


def segmentation_loss(
    outputs: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    label: torch.Tensor,
    auxiliary_weight: float = AUXILIARY_WEIGHT,
) -> Loss:
    """Compute total = main + auxiliary_weight * auxiliary, each a `global_cross_entropy`.

    Args:
        outputs: what a `CCNet` in train mode returns: the logits (B, classes, H, W), or these and the
            auxiliary head's.
        label: (B, H, W) int64, 255 is ignored.
        auxiliary_weight: weight of the auxiliary head's loss, 0 or more; the paper uses 0.4.

    Returns:
        `Loss`; without an auxiliary head its `auxiliary` is 0.
    """
    if isinstance(outputs, torch.Tensor):
        main = global_cross_entropy(outputs, label)
        return Loss(main, main.detach(), torch.zeros_like(main.detach()))
    main = global_cross_entropy(outputs[0], label)
    auxiliary = global_cross_entropy(outputs[1], label)
    return Loss(main + auxiliary_weight * auxiliary, main.detach(), auxiliary.detach())
