"""Criss-cross attention in differentiable torch operations, which autograd differentiates to any order.

They run for second derivatives, under torch.func's transforms and in forward mode (`transforms`), and in exported
networks (`decomposition`): all have counterparts in ONNX, and sizes come from the tensors alone, so that a trace holds
for other sizes. Inputs are converted to the dtype of energies before anything else, since runtimes compute few
operators in 16 bits. All energies are in memory at once.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ccgpu.layouts import energy_dtype


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return out and lse of `ccgpu.cca`, each a differentiable function of q, k and v."""
    axes = range(q.ndim - 2)
    queries, keys, values = (_channels_last(x.to(energy_dtype(x.dtype))) for x in (q, k, v))
    energies = []
    for axis in axes:
        line = scale * _lines(queries, axis) @ _lines(keys, axis).transpose(-1, -2)
        if axis != axes[-1]:  # the centre counts once: on the last axis
            place, own = _places(line.shape[-1], line.device)
            line = line.masked_fill(place == own, -math.inf)
        energies.append(_map(line, axis))
    joint = torch.cat(energies, -1)
    weights = torch.softmax(joint, -1).split([e.shape[-1] for e in energies], -1)
    return _sums(weights, values).to(v.dtype), torch.logsumexp(joint, -1)


def affinity(q: Tensor, k: Tensor) -> Tensor:
    """Return the energies of `ccgpu.affinity`, a differentiable function of q and k."""
    axes = range(q.ndim - 2)
    queries, keys = (_channels_last(x.to(energy_dtype(x.dtype))) for x in (q, k))
    energies = []
    for axis in axes:
        line = _lines(queries, axis) @ _lines(keys, axis).transpose(-1, -2)
        if axis != axes[-1]:  # without the query's own position: (..., N, N) -> (..., N, N - 1)
            place, own = _places(line.shape[-1], line.device)
            place = place[:-1]
            others = torch.where(place < own, place, place + 1)
            line = line.gather(-1, others.expand(*line.shape[:-1], -1))
        energies.append(_map(line, axis))
    return _channels_first(torch.cat(energies, -1))


def aggregate(weights: Tensor, v: Tensor) -> Tensor:
    """Return the sums of `ccgpu.aggregate`, a differentiable function of weights and v."""
    wide = energy_dtype(v.dtype)
    sizes = v.shape[2:]
    counts = [*(size - 1 for size in sizes[:-1]), sizes[-1]]
    lines = [*_channels_last(weights.to(wide)).split(counts, -1)]
    for axis, size in enumerate(sizes[:-1]):
        # The query's own position gets the weight 0: (..., N, N - 1) -> (..., N, N).
        line = F.pad(_lines(lines[axis], axis), (1, 0))
        place, own = _places(size, v.device)
        source = torch.where(place < own, place + 1, place).masked_fill(place == own, 0)
        lines[axis] = _map(line.gather(-1, source.expand(*line.shape[:-1], -1)), axis)
    return _sums(lines, _channels_last(v.to(wide))).to(v.dtype)


def _sums(weights: Sequence[Tensor], values: Tensor) -> Tensor:
    """Return the weighted sums of values (B, *S, C) as (B, C, *S); the weights of an axis are (B, *S, N)."""
    terms = [_map(_lines(w, axis) @ _lines(values, axis), axis) for axis, w in enumerate(weights)]
    return _channels_first(functools.reduce(operator.add, terms))


# The axes are counted from the first one: the exporter of TorchScript graphs mistakes negative ones in movedim.


def _channels_last(x: Tensor) -> Tensor:
    """(B, C, *S) -> (B, *S, C)."""
    return x.movedim(1, x.ndim - 1)


def _channels_first(x: Tensor) -> Tensor:
    """(B, *S, C) -> (B, C, *S)."""
    return x.movedim(x.ndim - 1, 1)


def _lines(x: Tensor, axis: int) -> Tensor:
    """Return a map's lines along an axis: (B, *S, C) -> (B, *other axes, N, C)."""
    return x.movedim(1 + axis, x.ndim - 2)


def _map(lines: Tensor, axis: int) -> Tensor:
    """Return lines along an axis as a map: (B, *other axes, N, C) -> (B, *S, C)."""
    return lines.movedim(lines.ndim - 2, 1 + axis)


def _places(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the places on a line of so many positions, as a row (N,) for keys and as a column (N, 1) for queries."""
    place = torch.arange(size, device=device)
    return place, place.unsqueeze(1)
