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

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Limits(NamedTuple):
    """What bounds the temporaries on a device."""

    piece: int  # bytes of energies formed at once
    kept: int  # bytes of energies kept between passes; a map that needs more forms them again
    slab: int  # channels brought into channels-last at once, where the energies can be kept meanwhile


# On two cores at 97x97: pieces of 16 lines (0.6 MB) let the product of a column, which is added to a strided result,
# stay in cache: 8.4 ms against 8.9 ms for the whole axis at once. Forming the energies twice costs 1.2 times the time.
CPU_LIMITS = Limits(piece=2**20, kept=2**26, slab=256)
OTHER_LIMITS = Limits(piece=2**28, kept=2**30, slab=2**30)
# A line of an axis other than the last is strided, so lines of several images are no single batch in memory. Below this
# many energies an image, copying them into one costs less than calls for each image (16x16: some 30 us either way).
SMALL_IMAGE_ENERGIES = 4096
ROW_ELEMENTS = 16
DELTA_ELEMENTS = 2**18  # products dout * out formed at once: they stay in cache


class Piece(NamedTuple):
    """Some lines of one axis, or some queries of one line: indices into the view (outer, inner, N, channels)."""

    axis: Axis
    outer: slice
    inner: slice
    queries: slice


class Axis:
    """One spatial axis of channels-last maps (B, *S, channels)."""

    def __init__(self, batch: int, sizes: tuple[int, ...], axis: int, crossing: int) -> None:
        self.length = sizes[axis]
        self.outer = batch * math.prod(sizes[:axis])
        self.inner = math.prod(sizes[axis + 1 :])
        self.first = axis == len(sizes) - 1
        self.crossing = crossing  # how many lines cross in a position

    def pieces(self, most: int) -> Iterator[Piece]:
        """Yield all lines, at most `most` energies at a time (at least one query's)."""
        whole = slice(None)
        lines = most // self.length**2
        if lines == 0:
            step = max(1, most // self.length)
            for outer in range(self.outer):
                for inner in range(self.inner):
                    for start in range(0, self.length, step):
                        queries = slice(start, min(start + step, self.length))
                        yield Piece(self, slice(outer, outer + 1), slice(inner, inner + 1), queries)
        elif self.inner == 1 or self.inner * self.length**2 <= SMALL_IMAGE_ENERGIES:
            step = max(1, lines // self.inner)
            for start in range(0, self.outer, step):
                yield Piece(self, slice(start, start + step), whole, whole)
        else:
            for outer in range(self.outer):
                for start in range(0, self.inner, lines):
                    yield Piece(self, slice(outer, outer + 1), slice(start, start + lines), whole)


def _view(x: Tensor, piece: Piece, positions: slice) -> Tensor:
    """Return the piece of x (B, *S, channels), some positions of each line, as a view (outer, inner, n, channels)."""
    axis = piece.axis
    lines = x.view(axis.outer, axis.length, axis.inner, x.shape[-1]).transpose(1, 2)
    return lines[piece.outer, piece.inner, positions]


def _keys(x: Tensor, piece: Piece) -> Tensor:
    """Return the piece's whole lines as matrices (lines, N, channels): a view where memory allows, else a copy."""
    return _view(x, piece, slice(None)).flatten(0, 1)


def _queries(x: Tensor, piece: Piece) -> Tensor:
    """Return the piece's queries as matrices (lines, queries, channels): a view where memory allows, else a copy."""
    return _view(x, piece, piece.queries).flatten(0, 1)


def _add_product(target: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """Add a @ b to target (outer, inner, n, channels); the first to come writes, so that it need not be cleared."""
    matrices = target.flatten(0, 1)
    if not matrices.is_contiguous() or matrices.data_ptr() != target.data_ptr():
        # torch multiplies into a strided result one matrix at a time; a batch and an addition are faster.
        product = torch.bmm(a, b).view(target.shape)
        target.copy_(product) if first else target.add_(product)
    elif first:
        torch.bmm(a, b, out=matrices)
    else:
        matrices.baddbmm_(a, b)


def _exponentials(
    q: Tensor, k: Tensor, piece: Piece, offset: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return exp(Q K^T - offset) (lines, queries, N) in `dtype`, and the offset (lines, queries, 1).

    Without an offset it is each query's largest energy (a huge negative number where all are -inf, whose sum is then
    0). The centre counts once: with A lines through it, each has a share of 1 / A. Masking it on all lines but one
    would give 0 * inf = NaN where v is infinite.
    """
    energies = torch.bmm(_queries(q, piece), _keys(k, piece).transpose(1, 2)).to(dtype)
    if offset is None:
        offset = energies.amax(-1, keepdim=True).clamp_(min=torch.finfo(dtype).min)
    # Rows that start at 64-byte boundaries make the products with 97 keys a sixth faster.
    length = -(-energies.shape[2] // ROW_ELEMENTS) * ROW_ELEMENTS
    exponentials = energies.new_empty((*energies.shape[:2], length))[..., : energies.shape[2]]
    torch.sub(energies, offset, out=exponentials).exp_()
    if piece.axis.crossing > 1:
        first = piece.queries.indices(piece.axis.length)[0]
        exponentials.diagonal(offset=first, dim1=1, dim2=2).mul_(1.0 / piece.axis.crossing)
    return exponentials, offset


class _Softmax:
    """The softmax over all lines through a position, line by line: the largest energy so far, and the sum above it.

    Its weights are exp(E - largest) / total, as exact as a softmax of the joined energies; exp(E - lse) would carry the
    rounding error of lse, which grows with the energies.
    """

    def __init__(self, q: Tensor, k: Tensor, pieces: list[Piece], dtype: torch.dtype, *, keep: bool) -> None:
        self._q, self._k, self._dtype = q, k, dtype
        shape = (*q.shape[:-1], 1)
        self._largest = q.new_full(shape, torch.finfo(dtype).min, dtype=dtype)
        self._total = q.new_zeros(shape, dtype=dtype)
        self._kept: list[tuple[Tensor, Tensor]] = []
        for piece in pieces:
            exponentials, offset = _exponentials(q, k, piece, None, dtype)
            self._merge(piece, offset, exponentials.sum(-1, keepdim=True))
            if keep:
                self._kept.append((exponentials, offset))
        self._kept.reverse()

    def _merge(self, piece: Piece, offset: Tensor, part: Tensor) -> None:
        largest, total = (_view(x, piece, piece.queries) for x in (self._largest, self._total))
        offset, part = offset.view(largest.shape), part.view(largest.shape)
        both = torch.maximum(largest, offset)
        total.copy_(total * (largest - both).exp_() + part * (offset - both).exp_())
        largest.copy_(both)

    def take(self, piece: Piece) -> Tensor:
        """Return the weights (lines, queries, N) of the next piece, in the order of the pieces."""
        largest, total = (_queries(x, piece) for x in (self._largest, self._total))
        if self._kept:
            exponentials, offset = self._kept.pop()
            return exponentials.mul_((offset - largest).exp_().div_(total))
        return _exponentials(self._q, self._k, piece, largest, self._dtype)[0].div_(total)

    def lse(self) -> Tensor:
        """Return the log-sum-exp of the energies (B, *S)."""
        return (self._largest + self._total.log()).squeeze(-1)


def energy_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of energies and of lse: float64 for float64 inputs, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x (B, channels, *S) as contiguous (B, *S, channels) in `dtype`: x itself where it has that layout."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.ndim in formats:  # torch's change of format is 2.5 times faster than its strided copy
        x = x.to(dtype).contiguous(memory_format=formats[x.ndim])
    return x.to(dtype).movedim(1, -1).contiguous()


class _Result:
    """A (B, channels, *S) result and the channels-last array that is written: the same memory where layouts agree."""

    def __init__(self, target: Tensor, dtype: torch.dtype) -> None:
        self._target = target.movedim(1, -1)
        direct = _is_native(target, dtype)
        self.array = self._target if direct else torch.empty(self._target.shape, dtype=dtype, device=target.device)

    def finish(self) -> None:
        """Bring the result into its own layout and dtype."""
        if self.array is not self._target:
            self._target.copy_(self.array)


def _is_native(x: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether x (B, channels, *S) can be used as it is: channels-last, in the dtype of the products."""
    return x.dtype == dtype and x.movedim(1, -1).is_contiguous()


class _Plan:
    """How one call is cut up: groups of images, pieces of energies, slabs of channels."""

    def __init__(self, q: Tensor, v: Tensor, *others: Tensor) -> None:
        self.limits = CPU_LIMITS if q.device.type == "cpu" else OTHER_LIMITS
        self.sizes = tuple(q.shape[2:])
        self.wide = energy_dtype(q.dtype)
        self.products = _product_dtype(v)
        self._image = math.prod(self.sizes) * sum(self.sizes) * self.wide.itemsize
        self._batch, self._channels = v.shape[:2]
        self._native = all(_is_native(x, self.products) for x in (v, *others))

    def groups(self) -> Iterator[slice]:
        """Yield slices of images whose energies together stay well within the limit (at least one image each)."""
        step = max(1, self.limits.kept // 4 // self._image)
        for start in range(0, self._batch, step):
            yield slice(start, min(start + step, self._batch))

    def pieces(self, images: slice) -> list[Piece]:
        """Return the pieces of all axes, the last axis first; another axis of length 1 has nothing to add."""
        axes = [len(self.sizes) - 1, *(a for a in range(len(self.sizes) - 1) if self.sizes[a] > 1)]
        most = self.limits.piece // self.wide.itemsize
        batch = images.stop - images.start
        return [piece for a in axes for piece in Axis(batch, self.sizes, a, len(axes)).pieces(most)]

    def fits(self, copies: int) -> bool:
        """Tell whether `copies` arrays of one image's energies may be kept."""
        return copies * self._image <= self.limits.kept

    def slabs(self, copies: int) -> list[slice]:
        """Return slices of channels: several where they have to be converted and the energies can be kept meanwhile."""
        step = self._channels if self._native or not self.fits(copies) else self.limits.slab
        return [slice(start, start + step) for start in range(0, self._channels, step)]


def _is_first_of_line(piece: Piece) -> bool:
    """Tell whether no product has been written to the piece's keys yet: first axis, first queries of the line."""
    return piece.axis.first and piece.queries.indices(piece.axis.length)[0] == 0


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return out (B, C, *S) in v's dtype and layout and lse (B, *S); see `ccgpu.cca` for the formula.

    Temporaries beside the results: the energies of a group of images where they fit the limits, else of a piece; and
    a channels-last copy of q and k and of a slab of v and out where the inputs have another layout or half precision.
    """
    out = torch.empty_like(v)
    plan = _Plan(q, v)
    lse = torch.empty((q.shape[0], *plan.sizes), dtype=plan.wide, device=q.device)
    if out.numel() == 0:
        return out, lse
    for images in plan.groups():
        qs, ks = (_channels_last(x[images], plan.products) for x in (q, k))
        qs = qs if scale == 1.0 else qs * scale
        pieces = plan.pieces(images)
        softmax = _Softmax(qs, ks, pieces, plan.wide, keep=plan.fits(1))
        lse[images] = softmax.lse()
        slabs = plan.slabs(1)
        kept: list[Tensor] = []
        for slab in slabs:
            values, target = (
                _channels_last(v[images, slab], plan.products),
                _Result(out[images, slab], plan.products),
            )
            for number, piece in enumerate(pieces):
                weights = kept[number] if slab is not slabs[0] else softmax.take(piece).to(plan.products)
                here = _view(target.array, piece, piece.queries)
                _add_product(here, weights, _keys(values, piece), first=piece.axis.first)
                if slab is slabs[0] and len(slabs) > 1:
                    kept.append(weights)
            target.finish()
            del values, target  # before the next slab's are made
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv in the layouts of q, k, v, given the gradients of out and lse."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if v.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    plan = _Plan(q, v, dout)
    slabs = plan.slabs(2)
    for images in plan.groups():
        qs, ks = (_channels_last(x[images], plan.products) for x in (q, k))
        qs = qs if scale == 1.0 else qs * scale
        dqs, dks = _Result(dq[images], plan.products), _Result(dk[images], plan.products)
        lses, pieces = lse[images].unsqueeze(-1), plan.pieces(images)
        delta = _delta(dout[images], out[images], plan.wide).sub_(dlse[images])
        weighed: dict[int, Tensor] = {}
        dweighed: dict[int, Tensor] = {}
        for slab in slabs:
            values, douts = (_channels_last(x[images, slab], plan.products) for x in (v, dout))
            dvs = _Result(dv[images, slab], plan.products)
            for number, piece in enumerate(pieces):
                weights = weighed.pop(number, None)
                if weights is None:
                    weights, _ = _exponentials(qs, ks, piece, _queries(lses, piece), plan.wide)
                here, transposed = _queries(douts, piece), _keys(values, piece).transpose(1, 2)
                products = weights.to(plan.products).transpose(1, 2)
                _add_product(_view(dvs.array, piece, slice(None)), products, here, first=_is_first_of_line(piece))
                before = dweighed.pop(number, None)
                dweights = torch.bmm(here, transposed) if before is None else before.baddbmm_(here, transposed)
                if slab is not slabs[-1]:
                    weighed[number], dweighed[number] = weights, dweights
                    continue
                denergies = dweights.to(plan.wide).sub_(_queries(delta.unsqueeze(-1), piece)).mul_(weights)
                _add_query_key(piece, denergies.to(plan.products), qs, ks, dqs.array, dks.array)
            dvs.finish()
            del values, douts, dvs, here, transposed  # before the next slab's are made
        if scale != 1.0:
            dqs.array.mul_(scale)
        dqs.finish()
        dks.finish()
    return dq, dk, dv


def _add_query_key(piece: Piece, denergies: Tensor, q: Tensor, k: Tensor, dq: Tensor, dk: Tensor) -> None:
    """Add dS K to dq and dS^T Q to dk (q is scaled already, dq not yet)."""
    _add_product(_view(dq, piece, piece.queries), denergies, _keys(k, piece), first=piece.axis.first)
    target = _view(dk, piece, slice(None))
    _add_product(target, denergies.transpose(1, 2), _queries(q, piece), first=_is_first_of_line(piece))


def _delta(dout: Tensor, out: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum over channels of dout * out (B, *S), some rows of all images at a time."""
    total = torch.empty((out.shape[0], *out.shape[2:]), dtype=dtype, device=out.device)
    step = max(1, DELTA_ELEMENTS * out.shape[2] // out.numel())
    for start in range(0, out.shape[2], step):
        rows = slice(start, start + step)
        torch.sum(dout[:, :, rows].to(dtype) * out[:, :, rows], 1, out=total[:, rows])
    return total
