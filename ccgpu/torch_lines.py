"""Criss-cross attention on torch's own matrix products: the CPU path, and any device without kernels of its own.

A criss-cross is a union of lines, one an axis, so the whole computation is products of small matrices, one a line. In
channels-last memory every line of every axis is a strided matrix with contiguous rows, which a batched GEMM takes as it
is: nothing is permuted or copied. Inputs in another layout are brought into it, one group of images at a time.

Forward: energies E = scale Q K^T a line, their log-sum-exp, merged over the axes; then out += exp(E - lse) V.
Backward: P = exp(E - lse) again from the saved lse, dP = dO V^T, dS = P (dP - delta), dQ += scale dS K,
dK += scale dS^T Q, dV += P^T dO, with delta_u = dout_u . out_u - dlse_u.

Half precision is computed in float32 on the CPU, whose float16 products are 100 times slower than float32 ones; other
devices multiply in the input's dtype. Energies and the softmax are float32 (float64 for float64 inputs) everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Energies kept between the two passes of forward, and formed at once. Measured at 97x97 on two cores: one piece of
# 3.7 MB an axis is as fast as pieces that fit the L2 cache, and keeping the energies is 1.2 times faster than forming
# them twice; larger maps form them twice, so that temporaries stay bounded.
KEPT_BYTES = {"cpu": 64 * 2**20}
KEPT_BYTES_ELSEWHERE = 1024 * 2**20
# A line crosses images in memory; below this many energies an image copying its lines into one batch costs less than
# a call for each image does (a call is worth about 5 us, a 16x16 map's product 30 us).
SMALL_IMAGE_ENERGIES = 4096


class Piece(NamedTuple):
    """Some lines of one axis: indices into the (outer, inner, N, channels) view of a map."""

    outer: slice
    inner: slice


class Axis:
    """One spatial axis of channels-last maps (B, *S, channels): its lines, and products over them."""

    def __init__(self, batch: int, sizes: tuple[int, ...], axis: int, energy_bytes: int, limit: int) -> None:
        self.length = sizes[axis]
        self.outer = batch * math.prod(sizes[:axis])
        self.inner = math.prod(sizes[axis + 1 :])
        # The centre counts once: on the last axis.
        self.masked = axis != len(sizes) - 1
        self.bytes = self.outer * self.inner * self.length**2 * energy_bytes
        self._lines = max(1, limit // (self.length**2 * energy_bytes))

    def pieces(self) -> Iterator[Piece]:
        """Yield all lines, at most the limit's bytes of energies at a time."""
        if self.inner == 1 or self.inner * self.length**2 <= SMALL_IMAGE_ENERGIES:
            step = max(1, self._lines // self.inner)
            for start in range(0, self.outer, step):
                yield Piece(slice(start, start + step), slice(None))
            return
        for outer in range(self.outer):
            for start in range(0, self.inner, self._lines):
                yield Piece(slice(outer, outer + 1), slice(start, start + self._lines))

    def _view(self, x: Tensor, piece: Piece) -> Tensor:
        """Return the piece of x (B, *S, channels) as (outer, inner, N, channels), a view."""
        return x.view(self.outer, self.length, self.inner, x.shape[-1]).transpose(1, 2)[piece.outer, piece.inner]

    def lines(self, x: Tensor, piece: Piece) -> Tensor:
        """Return the piece's lines as matrices (lines, N, channels): a view where memory allows, else a copy."""
        return self._view(x, piece).flatten(0, 1)

    def column(self, x: Tensor, piece: Piece) -> Tensor:
        """Return one number a position, x (B, *S), as (lines, N, 1)."""
        return self.lines(x.unsqueeze(-1), piece)

    def store(self, x: Tensor, piece: Piece, values: Tensor) -> None:
        """Write (lines, N, channels) values into x at the piece."""
        target = self._view(x, piece)
        target.copy_(values.view(target.shape))

    def add_product(self, x: Tensor, piece: Piece, a: Tensor, b: Tensor, *, first: bool) -> None:
        """Add a @ b to x at the piece; the first axis writes instead, so x need not be cleared."""
        target = self._view(x, piece)
        if target.shape[0] == 1 or target.shape[1] == 1:  # the lines are one batch in memory: no temporary
            matrices = target.flatten(0, 1)
            if first:
                torch.bmm(a, b, out=matrices)
            else:
                matrices.baddbmm_(a, b)
            return
        product = torch.bmm(a, b).view(target.shape)
        if first:
            target.copy_(product)
        else:
            target.add_(product)

    def energies(self, q: Tensor, k: Tensor, piece: Piece, dtype: torch.dtype) -> Tensor:
        """Return Q K^T (lines, N, N) in `dtype`, the diagonal at -inf where the centre is counted elsewhere."""
        energies = torch.bmm(self.lines(q, piece), self.lines(k, piece).transpose(1, 2)).to(dtype)
        if self.masked:
            energies.diagonal(dim1=1, dim2=2).fill_(-math.inf)
        return energies


def _axes(batch: int, sizes: tuple[int, ...], energy_dtype: torch.dtype, limit: int) -> list[Axis]:
    """Return the axes to run, the last first; the others have nothing to add where their length is 1."""
    wanted = [len(sizes) - 1, *(a for a in range(len(sizes) - 1) if sizes[a] > 1)]
    return [Axis(batch, sizes, a, energy_dtype.itemsize, limit) for a in wanted]


def _limit(device: torch.device) -> int:
    return KEPT_BYTES.get(device.type, KEPT_BYTES_ELSEWHERE)


def _groups(q: Tensor, energy_dtype: torch.dtype) -> Iterator[slice]:
    """Yield slices of images that together stay within the limit of kept energies (at least one image each)."""
    sizes = q.shape[2:]
    image = math.prod(sizes) * sum(sizes) * energy_dtype.itemsize
    step = max(1, _limit(q.device) // 4 // max(1, image))
    for start in range(0, q.shape[0], step):
        yield slice(start, start + step)


def energy_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of energies and of lse: float64 for float64 inputs, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x (B, channels, *S) as contiguous (B, *S, channels) in `dtype`: x itself where it has that layout."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.ndim in formats:  # torch's layout change is 2.5 times faster than a strided copy
        return x.to(dtype).contiguous(memory_format=formats[x.ndim]).movedim(1, -1).contiguous()
    return x.to(dtype).movedim(1, -1).contiguous()


class _Result:
    """A (B, channels, *S) result and the channels-last array that is written: the same memory where layouts agree."""

    def __init__(self, target: Tensor, dtype: torch.dtype) -> None:
        self._target = target.movedim(1, -1)
        direct = self._target.is_contiguous() and target.dtype == dtype
        self.array = self._target if direct else torch.empty(self._target.shape, dtype=dtype, device=target.device)

    def finish(self) -> None:
        """Bring the result into its own layout and dtype."""
        if self.array is not self._target:
            self._target.copy_(self.array)


def _log_sum_exp(axes: list[Axis], q: Tensor, k: Tensor, lse: Tensor, *, keep: bool) -> list[Tensor]:
    """Write the log-sum-exp of the energies over all axes to lse (B, *S); return every piece's energies if kept."""
    kept = []
    for number, axis in enumerate(axes):
        part = lse if number == 0 else torch.empty_like(lse)
        for piece in axis.pieces():
            energies = axis.energies(q, k, piece, lse.dtype)
            axis.store(part.unsqueeze(-1), piece, torch.logsumexp(energies, -1, keepdim=True))
            if keep:
                kept.append(energies)
        if number > 0:
            torch.logaddexp(lse, part, out=lse)
    # A weight exp(inf - inf) is NaN and so is the sum of the query's weights.
    lse.masked_fill_(lse == math.inf, math.nan)
    return kept


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return out (B, C, *S) in v's dtype and layout and lse (B, *S); see `ccgpu.cca` for the formula.

    Temporaries: the energies of a group of images (at most a quarter of KEPT_BYTES, or one image's, where they are kept
    up to KEPT_BYTES), and channels-last copies of one group where the inputs have another layout or half precision.
    """
    out = torch.empty_like(v)
    wide = energy_dtype(q.dtype)
    lse = torch.empty((q.shape[0], *q.shape[2:]), dtype=wide, device=q.device)
    if out.numel() == 0:
        return out, lse
    limit, products = _limit(q.device), _product_dtype(v)
    for images in _groups(q, wide):
        result = _Result(out[images], products)
        qs, ks, vs = (_channels_last(x[images], products) for x in (q, k, v))
        if scale != 1.0:
            qs = qs * scale
        axes = _axes(vs.shape[0], tuple(q.shape[2:]), wide, limit)
        keep = sum(axis.bytes for axis in axes) <= limit
        kept = iter(_log_sum_exp(axes, qs, ks, lse[images], keep=keep))
        for number, axis in enumerate(axes):
            for piece in axis.pieces():
                weights = next(kept) if keep else axis.energies(qs, ks, piece, wide)
                weights.sub_(axis.column(lse[images], piece)).exp_()
                axis.add_product(result.array, piece, weights.to(products), axis.lines(vs, piece), first=number == 0)
        result.finish()
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv in the layouts of q, k, v, given the gradients of out and lse."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if v.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    wide, products = energy_dtype(q.dtype), _product_dtype(v)
    for images in _groups(q, wide):
        results = tuple(_Result(x[images], products) for x in (dq, dk, dv))
        qs, ks, vs, douts = (_channels_last(x[images], products) for x in (q, k, v, dout))
        if scale != 1.0:
            qs = qs * scale
        delta = (dout[images].to(wide) * out[images]).sum(1).sub_(dlse[images])
        axes = _axes(vs.shape[0], tuple(q.shape[2:]), wide, _limit(q.device) // 4)
        for number, axis in enumerate(axes):
            for piece in axis.pieces():
                _backward_lines(axis, piece, (qs, ks, vs, douts), lse[images], delta, results, first=number == 0)
        if scale != 1.0:
            results[0].array.mul_(scale)
        for result in results:
            result.finish()
    return dq, dk, dv


def _backward_lines(
    axis: Axis,
    piece: Piece,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    lse: Tensor,
    delta: Tensor,
    results: tuple[_Result, ...],
    *,
    first: bool,
) -> None:
    """Add one piece's share of dq, dk and dv (q is scaled already, dq not yet)."""
    q, k, _, _ = inputs
    qs, ks, vs, douts = (axis.lines(x, piece) for x in inputs)
    dq, dk, dv = (result.array for result in results)
    weights = axis.energies(q, k, piece, lse.dtype).sub_(axis.column(lse, piece)).exp_()
    axis.add_product(dv, piece, weights.to(vs.dtype).transpose(1, 2), douts, first=first)
    denergies = torch.bmm(douts, vs.transpose(1, 2)).to(lse.dtype)
    denergies.sub_(axis.column(delta, piece)).mul_(weights)
    denergies = denergies.to(qs.dtype)
    axis.add_product(dq, piece, denergies, ks, first=first)
    axis.add_product(dk, piece, denergies.transpose(1, 2), qs, first=first)
