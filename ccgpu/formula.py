"""Criss-cross attention in differentiable torch operations, which autograd differentiates to any order.

They run for second derivatives, under torch.func's transforms and in forward mode (`transforms`), and in exported
networks: the operations of `attention` have counterparts in ONNX. All energies are in memory at once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ccgpu.layouts import energy_dtype


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return out and lse of `ccgpu.cca`, each a differentiable function of q, k and v."""
    axes = range(q.ndim - 2)
    wide = energy_dtype(q.dtype)
    energies = []
    for axis in axes:
        lines_q, lines_k = (_lines(x, axis) for x in (q, k))
        line = scale * lines_q @ lines_k.transpose(-1, -2)
        if axis != axes[-1]:  # the centre counts once: on the last axis
            index = torch.arange(line.shape[-1], device=line.device)
            line = line.masked_fill(index == index[:, None], -math.inf)
        energies.append(line.movedim(-2, 1 + axis))
    joint = torch.cat(energies, -1)
    lse = torch.logsumexp(joint, -1)
    weights = torch.exp(joint - lse.unsqueeze(-1)).split([e.shape[-1] for e in energies], -1)
    out = torch.zeros_like(v.movedim(1, -1), dtype=wide)
    for axis, w in zip(axes, weights, strict=True):
        lines_v = _lines(v, axis)
        out = out + (w.movedim(1 + axis, -2) @ lines_v).movedim(-2, 1 + axis)
    return out.movedim(-1, 1).to(v.dtype), lse


def affinity(q: Tensor, k: Tensor) -> Tensor:
    """Return the energies of `ccgpu.affinity`, a differentiable function of q and k."""
    axes = range(q.ndim - 2)
    energies = []
    for axis in axes:
        lines_q, lines_k = (_lines(x, axis) for x in (q, k))
        line = lines_q @ lines_k.transpose(-1, -2)
        if axis != axes[-1]:
            line = torch.take_along_dim(line, _others(line.shape[-1], line.device).expand(*line.shape[:-1], -1), -1)
        energies.append(line.movedim(-2, 1 + axis))
    return torch.cat(energies, -1).movedim(-1, 1)


def aggregate(weights: Tensor, v: Tensor) -> Tensor:
    """Return the sums of `ccgpu.aggregate`, a differentiable function of weights and v."""
    sizes = v.shape[2:]
    wide = energy_dtype(v.dtype)
    counts = [*(size - 1 for size in sizes[:-1]), sizes[-1]]
    out = torch.zeros_like(v.movedim(1, -1), dtype=wide)
    for axis, w in enumerate(weights.movedim(1, -1).to(wide).split(counts, -1)):
        lines_v = _lines(v, axis)
        if axis != len(sizes) - 1:  # without the query's own position: (..., N, N - 1, C)
            others = _others(sizes[axis], v.device)
            products = w.movedim(1 + axis, -2).unsqueeze(-2) @ lines_v[..., others, :]
            line = products.squeeze(-2)
        else:
            line = w.movedim(1 + axis, -2) @ lines_v
        out = out + line.movedim(-2, 1 + axis)
    return out.movedim(-1, 1).to(v.dtype)


def _lines(x: Tensor, axis: int) -> Tensor:
    """Return a map's lines along an axis (B, *other axes, N, channels), in the dtype of energies."""
    return x.movedim(1, -1).movedim(1 + axis, -2).to(energy_dtype(x.dtype))


def _others(size: int, device: torch.device) -> Tensor:
    """Return the indices of all other positions of a line, in order, for each of its positions: (size, size - 1)."""
    index = torch.arange(size - 1, device=device).expand(size, -1)
    return index + (index >= torch.arange(size, device=device).unsqueeze(1))
