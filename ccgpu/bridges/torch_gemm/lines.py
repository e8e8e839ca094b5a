"""One axis of a map as a batch of lines for torch's batched matrix products, cut into pieces that bound temporaries."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ccgpu.layouts import energy_dtype, is_channels_last


class Limits(NamedTuple):
    """What bounds the temporaries on a device."""

    piece: int  # bytes of energies computed at once
    cache: int  # bytes of energies cached between passes; a map that needs more computes them again
    slab: int  # channels copied into channels-last memory at once, if the energies can be cached meanwhile


# On two cores at 97x97 with C = 512: pieces of 28 lines; 128 channels a slab cost 1.1 times the time of 256, and all
# 512 take the same time and twice the memory.
CPU_LIMITS = Limits(piece=2**20, cache=2**26, slab=256)
OTHER_LIMITS = Limits(piece=2**28, cache=2**30, slab=2**30)
# On all axes but the last, the lines of several images do not form one batch in memory. Below this many energies per
# image, copying them into one batch takes less time than one call per image (16x16: about 30 us either way).
SMALL_IMAGE_ENERGIES = 4096


class Axis:
    """One spatial axis of channels-last maps (B, *S, channels): its lines, and how they are cut into pieces.

    `arrange` gives a map as (outer, N, inner, channels), a view in which a line is [o, :, i]. For small images the axis
    is gathered instead: a copy with the lines one after another, (outer * inner, N, 1, channels).

    A piece is some whole lines or, if one line has too many energies, some queries of one line. `queries` and `keys`
    list the pieces of an arranged map in the same order, as matrices (lines, n, channels) that are views.
    """

    def __init__(self, batch: int, sizes: tuple[int, ...], axis: int, crossing: int, most: int) -> None:
        """Cut the axis into pieces of at most `most` energies; `crossing` is the number of lines through a position."""
        self.length = sizes[axis]
        self.first = axis == len(sizes) - 1
        self.share = 1.0 / crossing
        self._outer, self._inner = batch * math.prod(sizes[:axis]), math.prod(sizes[axis + 1 :])
        small = self._inner * self.length**2 <= SMALL_IMAGE_ENERGIES
        self.gathered = small and self._outer > 1 and self._inner > 1
        self._lines = max(1, most // self.length**2)
        self._step = self.length if most >= self.length**2 else max(1, most // self.length)
        self.starts = range(0, self.length, self._step)

    def arrange(self, x: Tensor) -> Tensor:
        """Return x (B, *S, channels) arranged by lines: a view, or a copy where the axis is gathered."""
        lines = x.view(self._outer, self.length, self._inner, x.shape[-1])
        return lines.transpose(1, 2).flatten(0, 1).unsqueeze(2) if self.gathered else lines

    def restore(self, arranged: Tensor) -> Tensor:
        """Return an arranged map as (outer, N, inner, channels), a view."""
        if not self.gathered:
            return arranged
        return arranged.view(self._outer, self._inner, self.length, -1).transpose(1, 2)

    def accumulator(self, x: Tensor) -> Tensor:
        """Return the memory in which the axis's products for x are summed: x itself, arranged, or new memory."""
        if not self.gathered:
            return self.arrange(x)
        return x.new_empty((self._outer * self._inner, self.length, 1, x.shape[-1]))

    def add_to(self, x: Tensor, accumulated: Tensor) -> None:
        """Add an accumulator to x, unless it is x itself."""
        if self.gathered:
            x.view(self._outer, self.length, self._inner, x.shape[-1]).add_(self.restore(accumulated))

    def _lines_of(self, arranged: Tensor) -> list[Tensor]:
        batches = [arranged.squeeze(2)] if arranged.shape[2] == 1 else arranged.transpose(1, 2).unbind(0)
        return [piece for batch in batches for piece in batch.split(self._lines)]

    def keys(self, arranged: Tensor) -> list[Tensor]:
        """Return the whole lines of every piece (lines, N, channels)."""
        return [line for line in self._lines_of(arranged) for _ in self.starts]

    def queries(self, arranged: Tensor) -> list[Tensor]:
        """Return the queries of every piece (lines, n, channels)."""
        if self._step == self.length:
            return self._lines_of(arranged)
        return [part for line in self._lines_of(arranged) for part in line.split(self._step, 1)]

    def start(self, piece: int) -> int:
        """Return the position in its line of a piece's first query."""
        return self.starts[piece % len(self.starts)]

    def writes(self, piece: int = 0) -> bool:
        """Return whether the piece is the first to reach its keys in an accumulator, which has not been zeroed."""
        return (self.first or self.gathered) and self.start(piece) == 0


def add_product(target: Tensor, a: Tensor, b: Tensor, *, write: bool) -> None:
    """Add a @ b to target (lines, n, channels); with `write`, overwrite it."""
    if write:
        torch.bmm(a, b, out=target)
    elif target.is_contiguous():
        target.baddbmm_(a, b)
    else:  # faster than baddbmm_, which multiplies into a strided result one matrix at a time
        target.add_(torch.bmm(a, b))


def _product_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16) else x.dtype


class Plan:
    """How one call is cut up: groups of images, pieces of energies, slabs of channels."""

    def __init__(self, q: Tensor, v: Tensor, *others: Tensor, crossing: int | None = None) -> None:
        self._crossing = crossing  # lines through a position; None: as many as the map has
        self._limits = CPU_LIMITS if q.device.type == "cpu" else OTHER_LIMITS
        self.sizes = tuple(q.shape[2:])
        self.wide = energy_dtype(q.dtype)
        self.products = _product_dtype(v)
        self._image = math.prod(self.sizes) * sum(self.sizes) * self.wide.itemsize
        self._batch, self._channels = v.shape[:2]
        self._native = all(is_channels_last(x, self.products) for x in (v, *others))

    def groups(self) -> Iterator[slice]:
        """Yield slices of images, at least one each, whose energies together take a quarter of the cache at most."""
        step = max(1, self._limits.cache // 4 // self._image)
        for start in range(0, self._batch, step):
            yield slice(start, min(start + step, self._batch))

    def axes(self, images: slice) -> list[Axis]:
        """Return the axes to run, the last one first, without other axes of length 1: they add nothing."""
        wanted = [len(self.sizes) - 1, *(a for a in range(len(self.sizes) - 1) if self.sizes[a] > 1)]
        most = self._limits.piece // self.wide.itemsize
        crossing = self._crossing or len(wanted)
        return [Axis(images.stop - images.start, self.sizes, a, crossing, most) for a in wanted]

    def fits(self, copies: int) -> bool:
        """Return whether `copies` arrays of one image's energies fit the cache."""
        return copies * self._image <= self._limits.cache

    def slabs(self, copies: int) -> list[slice]:
        """Return slices of channels: several if channels are copied and the energies can be cached meanwhile."""
        step = self._channels if self._native or not self.fits(copies) else self._limits.slab
        return [slice(start, start + step) for start in range(0, self._channels, step)]
