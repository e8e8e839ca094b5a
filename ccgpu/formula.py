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
from torch import Tensor

from ccgpu.layouts import energy_dtype


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor]:
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
    lines = [_map(_lines(queries, axis) @ _lines(keys, axis).transpose(-1, -2), axis) for axis in axes]
    energies = torch.cat(lines, -1)
    if len(lines) > 1:
        sizes = q.shape[2:]
        source = torch.arange(sum(sizes) - len(sizes) + 1, device=q.device)
        for own in _repeated(sizes, q.device):
            source = torch.where(source < own, source, source + 1)
        energies = energies.gather(-1, source.expand(*energies.shape[:-1], -1))
    return _channels_first(energies)


def aggregate(weights: Tensor, v: Tensor) -> Tensor:
    """Return the sums of `ccgpu.aggregate`, a differentiable function of weights and v."""
    wide = energy_dtype(v.dtype)
    sizes = v.shape[2:]
    joint = _channels_last(weights.to(wide))
    if len(sizes) > 1:
        place = source = torch.arange(sum(sizes), device=v.device)
        for own in _repeated(sizes, v.device):
            source = torch.where(place > own, source - 1, source)
        joint = joint.gather(-1, source.expand(*joint.shape[:-1], -1))
        for own in _repeated(sizes, v.device):
            joint = joint.masked_fill(place == own, 0.0)
    return _sums(joint.split([*sizes], -1), _channels_last(v.to(wide))).to(v.dtype)


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


def _repeated(sizes: Sequence[int], device: torch.device) -> list[Tensor]:
    """Return where a position is on all its lines but the last, among the sum(sizes) places of these one after another.

    The result for an axis has the shape of the map with 1 for other axes, and 1 for the places. No tensor here has the
    size N - 1, which torch.export would compare with 1, and so refuse maps with lines of two positions.
    """
    places = []
    for axis, size in enumerate(sizes[:-1]):
        place = torch.arange(size, device=device) + sum(sizes[:axis])
        places.append(place.reshape(-1, *(1 for _ in sizes[axis:])))
    return places
