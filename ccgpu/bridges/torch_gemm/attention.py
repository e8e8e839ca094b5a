"""Criss-cross attention on torch's own matrix products: the CPU path, and any device without kernels of its own.

A criss-cross is a union of lines, one an axis, so the whole computation is products of small matrices, one a line. In
channels-last memory every line of every axis is a strided matrix with contiguous rows, which a batched GEMM takes as it
is: nothing is permuted or copied. Inputs in another layout are brought into it, a slab of channels at a time.

Forward: energies E = scale Q K^T a line, their largest and their sum of exponentials, merged over the axes; then the
weights P = exp(E - lse) and out += P V.
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

DELTA_ELEMENTS = 2**20  # products dout * out formed at once: they stay in cache


def _exponentials(axis: Axis, piece: int, q: Tensor, k: Tensor, offset: Tensor, *, find: bool) -> Tensor:
    """Return exp(Q K^T - offset) (lines, queries, N) in offset's dtype; offset is (lines, queries, 1).

    With `find`, the offset is written: each query's largest energy (a huge negative number where all are -inf, whose
    sum is then 0). The centre counts once: each line through it has an equal share. Masking it on all lines but one
    would give 0 * inf = NaN where v is infinite.
    """
    energies = torch.bmm(q, k.transpose(1, 2)).to(offset.dtype)
    if find:
        torch.amax(energies, -1, keepdim=True, out=offset).clamp_(min=torch.finfo(offset.dtype).min)
    exponentials = energies.sub_(offset).exp_()
    if axis.share != 1.0:
        exponentials.diagonal(offset=axis.start(piece), dim1=1, dim2=2).mul_(axis.share)
    return exponentials


class _Softmax:
    """The softmax over all lines through a position, line by line.

    Its weights are exp(E - largest) / total, as exact as a softmax of the joined energies; exp(E - lse) would carry the
    rounding error of lse, which grows with the energies.
    """

    def __init__(self, axes: list[Axis], q: Tensor, k: Tensor, dtype: torch.dtype, *, keep: bool) -> None:
        self._axes, self._q, self._k = axes, q, k
        self._kept: list[list[Tensor]] | None = [] if keep else None
        self._largest = q.new_full((*q.shape[:-1], 1), torch.finfo(dtype).min, dtype=dtype)
        offsets, parts = [], []
        for axis in axes:
            offset, part = (torch.empty_like(axis.arrange(self._largest)) for _ in range(2))
            kept = self._sum(axis, offset, part)
            if self._kept is not None:
                self._kept.append(kept)
            offsets.append(axis.restore(offset).reshape(self._largest.shape))
            parts.append(axis.restore(part).reshape(self._largest.shape))
            self._largest = torch.maximum(self._largest, offsets[-1])
        relative = [(offset - self._largest).exp_() for offset in offsets]
        self._total = torch.stack([part * factor for part, factor in zip(parts, relative, strict=True)]).sum(0)
        if self._kept is not None:
            for axis, kept, factor in zip(axes, self._kept, relative, strict=True):
                columns = axis.queries(axis.arrange(factor.div_(self._total)))
                for exponentials, column in zip(kept, columns, strict=True):
                    exponentials.mul_(column)

    def _sum(self, axis: Axis, offset: Tensor, part: Tensor) -> list[Tensor]:
        """Write each query's largest energy on the axis and its sum of exponentials; return these where kept."""
        kept = []
        pieces = (axis.queries(axis.arrange(self._q)), axis.keys(axis.arrange(self._k)))
        columns = (axis.queries(offset), axis.queries(part))
        for piece, (q, k, largest, total) in enumerate(zip(*pieces, *columns, strict=True)):
            exponentials = _exponentials(axis, piece, q, k, largest, find=True)
            torch.sum(exponentials, -1, keepdim=True, out=total)
            if self._kept is not None:
                kept.append(exponentials)
        return kept

    def weights(self, number: int) -> Iterator[Tensor]:
        """Yield the weights (lines, queries, N) of every piece of an axis."""
        if self._kept is not None:
            yield from self._kept[number]
            return
        axis = self._axes[number]
        pieces = (axis.queries(axis.arrange(self._q)), axis.keys(axis.arrange(self._k)))
        columns = (axis.queries(axis.arrange(self._largest)), axis.queries(axis.arrange(self._total)))
        for piece, (q, k, largest, total) in enumerate(zip(*pieces, *columns, strict=True)):
            yield _exponentials(axis, piece, q, k, largest, find=False).div_(total)

    def lse(self) -> Tensor:
        """Return the log-sum-exp of the energies (B, *S)."""
        return (self._largest + self._total.log()).squeeze(-1)


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return out (B, C, *S) in v's dtype and layout and lse (B, *S); see `ccgpu.cca` for the formula.

    Temporaries beside the results: the energies of a group of images where they fit the limits, else of a piece; and
    a channels-last copy of q and k and of a slab of v and out where the inputs have another layout or half precision.
    """
    out = torch.empty_like(v)
    plan = Plan(q, v)
    lse = torch.empty((q.shape[0], *plan.sizes), dtype=plan.wide, device=q.device)
    if out.numel() == 0:
        return out, lse
    for images in plan.groups():
        qs, ks = (channels_last(x[images], plan.products) for x in (q, k))
        axes = plan.axes(images)
        softmax = _Softmax(axes, qs if scale == 1.0 else qs * scale, ks, plan.wide, keep=plan.fits(1))
        lse[images] = softmax.lse()
        for slab in plan.slabs(1):
            values, target = (
                channels_last(v[images, slab], plan.products),
                channels_last_result(out[images, slab], plan.products),
            )
            for number, axis in enumerate(axes):
                total = axis.accumulator(target.lines)
                pieces = (softmax.weights(number), axis.keys(axis.arrange(values)), axis.queries(total))
                for weights, value, here in zip(*pieces, strict=True):
                    add_product(here, weights.to(plan.products), value, write=axis.writes())
                axis.add_to(target.lines, total)
            target.finish()
            del values, target, total, pieces, value, here  # before the next slab's are made
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv in the layouts of q, k, v, given the gradients of out and lse."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if v.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    plan = Plan(q, v, dout)
    slabs = plan.slabs(2)
    for images in plan.groups():
        qs, ks = (channels_last(x[images], plan.products) for x in (q, k))
        dqs, dks = channels_last_result(dq[images], plan.products), channels_last_result(dk[images], plan.products)
        delta = _delta(dout[images], out[images], plan.wide).sub_(dlse[images])
        inputs = (qs if scale == 1.0 else qs * scale, ks, lse[images].unsqueeze(-1), delta.unsqueeze(-1))
        lines = [_BackwardLines(axis, *inputs) for axis in plan.axes(images)]
        for slab in slabs:
            values, douts = (channels_last(x[images, slab], plan.products) for x in (v, dout))
            dvs = channels_last_result(dv[images, slab], plan.products)
            for line in lines:
                line.add_slab(values, douts, dvs.lines, last=slab is slabs[-1], gradients=(dqs.lines, dks.lines))
            dvs.finish()
            del values, douts, dvs  # before the next slab's are made
        if scale != 1.0:
            dqs.lines.mul_(scale)
        dqs.finish()
        dks.finish()
    return dq, dk, dv


class _BackwardLines:
    """The gradients along one axis: slabs of channels come one by one, dq and dk after the last."""

    def __init__(self, axis: Axis, q: Tensor, k: Tensor, lse: Tensor, delta: Tensor) -> None:
        self._axis = axis
        q, k = axis.arrange(q), axis.arrange(k)
        self._q, self._k = axis.queries(q), axis.keys(k)
        self._lse, self._delta = axis.queries(axis.arrange(lse)), axis.queries(axis.arrange(delta))
        self._weights: list[Tensor] = []
        self._dweights: list[Tensor] = []

    def add_slab(self, v: Tensor, dout: Tensor, dv: Tensor, *, last: bool, gradients: tuple[Tensor, Tensor]) -> None:
        """Add the axis's share of a slab's dv, and of dq (not scaled yet) and dk where it is the last slab."""
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
                weights = _exponentials(axis, piece, q, k, lse, find=False)
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
    """Return the sum over channels of dout * out (B, *S), some rows of all images at a time."""
    total = torch.empty((out.shape[0], *out.shape[2:]), dtype=dtype, device=out.device)
    step = max(1, DELTA_ELEMENTS * out.shape[2] // out.numel())
    for start in range(0, out.shape[2], step):
        rows = slice(start, start + step)
        torch.sum(dout[:, :, rows].to(dtype) * out[:, :, rows], 1, out=total[:, rows])
    return total
