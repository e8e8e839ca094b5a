"""The training loss of the global batch, the sum of up to three weighted losses.

They are the cross-entropy of all pixels or of the hard ones alone, the auxiliary head's cross-entropy, and the category
consistent loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ccgpu.models.ccnet import Outputs
from ccgpu.models.labels import IGNORE
from ccgpu.train.consistency import category_consistent_loss
from ccgpu.train.distributed import rank, sum_over_processes, world_size

# Weight of the auxiliary head's loss (Huang et al., TPAMI 2020, section 4.2; PSPNet uses the same).
AUXILIARY_WEIGHT = 0.4
# The authors' OHEM (online hard example mining) finds its threshold at 1/8 of the image's height and width.
SHRINK = 8


class Loss(NamedTuple):
    """The loss and its parts, 0-d; the mean of each over the processes is its value for the global batch.

    Attributes:
        total: the loss, differentiable.
        parts: its parts by name, detached and unweighted: "main", "auxiliary" (0 without that head), and with the
            category consistent loss "variance", "distance", "regularity".
    """

    total: torch.Tensor
    parts: dict[str, torch.Tensor]


def global_cross_entropy(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return this process's share of the cross-entropy of the global batch.

        share = world_size / N * sum over own valid pixels of -log softmax(logits)[label]

    N counts the valid pixels (label != 255) of *all* processes. `DistributedDataParallel` averages gradients over
    processes; with the factor world_size the average is the gradient of the mean over the global batch, whatever the
    share of ignored pixels in each process. With one process the result is the mean over the valid pixels.

    Args:
        logits: (B, classes, *S), floating point; computed in float32 at least.
        label: (B, *S) int64, 0 .. classes - 1, or 255 for ignored pixels.

    Returns:
        0-d tensor; the mean of the shares over the processes is the loss of the global batch. Without a valid pixel in
        any process, loss and gradients are 0.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    _check_shapes("global_cross_entropy", logits, label)
    total = F.cross_entropy(_precise(logits), label, ignore_index=IGNORE, reduction="sum")
    valid = sum_over_processes((label != IGNORE).sum())
    return total * (world_size() / valid.clamp(min=1).to(total.dtype))


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
        >>> from ccgpu.train.losses import label_at
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
    _check_shapes("ohem_label", logits, label)
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
    probabilities = torch.softmax(_precise(scores), dim=0).reshape(len(scores), *frames.shape)  # (K, T, H, W)
    size = [max(round(extent / SHRINK), 1) for extent in target.shape[-2:]]
    shrunk = F.interpolate(probabilities, size, mode="bilinear", align_corners=True)
    sample = label_at(frames, (size[0], size[1]))
    small = _of_class(shrunk, sample).masked_fill(sample == IGNORE, math.inf)
    return _of_class(probabilities, frames).reshape(target.shape), small.flatten()


def _of_class(probabilities: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the probabilities (*S) of the target classes out of (K, *S); ignored pixels get class 0's."""
    return probabilities.gather(0, target.masked_fill(target == IGNORE, 0)[None])[0]


@dataclass(frozen=True)
class ConsistencyWeights:
    """Weights of the terms of `category_consistent_loss` in the total loss, and its arguments; defaults: the paper's.

    Attributes:
        variance: weight of the variance, 0 or more.
        distance: weight of the distance, 0 or more.
        regularity: weight of the regularity, 0 or more.
        delta_v: argument of `category_consistent_loss`.
        delta_d: argument of `category_consistent_loss`.
        form: argument of `category_consistent_loss`.
    """

    variance: float = 1.0
    distance: float = 1.0
    regularity: float = 0.001
    delta_v: float = 0.5
    delta_d: float = 1.5
    form: str = "piecewise"


@dataclass(frozen=True)
class Criterion:
    """The training loss of a network's outputs.

        total = main + auxiliary_weight * auxiliary
                + weights.variance * variance + weights.distance * distance + weights.regularity * regularity

    main and auxiliary are each a `global_cross_entropy`, main of the hard pixels alone if `ohem` is set; the last three
    are the `category_consistent_loss` of the embedding, with the label resized to its positions (`label_at`).

    Attributes:
        auxiliary_weight: weight of the auxiliary head's loss, 0 or more.
        ohem: threshold and kept of `ohem_label`; None for all pixels.
        consistency: weights of the category consistent loss; None: that loss is left out.

    Examples:
        >>> import torch
        >>> from ccgpu.train.losses import Criterion
        >>> loss = Criterion()(torch.zeros(1, 4, 2, 2), torch.tensor([[[0, 1], [2, 255]]]))
        >>> round(loss.total.item(), 4), list(loss.parts)
        (1.3863, ['main', 'auxiliary'])
    """

    auxiliary_weight: float = AUXILIARY_WEIGHT
    ohem: tuple[float, int] | None = None
    consistency: ConsistencyWeights | None = None

    def __call__(self, outputs: torch.Tensor | Outputs, label: torch.Tensor) -> Loss:
        """Return the loss of a batch.

        Args:
            outputs: outputs of a `CCNet` in train mode, floating point, or its logits alone: logits and auxiliary
                logits (B, classes, *S), embedding (B, E, *S') of the features' size.
            label: (B, *S) int64, 0 .. classes - 1, or 255 for ignored pixels.

        Raises:
            ValueError: the shapes do not fit each other, or `consistency` is set and there is no embedding.
        """
        logits, auxiliary, embedding = Outputs(outputs) if isinstance(outputs, torch.Tensor) else outputs
        total = global_cross_entropy(logits, label if self.ohem is None else ohem_label(logits, label, *self.ohem))
        parts = {"main": total.detach(), "auxiliary": torch.zeros_like(total.detach())}
        if auxiliary is not None:
            share = global_cross_entropy(auxiliary, label)
            total = total + self.auxiliary_weight * share
            parts["auxiliary"] = share.detach()
        if self.consistency is not None:
            if embedding is None:
                raise ValueError(
                    "Criterion: outputs must have an embedding for the category consistent loss, got none; build the "
                    "network with CCNet(..., embedding=16)."
                )
            weights = self.consistency
            terms = category_consistent_loss(
                embedding,
                label_at(label, tuple(embedding.shape[2:])),
                num_classes=logits.shape[1],
                delta_v=weights.delta_v,
                delta_d=weights.delta_d,
                form=weights.form,
            )
            total = total + weights.variance * terms.variance
            total = total + weights.distance * terms.distance + weights.regularity * terms.regularity
            parts |= {name: term.detach() for name, term in terms._asdict().items()}
        return Loss(total, parts)


def _precise(scores: torch.Tensor) -> torch.Tensor:
    return scores if scores.dtype == torch.float64 else scores.float()


def _check_shapes(function: str, logits: torch.Tensor, label: torch.Tensor) -> None:
    if logits.ndim < 3 or label.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(
            f"{function}: label must have the shape (B, *S) of logits (B, classes, *S), got {tuple(label.shape)} for "
            f"{tuple(logits.shape)}; upsample the logits first."
        )
