"""The two stages of criss-cross attention on torch's own matrix products: energies, and weighted sums.

`affinity`, `aggregate` and `aggregate_transposed` are linear in each argument and each other's derivatives; `stage_ops`
has the formulas. As in `attention`, a line is a strided matrix of channels-last memory, and an axis is a batch of
products, cut into pieces that bound the temporaries.

Energies and weights have K channels, and their native layout is (B, *S, K), contiguous. The last axis has N of the K
channels, one for each position of its line; every other axis has N - 1, without the centre, which counts once. So on
those axes a line's matrix of queries x keys (N, N) loses its diagonal when energies are written and gets it back when
weights are read. Each axis then gets an equal share of the centre's weight on its diagonal: 0 on all axes but the last
would give 0 * inf = NaN where a value is infinite.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ccgpu.bridges.torch_gemm.lines import Axis, Plan, add_product
from ccgpu.layouts import channels_last, channels_last_result, empty_energies


def affinity(q: Tensor, k: Tensor) -> Tensor:
    """Return the energies q_u . k_i (B, K, *S) in q's energy dtype; see `ccgpu.affinity`."""
    energies = empty_energies(q)
    if energies.numel() == 0:
        return energies
    plan = Plan(q, k)
    for images in plan.groups():
        qs, ks = (channels_last(x[images], plan.products) for x in (q, k))
        everything = energies[images].movedim(1, -1)
        for axis, first in zip(plan.axes(images), _first_channels(plan.sizes), strict=True):
            own = everything[..., first : first + axis.length - (not axis.first)]
            target = axis.accumulator(own)
            pieces = (axis.queries(target), axis.queries(axis.arrange(qs)), axis.keys(axis.arrange(ks)))
            for piece, (here, query, key) in enumerate(zip(*pieces, strict=True)):
                products = torch.bmm(query, key.transpose(1, 2)).to(plan.wide)
                if axis.first:
                    here.copy_(products)
                else:
                    before = _before_centre(axis, piece, here)
                    torch.where(before, products[..., :-1], products[..., 1:], out=here)
            if axis.gathered:
                own.copy_(axis.restore(target).view(own.shape))
    return energies


def aggregate(weights: Tensor, v: Tensor) -> Tensor:
    """Return the sums of weights times v over each criss-cross (B, C, *S), like v; see `ccgpu.aggregate`."""
    return _sums(weights, v, transpose=False)


def aggregate_transposed(weights: Tensor, x: Tensor) -> Tensor:
    """Return y (B, C, *S), like x: y_i is the sum of weights times x_u over all u with i in their criss-cross."""
    return _sums(weights, x, transpose=True)


def _sums(weights: Tensor, values: Tensor, *, transpose: bool) -> Tensor:
    """Return the products W V (or W^T V) of all lines, summed over the axes."""
    sums = torch.empty_like(values)
    if sums.numel() == 0:
        return sums
    plan = Plan(values, values)
    for images in plan.groups():
        own = channels_last(weights[images], plan.products)
        for slab in plan.slabs(1):
            source = channels_last(values[images, slab], plan.products)
            result = channels_last_result(sums[images, slab], plan.products)
            target = result.lines
            for axis, matrices in _weight_matrices(plan, images, own):
                _add_lines(axis, matrices, source, target, transpose=transpose)
            result.finish()
            del source, result, target  # free this slab before the next one is allocated
    return sums


def _add_lines(axis: Axis, matrices: Iterator[Tensor], source: Tensor, target: Tensor, *, transpose: bool) -> None:
    """Add the products W V (or W^T V) of an axis's lines to target; the first axis overwrites it."""
    sums, lines = axis.accumulator(target), axis.arrange(source)
    into, out_of = (axis.keys, axis.queries) if transpose else (axis.queries, axis.keys)
    for piece, (here, matrix, line) in enumerate(zip(into(sums), matrices, out_of(lines), strict=True)):
        if transpose:
            add_product(here, matrix.transpose(1, 2), line, write=axis.writes(piece))
        else:
            add_product(here, matrix, line, write=axis.writes())
    axis.add_to(target, sums)


def _first_channels(sizes: tuple[int, ...]) -> list[int]:
    """Return the first channel of each axis of `Plan.axes`, in its order: the last axis first."""
    firsts = [sum(sizes[:axis]) - axis for axis in range(len(sizes))]
    return [firsts[-1], *(first for first, size in zip(firsts[:-1], sizes, strict=False) if size > 1)]


def _before_centre(axis: Axis, piece: int, like: Tensor) -> Tensor:
    """Return (n, N - 1): whether a channel stands for a position before its query, on any axis but the last."""
    queries = torch.arange(axis.start(piece), axis.start(piece) + like.shape[1], device=like.device)
    return torch.arange(axis.length - 1, device=like.device) < queries.unsqueeze(1)


def _weight_matrices(plan: Plan, images: slice, weights: Tensor) -> Iterator[tuple[Axis, Iterator[Tensor]]]:
    """Yield every axis with an iterator over its pieces' weights, matrices (lines, queries, N).

    Args:
        plan: how the call is cut up.
        images: the group of images.
        weights: the group's weights (images, *S, K), contiguous.
    """
    axes, firsts = plan.axes(images), _first_channels(plan.sizes)
    share = axes[0].share
    on_last = weights[..., firsts[0] :]
    centre = on_last.diagonal(dim1=-2, dim2=-1).mul(share).unsqueeze(-1).contiguous()
    yield axes[0], _last_matrices(axes[0], on_last, share)
    for axis, first in zip(axes[1:], firsts[1:], strict=True):
        # One channel more than the axis has, which exists because the last axis's channels follow.
        yield axis, _crossing_matrices(axis, weights[..., first : first + axis.length], centre)


def _last_matrices(axis: Axis, weights: Tensor, share: float) -> Iterator[Tensor]:
    for piece, own in enumerate(axis.queries(axis.arrange(weights))):
        if share == 1.0:
            yield own
            continue
        matrix = own.clone(memory_format=torch.contiguous_format)
        matrix.diagonal(offset=axis.start(piece), dim1=1, dim2=2).mul_(share)
        yield matrix


def _crossing_matrices(axis: Axis, weights: Tensor, centre: Tensor) -> Iterator[Tensor]:
    pieces = (axis.queries(axis.arrange(weights)), axis.queries(axis.arrange(centre)))
    for piece, (own, middle) in enumerate(zip(*pieces, strict=True)):
        matrix = own.new_empty(own.shape)
        matrix[..., 0] = own[..., 0]
        # Channel j is position j before the centre and position j + 1 after it; the centre itself is overwritten below.
        torch.where(_before_centre(axis, piece, own), own[..., 1:], own[..., :-1], out=matrix[..., 1:])
        matrix.diagonal(offset=axis.start(piece), dim1=1, dim2=2).copy_(middle.squeeze(-1))
        yield matrix
