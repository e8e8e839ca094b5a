"""Online hard example mining (OHEM): which pixels of the global batch are hard."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ccgpu.models.labels import IGNORE
from ccgpu.train.distributed import rank, sum_over_processes, world_size
from ccgpu.train.loss.inputs import check_shapes, label_at, precise

# The authors' OHEM finds its threshold at 1/8 of the image's height and width.
SHRINK = 8


@torch.no_grad()
def ohem_label(logits: torch.Tensor, label: torch.Tensor, threshold: float = 0.7, kept: int = 100_000) -> torch.Tensor:
    """Return the label with all but the global batch's hard pixels ignored: online hard example mining (OHEM).

        p     = softmax(logits)[label], the probability of a pixel's true class
        k     = kept // 64
        limit = max(threshold, k-th smallest p at 1/8 of the size), infinity where no more than k pixels are valid there
        hard: p <= limit

    1/8 of the size n of an axis is round(n / 8) positions, at least 1, corners aligned; probabilities are resized
    bilinearly, labels to the nearest (`label_at`), frames of a clip one by one. A NaN probability counts as hard, so
    that the loss becomes NaN too.

    One limit holds for all images of all processes, whereas the authors' code finds one in each process: their 100000
    in each of four processes are kept=400000 here.

    The host does not wait for the device; there is no gradient. Memory: the probabilities of one image or clip,
    (classes, *S) in float32.

    Args:
        logits: (B, classes, H, W) or (B, classes, T, H, W), B 1 or more, floating point, of the main head.
        label: (B, *S) int64, 0 .. classes - 1, or 255 for ignored pixels. All processes have the same shape.
        threshold: pixels with a probability of at most this are always hard, 0 .. 1; the authors' is 0.7.
        kept: approximate minimum number of pixels to keep, 0 or more; the authors' is 400000.

    Returns:
        (B, *S) int64: label, 255 where the pixel is not hard.

    Raises:
        ValueError: the shapes do not fit each other, or an argument is out of its range.

    Source: Shrivastava et al., "Training Region-based Object Detectors with Online Hard Example Mining", 2016; the rule
    for pixels is the authors' code (loss/loss.py).
    """
    check_shapes("ohem_label", logits, label)
    if logits.ndim not in (4, 5):
        raise ValueError(
            "ohem_label: logits must be (B, classes, H, W) or (B, classes, T, H, W), got shape "
            f"{tuple(logits.shape)}; give the images both axes."
        )
    if not (0 <= threshold <= 1 and kept >= 0):
        raise ValueError(
            f"ohem_label: threshold must be from 0 to 1 and kept 0 or more, got {threshold} and {kept}; the authors' "
            "are 0.7 and 400000."
        )
    found = [_true_probabilities(*image) for image in zip(logits, label, strict=True)]
    small = torch.cat([sample for _, sample in found])
    # Each process fills its own row and leaves the others 0, so the sum over the processes gathers all rows.
    rows = small.new_zeros(world_size(), small.numel())
    rows[rank()] = small
    ranked = sum_over_processes(rows).flatten().sort().values
    valid = ranked.isfinite().sum()
    # Place k holds the k-th smallest; place 0 holds -infinity, so that k = 0 leaves the threshold as the limit.
    places = F.pad(ranked, (1, 0), value=-math.inf)
    k = kept // SHRINK**2
    limit = places[min(k, ranked.numel())].clamp(min=threshold)
    limit = torch.where(valid <= k, math.inf, limit)
    return torch.where(torch.stack([p for p, _ in found]) > limit, IGNORE, label)


def _true_probabilities(scores: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the true class's probability at each pixel, (*S), and at 1/8 of the size, flattened.

    In the second, ignored pixels have infinity.
    """
    frames = target.reshape(-1, *target.shape[-2:])
    probabilities = torch.softmax(precise(scores), dim=0).reshape(len(scores), *frames.shape)  # (K, T, H, W)
    size = [max(round(extent / SHRINK), 1) for extent in target.shape[-2:]]
    shrunk = F.interpolate(probabilities, size, mode="bilinear", align_corners=True)
    sample = label_at(frames, (size[0], size[1]))
    small = _of_class(shrunk, sample).masked_fill(sample == IGNORE, math.inf)
    return _of_class(probabilities, frames).reshape(target.shape), small.flatten()


def _of_class(probabilities: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the probabilities (*S) of the target classes out of (K, *S); ignored pixels get class 0's."""
    return probabilities.gather(0, target.masked_fill(target == IGNORE, 0)[None])[0]
