"""The launches of a call: which kernel takes which axes of the map, and the arguments it gets.

`plan` is cached: what remains for each call is to put the addresses in front of the numbers.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from typing import NamedTuple

from ccgpu.kernels.cuda.configurations import TILE, Configuration, Limits, classes, configuration

# Two axes share a launch, and its kernel, unless the shorter would be computed with over this many times its tiles.
MOST_WASTE = 1.5


class Pointers(NamedTuple):
    """Addresses of the arrays of a call, 0 where one has no part in it."""

    q: int = 0
    k: int = 0
    v: int = 0
    out: int = 0
    lse: int = 0
    dout: int = 0
    dlse: int = 0
    delta: int = 0
    dq: int = 0
    dk: int = 0
    dv: int = 0
    weights: int = 0


class Axis(NamedTuple):
    """Lines along one axis, as in cuda/schedule.cuh."""

    length: int
    inner: int
    lines: int
    segments: int
    span: int
    tiles: int = 0  # of the class that holds a span; not an argument
    slot: int = 0  # where its neighbours begin among those of a position
    skips: bool = False  # whether the position itself is left out there


_HEAD = struct.Struct("13Q2d")
_TAIL = struct.Struct("9i15i3i3i")
ARGUMENT_BYTES = _HEAD.size + _TAIL.size


class Launch(NamedTuple):
    """One launch: `blocks` blocks along x of `configuration.threads` threads."""

    configuration: Configuration
    blocks: int
    images: int
    share: float
    numbers: bytes

    @property
    def counters(self) -> int:
        """The int32 zeros that the launch needs."""
        return self.images + 1

    def arguments(self, pointers: Pointers, counters: int, scale: float = 1.0) -> bytes:
        """Return the struct `Arguments` that the kernel takes by value."""
        return _HEAD.pack(*pointers, counters, scale, self.share) + self.numbers


def _axes(sizes: tuple[int, ...], stage: bool, held: tuple[int, ...]) -> list[Axis]:
    """Return the axes that have neighbours, cut into segments that a block can hold.

    In the fused kernels a position is on each line through it, with an equal share; a line of that position alone adds
    nothing to the others. In the stages it is among the neighbours on the last axis only.
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
    """Return neighbouring axes together that one kernel can take without much waste."""
    groups: list[list[Axis]] = []
    for axis in axes:
        tiles = [axis.tiles, *(other.tiles for other in groups[-1])] if groups else []
        if tiles and max(tiles) <= MOST_WASTE * min(tiles):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    return groups


@lru_cache(maxsize=4096)
def plan(
    kernel: str,
    arithmetic: str,
    images: int,
    sizes: tuple[int, ...],
    depth: int,
    channels: int,
    limits: Limits,
    lag: int | None = None,
) -> tuple[Launch, ...]:
    """Return the launches of a call, in order on one stream.

    Args:
        kernel: one of KERNELS.
        arithmetic: a key of ARITHMETICS.
        images: B; none of the numbers may be 0.
        sizes: of the map, one to three.
        depth: channels of q and k; channels: of v. Both multiples of 16 bytes. (affinity takes depth only, aggregate
            channels only.)
        limits: of the GPU.
        lag: steps by which a phase of an image follows the one before it. By default 1, which has other images to
            compute meanwhile, or 0, image after image, where there are fewer of them than phases.

    Raises:
        ValueError: the call has more than 2^31 lines.
    """
    stage = kernel not in ("forward", "backward")
    held = classes(kernel, arithmetic, depth, limits)
    groups = _groups(_axes(sizes, stage, held))
    crossing = sum(len(group) for group in groups)
    launches = []
    for i, group in enumerate(groups):
        phases = sum(axis.segments for axis in group)
        steps = int(phases <= images) if lag is None else lag
        blocks = (images + (phases - 1) * steps) * sum(axis.segments**2 * axis.lines for axis in group)
        if blocks >= 2**31 or math.prod(sizes) >= 2**31 or images * math.prod(sizes) >= 2**32:
            raise ValueError(
                f"plan: a call must have fewer than 2^31 lines, got {images} images of {sizes}; split the batch"
            )
        padded = group + [Axis(0, 0, 0, 0, 0)] * (3 - len(group))
        numbers = _TAIL.pack(
            images,
            math.prod(sizes),
            depth,
            channels,
            sum(sizes) - len(sizes) + 1,
            steps,
            len(group),
            i == 0,
            i == len(groups) - 1,
            *(number for axis in padded for number in axis[:5]),
            *(axis.slot for axis in padded),
            *(axis.skips for axis in padded),
        )
        chosen = configuration(kernel, arithmetic, max(axis.tiles for axis in group), depth, limits)
        launches.append(Launch(chosen, blocks, images, -math.log2(crossing), numbers))
    return tuple(launches)
