"""The authors' training and evaluation of CCNet on Cityscapes in plain NumPy and torch, as their code defines them.

Schedule (lr_poly), losses (CriterionDSN, CriterionOhemDSN), augmentation (CSDataSet), and predict_sliding. It is
independent of ccgpu.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.train.recipes.drawn import Crop

IGNORED = 255


def learning_rates(steps: int, lr: float = 0.01, power: float = 0.9) -> list[float]:
    """The learning rate of each step."""
    return [lr * (1 - float(step) / steps) ** power for step in range(steps)]


def loss(logits: Tensor, auxiliary: Tensor, label: Tensor) -> Tensor:
    """CriterionDSN of upsampled logits: both heads' cross-entropies, averaged over the labelled pixels."""
    main, other = (F.cross_entropy(scores, label, ignore_index=IGNORED) for scores in (logits, auxiliary))
    return main + 0.4 * other


def ohem_loss(logits: Tensor, auxiliary: Tensor, label: Tensor, threshold: float = 0.7, kept: int = 100_000) -> Tensor:
    """CriterionOhemDSN of one process's upsampled logits."""
    main = F.cross_entropy(logits, hard_label(logits, label, threshold, kept), ignore_index=IGNORED)
    return main + 0.4 * F.cross_entropy(auxiliary, label, ignore_index=IGNORED)


def hard_label(logits: Tensor, label: Tensor, threshold: float, kept: int) -> Tensor:
    """The label with all but the hard pixels ignored; the threshold is found at 1/8 of the size."""
    probabilities = logits.detach().softmax(1).numpy()
    target = label.numpy()
    rows, columns = (_places(extent, round(extent / 8)) for extent in target.shape[1:])
    nearest = target[:, np.floor(rows + 0.5).astype(int)[:, None], np.floor(columns + 0.5).astype(int)]
    small = _linear(_linear(probabilities, rows, 2), columns, 3)
    found = np.array(
        [small[b, nearest[b, y, x], y, x] for b, y, x in np.ndindex(*nearest.shape) if nearest[b, y, x] != IGNORED]
    )
    k = kept // 64
    if k >= len(found):
        limit = 1.0
    else:
        limit = max(threshold, np.sort(found)[k - 1]) if k > 0 else threshold
    own = np.take_along_axis(probabilities, np.where(target == IGNORED, 0, target)[:, None], axis=1)[:, 0]
    return torch.from_numpy(np.where(own <= limit, target, IGNORED))


def _places(extent: int, new: int) -> np.ndarray:
    """Where scipy's zoom samples an axis of `extent` pixels at `new` positions: corners aligned."""
    return np.arange(new) * ((extent - 1) / max(new - 1, 1))


def _linear(values: np.ndarray, places: np.ndarray, axis: int) -> np.ndarray:
    low = np.minimum(places.astype(int), values.shape[axis] - 1)
    high = np.minimum(low + 1, values.shape[axis] - 1)
    share = (places - low).reshape([-1 if a == axis else 1 for a in range(values.ndim)])
    return values.take(low, axis) * (1 - share) + values.take(high, axis) * share


def draw(size: tuple[int, int], crop: tuple[int, int], generator: np.random.Generator) -> Crop:
    """The crop of a sample of an image of `size` (CSDataSet's generate_scale_label, crop and mirror)."""
    scale = 0.7 + generator.integers(0, 15) / 10.0
    height, width = (round(extent * scale) for extent in size)  # cv2.resize rounds halves to even, as round does
    top, left = (
        int(generator.integers(0, max(extent, side) - side + 1))
        for extent, side in zip((height, width), crop, strict=True)
    )
    return Crop((height, width), (top, left), bool(generator.integers(2)))


def windows(net: Callable[[Tensor], Tensor], images: Tensor, side: int = 769) -> Tensor:
    """predict_sliding: the mean over the square windows that contain a pixel of their logits; small images are padded.

    The step is two thirds of a window's side, rounded up: 513 for 769.
    """
    step = math.ceil(side * (1 - 1 / 3))
    height, width = images.shape[2:]
    rows, columns = (math.ceil((extent - side) / step) + 1 for extent in (height, width))
    total: Tensor | None = None
    count = torch.zeros(height, width, dtype=images.dtype)
    for row in range(max(rows, 1)):
        for column in range(max(columns, 1)):
            bottom, right = min(row * step + side, height), min(column * step + side, width)
            top, left = max(bottom - side, 0), max(right - side, 0)
            part = images[:, :, top:bottom, left:right]
            logits = net(F.pad(part, (0, side - part.shape[3], 0, side - part.shape[2])))
            if total is None:
                total = torch.zeros(*logits.shape[:2], height, width, dtype=logits.dtype)
            total[:, :, top:bottom, left:right] += logits[:, :, : bottom - top, : right - left]
            count[top:bottom, left:right] += 1
    assert total is not None
    return total / count
