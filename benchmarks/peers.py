"""Other formulations of criss-cross attention, for comparison, and dense attention.

The authors' and mmcv's are those of public code. `batched_products` is the shortest one whose products take
channels-last memory as it is.

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


def _orders(axes: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Return, for each axis, the orders of dimensions that `batched_products` permutes by.

    The first gives the rows of an axis's lines, (B, other sizes, N, channels) of (B, channels, *S), the second gives
    (B, other sizes, N, X) of (B, *S, X), and the third is the inverse of the second.
    """
    orders = []
    for axis in range(axes):
        outer = [0, *(1 + i for i in range(axes) if i != axis)]
        pixels = [*outer, 1 + axis, 1 + axes]
        lines = [0, *(i + 1 for i in outer[1:]), 2 + axis, 1]
        orders.append((lines, pixels, [pixels.index(i) for i in range(axes + 2)]))
    return orders


_ORDERS = {axes: _orders(axes) for axes in (1, 2, 3)}


def batched_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return out by torch's batched products of views: q @ k^T for each axis, one softmax, its weights times v."""
    sizes, energies = q.shape[2:], []
    for axis, (lines, _, pixels) in enumerate(_ORDERS[len(sizes)]):
        energy = q.permute(lines) @ k.permute(lines).transpose(-2, -1)
        if axis != len(sizes) - 1:
            energy = energy + _no_centre(sizes[axis], q)
        energies.append(energy.permute(pixels))
    weights = torch.softmax(torch.cat(energies, -1), -1).split(list(sizes), -1)
    orders = zip(weights, _ORDERS[len(sizes)], strict=True)
    parts = [(weight.permute(line) @ v.permute(lines)).permute(pixels) for weight, (lines, line, pixels) in orders]
    return sum(parts[1:], start=parts[0]).movedim(-1, 1)


def dense_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return non-local attention, of every position to every position: another function, to compare its cost."""
    query, key, value = (x.flatten(2).transpose(1, 2).unsqueeze(1) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(query, key, value, scale=1.0)
    return out.squeeze(1).transpose(1, 2).unflatten(2, q.shape[2:])
