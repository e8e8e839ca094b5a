"""The launches of a call: which kernel computes which axes of the map, and its arguments as bytes.

`plan` is cached, so a repeated call only packs its addresses in front of the cached numbers.
"""

from __future__ import annotations

import math
import struct
import sys
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from ccgpu.kernels.cuda.configurations import (
    ADDS_IN_L2,
    ARITHMETICS,
    TILE,
    UNIT,
    Configuration,
    Limits,
    classes,
    configuration,
)

# Two axes share a launch, and its kernel, unless that has more than this many times the tiles of the shorter axis.
MOST_WASTE = 1.5
# Passes through an image that the L2 cache does not hold, in forward. With more of them memory is not the limit any
# more, but L2 and the products.
PASSES = 2
USABLE_L2 = 0.8  # part of the L2 cache that is taken for one image
MOST_CUTS = 4  # items into which forward cuts the channels of a line
FLOAT_RANGE = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # the least and the greatest normal number in 32 bits
COUNTER_STRIDE = 32  # int32 from a counter to the next, as in schedule.cuh


class Pointers(NamedTuple):
    """Addresses of the arrays of a call; 0 for an array that its kernel does not use."""

    q: int = 0
    k: int = 0
    v: int = 0
    out: int = 0
    lse: int = 0
    scratch: int = 0
    dout: int = 0
    dlse: int = 0
    delta: int = 0
    dq: int = 0
    dk: int = 0
    dv: int = 0
    weights: int = 0


class Axis(NamedTuple):
    """The lines along an axis, with the names of `Axis` in schedule.cuh."""

    length: int
    inner: int
    lines: int
    segments: int
    span: int
    tiles: int = 0  # tiles of the kernel that holds a segment; not an argument
    slot: int = 0  # index, among a position's neighbours, of the first one on this axis
    skips: bool = False  # whether the position itself is left out of the neighbours on this axis


_HEAD = struct.Struct("14Q3d2f")
_TAIL = struct.Struct("11i15i3i3ii4x")
ARGUMENT_BYTES = _HEAD.size + _TAIL.size


class Launch(NamedTuple):
    """A launch of `blocks` blocks, all along x, of `configuration.threads` threads each."""

    configuration: Configuration
    blocks: int
    images: int
    cuts: int  # parts of the channels, an item each, of a pass
    passes: int  # through an image, each with a part of the channels
    share: float
    numbers: bytes

    @property
    def counters(self) -> int:
        """The number of int32 zeros that the launch needs: a cache line for the tickets, and one for each unit."""
        return COUNTER_STRIDE * (self.images * self.passes + 1)

    @property
    def scratch(self) -> int:
        """The number of arrays like lse that forward needs besides it."""
        return 0 if self.configuration.adds or self.cuts * self.passes == 1 else 2 * self.passes - 1

    def arguments(self, pointers: Pointers, counters: int, scale: float = 1.0) -> bytes:
        """Return the struct `Arguments` that the kernel takes by value.

        `pointers.scratch` is the address of `scratch` arrays like lse.
        """
        if self.scratch == 0:
            pointers = pointers._replace(scratch=pointers.lse)
        # Neither 0 nor infinite: times the scale, an infinite product stands for a key beyond the line.
        log2, (least, most) = abs(scale) * math.log2(math.e), FLOAT_RANGE
        wide = math.copysign(max(log2, sys.float_info.min), scale)
        narrow = math.copysign(min(max(log2, least), most), scale)
        head = _HEAD.pack(*pointers, counters, scale, wide, self.share, narrow, self.share)
        return head + self.numbers


def _axes(sizes: tuple[int, ...], stage: bool, held: tuple[int, ...]) -> list[Axis]:
    """Return the axes to run, divided into segments that a block can hold; `held` are the classes of line lengths.

    Axes of length 1 are left out. In the fused kernels a position itself counts equally on each line through it, so a
    line of that position alone adds nothing. In the stages the position is a neighbour on the last axis only, which is
    therefore always run.
    """
    last = len(sizes) - 1
    if stage:
        chosen = [a for a, n in enumerate(sizes) if n > 1 or a == last]
    else:
        chosen = [a for a, n in enumerate(sizes) if n > 1] or [last]
    axes = []
    for a in chosen:
        length, tiles = sizes[a], math.ceil(sizes[a] / TILE)
        span = TILE * math.ceil(tiles / math.ceil(tiles / held[-1]))
        axes.append(
            Axis(
                length,
                inner=math.prod(sizes[a + 1 :]),
                lines=math.prod(sizes) // length,
                segments=math.ceil(length / span),
                span=span,
                tiles=next(n for n in held if n * TILE >= span),
                slot=sum(n - 1 for n in sizes[:a]),
                skips=a != last,
            )
        )
    return axes


def _groups(axes: list[Axis]) -> list[list[Axis]]:
    """Return the axes in groups: neighbouring axes that one kernel can compute without much waste share a launch."""
    groups: list[list[Axis]] = []
    for axis in axes:
        tiles = [axis.tiles, *(other.tiles for other in groups[-1])] if groups else []
        if tiles and max(tiles) <= MOST_WASTE * min(tiles):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    return groups


def _chunks(chosen: Configuration, channels: int) -> int:
    """Return the number of chunks of a line's channels."""
    return math.ceil(channels * ARITHMETICS[chosen.arithmetic].size / (UNIT * chosen.chunk_units))


def _cuts(chosen: Configuration, group: list[Axis], images: int, channels: int, limits: Limits) -> int:
    """Return into how many items forward cuts the channels of a line: as many as the GPU has room for at once.

    Each of them forms the energies again, which costs as much as one or two chunks of channels. So a call cuts only
    what would leave blocks idle, in at most `MOST_CUTS`.
    """
    resident = chosen.blocks * limits.multiprocessors
    together = images * max(axis.segments * axis.lines for axis in group)
    cuts = 1
    while 2 * cuts <= min(MOST_CUTS, _chunks(chosen, channels)) and 2 * cuts * together <= resident:
        cuts *= 2
    return cuts


def _passes(
    chosen: Configuration, groups: list[list[Axis]], positions: int, depth: int, channels: int, limits: Limits
) -> int:
    """Return in how many passes forward goes through an image, each with a part of the channels.

    One, if the L2 cache holds q, k, v and out from one phase to the next. Otherwise a later phase would read v and out
    from memory again, and write out once more; a pass forms the energies again instead, from q and k. Multiply-adds are
    never limited by memory, and where there are several launches they follow each other whole: there is one pass.
    """
    size = ARITHMETICS[chosen.arithmetic].size
    pays = len(groups) == 1 and chosen.arithmetic in ("bf16", "f16", "tf32")
    held = positions * size * 2 * (depth + channels) <= USABLE_L2 * limits.l2_bytes
    return 1 if held or not pays else min(PASSES, _chunks(chosen, channels))


@lru_cache(maxsize=4096)
def plan(
    kernel: str,
    arithmetic: str,
    images: int,
    sizes: tuple[int, ...],
    depth: int,
    channels: int,
    limits: Limits,
    lag: int = 0,
    cuts: int | None = None,
    passes: int | None = None,
    adds: bool = False,
    crossing: int | None = None,
) -> tuple[Launch, ...]:
    """Return the launches of a call, in order on one stream.

    Args:
        kernel: one of KERNELS.
        arithmetic: a key of ARITHMETICS.
        images: B; none of the numbers may be 0.
        sizes: sizes of the map, one to three.
        depth: channels of q and k, a multiple of 16 bytes; `aggregate` ignores it.
        channels: channels of v, a multiple of 16 bytes; `affinity` ignores it.
        limits: limits of the GPU.
        lag: steps by which a phase of an image follows the one before it; 0: image after image.
        cuts: parts of a pass's channels that are items of their own, in forward. None: as many as fill the GPU.
        passes: through an image, each with a part of the channels, in forward. None: as many as the L2 cache asks for.
        adds: whether later phases add to results in the L2 cache, each rounded, instead of reading them: in 16 bits on
            Hopper and later. Forward then has launches for lse before the others. Off, as no GPU has measured it.
        crossing: lines through a position, the map's among them: the position itself counts 1 / crossing on each of
            them. None: the map has all lines.

    Raises:
        ValueError: the call has more than 2^31 lines or 2^26 images, an array more than 64 GiB, or `cuts` and `passes`
            more parts than the channels have chunks.
    """
    stage = kernel not in ("forward", "backward")
    held = classes(kernel, arithmetic, depth, limits)
    groups = _groups(_axes(sizes, stage, held))
    crossing = sum(len(group) for group in groups) if crossing is None else crossing
    phases = [sum(axis.segments for axis in group) for group in groups]
    chosen = [configuration(kernel, arithmetic, max(axis.tiles for axis in group), depth, limits) for group in groups]
    if adds:
        if limits.capability < ADDS_IN_L2 or ARITHMETICS[arithmetic].size != 2 or stage:
            raise ValueError(f"plan: adds must be False for {kernel} in {arithmetic} on {limits.capability}, got True")
        chosen = [x._replace(adds=True) for x in chosen]
    fewest = min(_chunks(x, channels) for x in chosen)
    if kernel != "forward":
        cuts = passes = 1
    if passes is None:
        passes = _passes(chosen[0], groups, math.prod(sizes), depth, channels, limits)
    if cuts is None:
        cuts = max(_cuts(x, group, images, channels, limits) for x, group in zip(chosen, groups, strict=True))
        cuts = max(1, min(cuts, fewest) // passes)
    if kernel == "forward" and cuts * passes > fewest:
        raise ValueError(f"plan: every part of the channels must have a chunk, got {cuts} cuts and {passes} passes")
    if images * passes >= 2**26:
        raise ValueError(f"plan: a call must have fewer than 2^26 images, got {images}; split the batch")
    launches = []
    turns = [True, False] if adds and kernel == "forward" else [False]
    for lse_only, (i, group) in product(turns, enumerate(groups)):
        parts, rounds = (1, 1) if lse_only else (cuts, passes)
        items = parts * sum(axis.segments**2 * axis.lines for axis in group)
        blocks = (images * rounds + (phases[i] - 1) * lag) * items
        if blocks >= 2**31 or math.prod(sizes) >= 2**31 or images * math.prod(sizes) >= 2**32:
            raise ValueError(
                f"plan: a call must have fewer than 2^31 lines, got {images} images of {sizes}; split the batch"
            )
        if images * math.prod(sizes) * max(depth, channels) * ARITHMETICS[arithmetic].size >= UNIT * 2**32:
            raise ValueError(
                f"plan: an array must have fewer than 64 GiB, got {images} images of {sizes} with {depth} channels of "
                f"q and {channels} of v; split the batch or the channels of v"
            )
        padded = group + [Axis(0, 0, 0, 0, 0)] * (3 - len(group))
        numbers = _TAIL.pack(
            images,
            math.prod(sizes),
            depth,
            channels,
            sum(sizes) - len(sizes) + 1,
            lag,
            parts,
            rounds,
            len(group),
            sum(phases[:i]),
            sum(phases[i + 1 :]),
            *(number for axis in padded for number in axis[:5]),
            *(axis.slot for axis in padded),
            *(axis.skips for axis in padded),
            lse_only,
        )
        launches.append(Launch(chosen[i], blocks, images, parts, rounds, -math.log2(crossing), numbers))
    return tuple(launches)
