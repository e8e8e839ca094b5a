"""Criss-cross attention on torch's own matrix products: the CPU path, and any device without kernels of its own.

A criss-cross is a union of lines, one for each axis, so the whole computation is products of small matrices, one for
each line. In channels-last memory every line of every axis is a strided matrix with contiguous rows, which a batched
GEMM takes without a permutation or a copy. Inputs in another layout are copied into it, a slab of channels at a time.

Forward: the energies E = scale Q K^T of each line, their row maximum and row sum of exponentials, merged over the axes;
then the weights P = exp(E - row_max) / row_sum and out += P V.
Backward: P = exp(E - lse) again from the saved lse, dP = dO V^T, dS = P (dP - delta), dQ += scale dS K,
dK += scale dS^T Q, dV += P^T dO, with delta_u = dout_u . out_u - dlse_u.

Half precision is computed in float32 on the CPU, whose float16 products are 100 times slower than float32 ones; other
devices multiply in the input's dtype. Energies and the softmax are float32 (float64 for float64 inputs) everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ccgpu.bridges.torch_gemm.lines import Axis, Plan, add_product
from ccgpu.layouts import channels_last, channels_last_result

DELTA_ELEMENTS = 2**20  # products dout * out formed at once: they stay in the CPU's cache


def _exponentials(axis: Axis, piece: int, q: Tensor, k: Tensor, offset: Tensor, *, set_to_max: bool) -> Tensor:
    """Return exp(Q K^T - offset) (lines, queries, N) in offset's dtype; offset is (lines, queries, 1).

    With `set_to_max`, each query's row maximum is written to offset first (the dtype's lowest number where all energies
    are -inf, so that their sum is 0). The centre counts once in all: each of the lines through it gives it an equal
    share. Masking it on all lines but one would give 0 * inf = NaN where v is infinite.
    """
    energies = torch.bmm(q, k.transpose(1, 2)).to(offset.dtype)
    if set_to_max:
        torch.amax(energies, -1, keepdim=True, out=offset).clamp_(min=torch.finfo(offset.dtype).min)
    exponentials = energies.sub_(offset).exp_()
    if axis.share != 1.0:
        exponentials.diagonal(offset=axis.start(piece), dim1=1, dim2=2).mul_(axis.share)
    return exponentials


class _Softmax:
    """The softmax over all lines through a position, line by line.

    Its weights are exp(E - row_max) / row_sum, as exact as a softmax of the joined energies; exp(E - lse) would carry
    the rounding error of lse, which grows with the energies.
    """

    def __init__(self, axes: list[Axis], q: Tensor, k: Tensor, dtype: torch.dtype, *, cache: bool) -> None:
        """Compute row maximum and row sum over all axes; with `cache`, hold on to the exponentials for `weights`."""
        self._axes, self._q, self._k = axes, q, k
        self._cache: list[list[Tensor]] | None = [] if cache else None
        self._row_max = q.new_full((*q.shape[:-1], 1), torch.finfo(dtype).min, dtype=dtype)
        maxima, sums = [], []  # of each axis
        for axis in axes:
            axis_max, axis_sum = (torch.empty_like(axis.arrange(self._row_max)) for _ in range(2))
            cached = self._reduce(axis, axis_max, axis_sum)
            if self._cache is not None:
                self._cache.append(cached)
            maxima.append(axis.restore(axis_max).reshape(self._row_max.shape))
            sums.append(axis.restore(axis_sum).reshape(self._row_max.shape))
            self._row_max = torch.maximum(self._row_max, maxima[-1])
        factors = [(axis_max - self._row_max).exp_() for axis_max in maxima]
        self._row_sum = torch.stack([axis_sum * factor for axis_sum, factor in zip(sums, factors, strict=True)]).sum(0)
        if self._cache is not None:
            for axis, pieces, factor in zip(axes, self._cache, factors, strict=True):
                columns = axis.queries(axis.arrange(factor.div_(self._row_sum)))
                for exponentials, column in zip(pieces, columns, strict=True):
                    exponentials.mul_(column)

    def _reduce(self, axis: Axis, axis_max: Tensor, axis_sum: Tensor) -> list[Tensor]:
        """Write each query's row maximum and row sum on one axis; return the exponentials if they are cached."""
        cached = []
        pieces = (axis.queries(axis.arrange(self._q)), axis.keys(axis.arrange(self._k)))
        columns = (axis.queries(axis_max), axis.queries(axis_sum))
        for piece, (q, k, row_max, row_sum) in enumerate(zip(*pieces, *columns, strict=True)):
            exponentials = _exponentials(axis, piece, q, k, row_max, set_to_max=True)
            torch.sum(exponentials, -1, keepdim=True, out=row_sum)
            if self._cache is not None:
                cached.append(exponentials)
        return cached

    def weights(self, number: int) -> Iterator[Tensor]:
        """Yield the weights (lines, queries, N) of every piece of an axis."""
        if self._cache is not None:
            yield from self._cache[number]
            return
        axis = self._axes[number]
        pieces = (axis.queries(axis.arrange(self._q)), axis.keys(axis.arrange(self._k)))
        columns = (axis.queries(axis.arrange(self._row_max)), axis.queries(axis.arrange(self._row_sum)))
        for piece, (q, k, row_max, row_sum) in enumerate(zip(*pieces, *columns, strict=True)):
            yield _exponentials(axis, piece, q, k, row_max, set_to_max=False).div_(row_sum)

    def lse(self) -> Tensor:
        """Return the log-sum-exp of the energies (B, *S)."""
        return (self._row_max + self._row_sum.log()).squeeze(-1)


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, crossing: int | None = None) -> tuple[Tensor, Tensor]:
    """Return out (B, C, *S) in v's dtype and layout and lse (B, *S); see `ccgpu.cca` for the formula.

    Temporaries beside the results: the energies of a group of images if they fit the limits, else those of a piece; and
    a channels-last copy of q and k and of a slab of v and out if the inputs have another layout or half precision.
    """
    out = torch.empty_like(v)
    plan = Plan(q, v, crossing=crossing)
    lse = torch.empty((q.shape[0], *plan.sizes), dtype=plan.wide, device=q.device)
    if out.numel() == 0:
        return out, lse
    for images in plan.groups():
        qs, ks = (channels_last(x[images], plan.products) for x in (q, k))
        axes = plan.axes(images)
        softmax = _Softmax(axes, qs if scale == 1.0 else qs * scale, ks, plan.wide, cache=plan.fits(1))
        lse[images] = softmax.lse()
        for slab in plan.slabs(1):
            values = channels_last(v[images, slab], plan.products)
            result = channels_last_result(out[images, slab], plan.products)
            target = result.lines
            for number, axis in enumerate(axes):
                sums = axis.accumulator(target)
                pieces = (softmax.weights(number), axis.keys(axis.arrange(values)), axis.queries(sums))
                for weights, value, here in zip(*pieces, strict=True):
                    add_product(here, weights.to(plan.products), value, write=axis.writes())
                axis.add_to(target, sums)
            result.finish()
            del values, result, target, sums, pieces, value, here  # free this slab before the next one is allocated
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor,
    scale: float,
    crossing: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv in the layouts of q, k, v, given the gradients of out and lse."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if v.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    plan = Plan(q, v, dout, crossing=crossing)
    slabs = plan.slabs(2)
    for images in plan.groups():
        qs, ks = (channels_last(x[images], plan.products) for x in (q, k))
        results = [channels_last_result(x[images], plan.products) for x in (dq, dk)]
        dqs, dks = (x.lines for x in results)
        delta = _delta(dout[images], out[images], plan.wide).sub_(dlse[images])
        inputs = (qs if scale == 1.0 else qs * scale, ks, lse[images].unsqueeze(-1), delta.unsqueeze(-1))
        lines = [_BackwardLines(axis, *inputs) for axis in plan.axes(images)]
        for slab in slabs:
            values, douts = (channels_last(x[images, slab], plan.products) for x in (v, dout))
            result = channels_last_result(dv[images, slab], plan.products)
            dvs = result.lines
            for line in lines:
                line.add_slab(values, douts, dvs, last=slab is slabs[-1], gradients=(dqs, dks))
            result.finish()
            del values, douts, result, dvs  # free this slab before the next one is allocated
        if scale != 1.0:
            dqs.mul_(scale)
        for result in results:
            result.finish()
    return dq, dk, dv


class _BackwardLines:
    """The gradients along one axis, from slabs of channels one by one; dq and dk are complete after the last slab."""

    def __init__(self, axis: Axis, q: Tensor, k: Tensor, lse: Tensor, delta: Tensor) -> None:
        self._axis = axis
        q, k = axis.arrange(q), axis.arrange(k)
        self._q, self._k = axis.queries(q), axis.keys(k)
        self._lse, self._delta = axis.queries(axis.arrange(lse)), axis.queries(axis.arrange(delta))
        self._weights: list[Tensor] = []
        self._dweights: list[Tensor] = []

    def add_slab(self, v: Tensor, dout: Tensor, dv: Tensor, *, last: bool, gradients: tuple[Tensor, Tensor]) -> None:
        """Add the axis's part of the slab's dv and, with the last slab, of dq (not scaled yet) and dk."""
        axis = self._axis
        sums = [axis.accumulator(x) for x in (dv, *gradients)]
        dvs, dqs, dks = axis.keys(sums[0]), axis.queries(sums[1]), axis.keys(sums[2])
        earlier = bool(self._weights)
        for piece, (value, do) in enumerate(
            zip(axis.keys(axis.arrange(v)), axis.queries(axis.arrange(dout)), strict=True)
        ):
            if earlier:
                weights = self._weights[piece]
                dweights = self._dweights[piece].baddbmm_(do, value.transpose(1, 2))
            else:
                q, k, lse = self._q[piece], self._k[piece], self._lse[piece]
                weights = _exponentials(axis, piece, q, k, lse, set_to_max=False)
                dweights = torch.bmm(do, value.transpose(1, 2))
            add_product(dvs[piece], weights.to(do.dtype).transpose(1, 2), do, write=axis.writes(piece))
            if not last:
                if not earlier:
                    self._weights.append(weights)
                    self._dweights.append(dweights)
                continue
            denergies = dweights.to(weights.dtype).sub_(self._delta[piece]).mul_(weights).to(do.dtype)
            add_product(dqs[piece], denergies, self._k[piece], write=axis.writes())
            add_product(dks[piece], denergies.transpose(1, 2), self._q[piece], write=axis.writes(piece))
        axis.add_to(dv, sums[0])
        if last:
            axis.add_to(gradients[0], sums[1])
            axis.add_to(gradients[1], sums[2])


def _delta(dout: Tensor, out: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum over channels of dout * out (B, *S), computed some rows of all images at a time."""
    delta = torch.empty((out.shape[0], *out.shape[2:]), dtype=dtype, device=out.device)
    step = max(1, DELTA_ELEMENTS * out.shape[2] // out.numel())
    for start in range(0, out.shape[2], step):
        rows = slice(start, start + step)
        torch.sum(dout[:, :, rows].to(dtype) * out[:, :, rows], 1, out=delta[:, rows])
    return delta
