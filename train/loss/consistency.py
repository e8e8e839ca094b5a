"""The category consistent loss: it pulls the embeddings of a class together and pushes the classes' means apart."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ccgpu.models.labels import IGNORE
from ccgpu.train.distributed import differentiable_sum, sum_over_processes

# Forms of phi for distances above delta_d.
FORMS = ("piecewise", "quadratic")


class Consistency(NamedTuple):
    """The three terms of the loss: 0-d tensors, unweighted, differentiable."""

    variance: torch.Tensor
    distance: torch.Tensor
    regularity: torch.Tensor


def category_consistent_loss(
    embedding: torch.Tensor,
    label: torch.Tensor,
    *,
    num_classes: int,
    delta_v: float = 0.5,
    delta_d: float = 1.5,
    form: str = "piecewise",
) -> Consistency:
    """Return the three terms of the category consistent loss of the global batch.

        mu_c       = 1 / N_c sum over the pixels i of class c of h_i
        variance   = 1 / |C| sum_c 1 / N_c sum_i phi(||mu_c - h_i||)
        distance   = 1 / (|C| (|C| - 1)) sum over ordered pairs a != b of max(2 delta_d - ||mu_a - mu_b||, 0)^2
        regularity = 1 / |C| sum_c ||mu_c||

        phi(d) = 0                                            d <= delta_v
                 (d - delta_v)^2                              delta_v < d <= delta_d
                 (d - delta_d) + (delta_d - delta_v)^2        delta_d < d, "piecewise"
                 (d - delta_v)^2                              delta_d < d, "quadratic"

    C are the classes that occur, N_c the number of pixels of class c; both, and the means, are over all images of all
    processes. Every process returns the loss of the global batch, and gradients averaged over the processes
    (`DistributedDataParallel`) equal those of one process with the global batch.

    If no class occurs, all terms are 0; if one occurs, the distance is 0. The gradient of a norm at 0 is 0. The host
    does not wait for the device, and the order of all sums is fixed. Sums over a class are matrix products: on CUDA
    they follow torch's float32 matmul precision (TF32 where it is allowed). Saved for backward: 4 * num_classes bytes a
    position (float32), 39 MB for 150 classes and 16 maps of 64x64.

    Args:
        embedding: h, (B, E, *S) floating point, of any memory format; computed in float32 at least, also under
            autocast.
        label: (B, *S) int64; 0 .. num_classes - 1, or 255 for ignored pixels (other values are ignored too).
        num_classes: 1 .. 255.
        delta_v: distance from the mean that costs nothing; the paper's is 0.5.
        delta_d: half the distance between two means that costs nothing, delta_v or more; the paper's is 1.5.
        form: "piecewise", the paper's phi, linear for far pixels; "quadratic", the phi of De Brabandere et al.

    Returns:
        `Consistency`; the paper weighs its terms with 1, 1 and 0.001.

    Raises:
        TypeError: embedding is not floating point, or label not int64.
        ValueError: the shapes do not fit each other, or an argument is out of its range.

    Source: Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation", TPAMI 2020; the quadratic form: De
    Brabandere et al., "Semantic Instance Segmentation with a Discriminative Loss Function", 2017. The CCNet authors did
    not release code of this loss; it follows the paper's text.

    Examples:
        >>> import torch
        >>> from ccgpu.train.loss.consistency import category_consistent_loss
        >>> embedding = torch.tensor([[[0.0, 2.0, 1.0, 7.0]]])
        >>> label = torch.tensor([[0, 0, 1, 255]])
        >>> [round(term.item(), 4) for term in category_consistent_loss(embedding, label, num_classes=2)]
        [0.125, 9.0, 1.0]
    """
    _check(embedding, label, num_classes, delta_v, delta_d, form)
    # Autocast would compute the matrix products in half precision.
    with torch.autocast(embedding.device.type, enabled=False):
        precise = embedding if embedding.dtype == torch.float64 else embedding.float()
        points = precise.movedim(1, -1).flatten(0, -2)  # (N, E)
        classes = torch.arange(num_classes, device=label.device)[:, None]
        member = label.flatten() == classes  # (K, N)
        counts = sum_over_processes(member.sum(dim=1))
        present = counts > 0
        # The divisors N_c and |C| are raised from 0 to 1: where one is 0, so is its dividend.
        pixels = counts.clamp(min=1).to(points.dtype)
        number = present.sum().clamp(min=1).to(points.dtype)
        # Matrix products with one_hot, because indexing by class would sum with atomics in backward, in varying order.
        one_hot = member.to(points.dtype)
        means = differentiable_sum(one_hot @ points) / pixels[:, None]  # (K, E), absent classes 0
        spread = _phi(torch.linalg.vector_norm(points - one_hot.T @ means, dim=1), delta_v, delta_d, form)  # (N,)
        # Each process s of W returns the global loss, L_s = L. The embeddings h_r of process r reach every L_s through
        # `differentiable_sum` alone, whose backward sums the gradients of all processes: sum_s dL_s/dh_r = W dL/dh_r.
        # DDP's average is then 1/W sum_r W dL/dh_r dh_r/dw = dL/dw, as in one process with the global batch.
        spreads = differentiable_sum(one_hot @ spread)  # (K,)
        variance = (spreads / pixels).sum() / number
        pairs = present[:, None] & present & (classes != classes.T)
        gaps = torch.linalg.vector_norm(means[:, None] - means, dim=2)
        hinge = (2 * delta_d - gaps).clamp(min=0).square()
        distance = (hinge * pairs).sum() / pairs.sum().clamp(min=1)
        regularity = torch.linalg.vector_norm(means, dim=1).sum() / number
    return Consistency(variance, distance, regularity)


def _phi(distance: torch.Tensor, delta_v: float, delta_d: float, form: str) -> torch.Tensor:
    near = (distance - delta_v).clamp(min=0).square()
    if form == "quadratic":
        return near
    return torch.where(distance > delta_d, distance - delta_d + (delta_d - delta_v) ** 2, near)


def _check(
    embedding: torch.Tensor, label: torch.Tensor, num_classes: int, delta_v: float, delta_d: float, form: str
) -> None:
    name = "category_consistent_loss"
    if not embedding.is_floating_point():
        raise TypeError(f"{name}: embedding must be floating point, got {embedding.dtype}; convert it.")
    if label.dtype != torch.int64:
        raise TypeError(f"{name}: label must be int64, got {label.dtype}; convert it with label.long().")
    if embedding.ndim < 3 or label.shape != (embedding.shape[0], *embedding.shape[2:]):
        raise ValueError(
            f"{name}: label must have the shape (B, *S) of embedding (B, E, *S), got {tuple(label.shape)} for "
            f"{tuple(embedding.shape)}; take the label at the embedding's positions with label_at."
        )
    if not 1 <= num_classes <= IGNORE:
        raise ValueError(f"{name}: num_classes must be 1 to {IGNORE}, got {num_classes}; pass the number of classes.")
    if not 0 <= delta_v <= delta_d < math.inf:
        raise ValueError(
            f"{name}: delta_v and delta_d must be 0 <= delta_v <= delta_d, got {delta_v} and {delta_d}; "
            "the paper's are 0.5 and 1.5."
        )
    if form not in FORMS:
        raise ValueError(f"{name}: form must be one of {FORMS}, got {form!r}; pass one of these.")
