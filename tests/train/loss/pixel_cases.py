"""Logits and labels for the tests of the losses, and the cross-entropy by a plain loop."""

from __future__ import annotations

import math

import numpy as np
import torch


def cross_entropy_loop(logits: torch.Tensor, label: torch.Tensor) -> float:
    total, count = 0.0, 0
    for b in range(len(label)):
        for position in np.ndindex(*label.shape[1:]):
            true = int(label[(b, *position)])
            if true == 255:
                continue
            scores = logits[(b, slice(None), *position)].tolist()
            total += math.log(sum(math.exp(score) for score in scores)) - scores[true]
            count += 1
    return total / max(count, 1)


def random_case(seed: int, ignored: float = 0.3, size: tuple[int, ...] = (3, 4)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 5, *size, generator=generator, dtype=torch.float64) * 3
    label = torch.randint(0, 5, (2, *size), generator=generator)
    label[torch.rand(2, *size, generator=generator) < ignored] = 255
    return logits, label


def pixel_loss_loop(
    logits: torch.Tensor,
    label: torch.Tensor,
    weights: tuple[float, ...] | None = None,
    smoothing: float = 0.0,
    focal: float | None = None,
    average: str = "labelled",
) -> float:
    """Return the loss that `PixelLoss` documents, pixel by pixel; each of its sums is the one that its paper writes."""
    weights = (1.0,) * logits.shape[1] if weights is None else weights
    total, divisor = 0.0, 0.0
    for b in range(len(label)):
        for position in np.ndindex(*label.shape[1:]):
            true = int(label[(b, *position)])
            if true == 255:
                divisor += average == "all"
                continue
            scores = logits[(b, slice(None), *position)].tolist()
            odds = [math.exp(score - max(scores)) for score in scores]
            shares = [odd / sum(odds) for odd in odds]
            target = [smoothing / len(scores)] * len(scores)
            target[true] += 1 - smoothing
            if focal is None:
                total -= sum(w * t * math.log(p) for w, t, p in zip(weights, target, shares, strict=True))
            else:
                total -= weights[true] * (1 - shares[true]) ** focal * math.log(shares[true])
            divisor += weights[true]
    return total / divisor if divisor > 0 else 0.0


def dice_loop(logits: torch.Tensor, label: torch.Tensor, smooth: float = 1.0) -> float:
    """Return the soft Dice loss, a class after the other."""
    shares = torch.softmax(logits, dim=1).movedim(1, -1)[label != 255].numpy()
    classes = label[label != 255].numpy()
    terms = []
    for c in sorted({*classes.tolist()}):
        truth = (classes == c).astype(float)
        terms.append((2 * (shares[:, c] * truth).sum() + smooth) / (shares[:, c].sum() + truth.sum() + smooth))
    return 1 - sum(terms) / len(terms) if terms else 0.0
