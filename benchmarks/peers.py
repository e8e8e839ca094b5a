"""Other formulations of criss-cross attention, as public code has them: the authors' and mmcv's, and dense attention.

Inputs q, k (B, D, *S) and v (B, C, *S) with two or three axes S; the result is (B, C, *S).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def _no_centre(n: int, like: Tensor) -> Tensor:
    return torch.diag(like.new_full((n,), -math.inf))


def authors_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return out by the authors' formulation: lines copied into batches, bmm, one softmax over the joined energies."""
    axes = q.ndim - 2

    def lines(x: Tensor, axis: int) -> Tensor:
        """Return (B * other sizes, channels, N), a copy."""
        return x.movedim((1, 2 + axis), (-2, -1)).contiguous().flatten(0, -3)

    def batch(axis: int) -> tuple[int, ...]:
        return (q.shape[0], *(n for i, n in enumerate(q.shape[2:]) if i != axis))

    energies = []
    for axis in range(axes):
        energy = torch.bmm(lines(q, axis).transpose(1, 2), lines(k, axis))
        if axis != axes - 1:
            energy = energy + _no_centre(energy.shape[-1], q)
        energies.append(energy.unflatten(0, batch(axis)).movedim(-2, 1 + axis))
    weights = torch.softmax(torch.cat(energies, -1), -1).split(list(q.shape[2:]), -1)
    parts = []
    for axis, weight in enumerate(weights):
        line = weight.movedim(1 + axis, -2).contiguous().flatten(0, -3)
        part = torch.bmm(lines(v, axis), line.transpose(1, 2)).unflatten(0, batch(axis))
        parts.append(part.movedim((-2, -1), (1, 2 + axis)))
    return sum(parts[1:], start=parts[0])


# The energies of each axis, and their products with v: position b ... attends to i along the axis.
_EINSUM = {
    2: (("bchw,bciw->bwhi", "bchw,bchj->bhwj"), ("bciw,bhwi->bchw", "bchj,bhwj->bchw")),
    3: (
        ("bcthw,bcihw->bhwti", "bcthw,bctiw->btwhi", "bcthw,bcthi->bthwi"),
        ("bcihw,bthwi->bcthw", "bctiw,bthwi->bcthw", "bcthi,bthwi->bcthw"),
    ),
}
# From (b, the other axes, the axis, i) back to (b, *S, i).
_TO_MAP = {2: ((0, 2, 1, 3), (0, 1, 2, 3)), 3: ((0, 3, 1, 2, 4), (0, 1, 3, 2, 4), (0, 1, 2, 3, 4))}


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return out by mmcv's formulation: an einsum for each axis before and after one softmax of the joined energies."""
    axes = q.ndim - 2
    energies = []
    for axis, (equation, order) in enumerate(zip(_EINSUM[axes][0], _TO_MAP[axes], strict=True)):
        energy = torch.einsum(equation, q, k)
        if axis != axes - 1:
            energy = energy + _no_centre(energy.shape[-1], q)
        energies.append(energy.permute(order))
    weights = torch.softmax(torch.cat(energies, -1), -1).split(list(q.shape[2:]), -1)
    first, *others = (torch.einsum(e, v, w) for e, w in zip(_EINSUM[axes][1], weights, strict=True))
    return sum(others, start=first)


def dense_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return non-local attention, of every position to every position: another function, to compare its cost."""
    query, key, value = (x.flatten(2).transpose(1, 2).unsqueeze(1) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(query, key, value, scale=1.0)
    return out.squeeze(1).transpose(1, 2).unflatten(2, q.shape[2:])
