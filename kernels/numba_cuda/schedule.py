"""Which block computes what, and in which launch: items, segments and phases.

The twin of cuda/schedule.cuh, with the same names. A line longer than a tile is divided into segments. An item of work
is a line with one of its segments as queries and one as keys, and a block computes one item. A phase consists of the
items of all lines of an axis in which the queries of segment j meet the keys of segment j + shift (modulo the number of
segments), so no two blocks of a phase write the same element. Each phase is a launch: the order of launches on the
stream does the work of the tickets in schedule.cuh.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

from numba import cuda


class Phase(NamedTuple):
    """The constants that all blocks of a launch share, passed to the kernels as they are: an axis and a shift."""

    positions: int  # positions of an image
    length: int  # positions of a line
    inner: int  # distance of neighbours on a line, in positions
    segments: int  # segments of a line
    span: int  # positions of a segment; the last may have fewer
    shift: int
    first: int  # 1 in the first phase, which has nothing to add to
    last: int  # 1 in the last phase
    neighbours: int  # positions of a criss-cross
    slot: int  # index, among a position's neighbours, of the first one on this axis
    skips: int  # 1 if the position itself is left out of the neighbours on this axis
    width: int  # length of the last axis, on which the position itself is a neighbour

    def blocks(self, images: int) -> int:
        """Return the number of blocks of the launch, one for each item."""
        return images * self.positions // self.length * self.segments


@lru_cache(maxsize=4096)
def phases(sizes: tuple[int, ...], tile: int, every_neighbour: bool = False) -> tuple[Phase, ...]:
    """Return the phases of a map of `sizes`, in order.

    An axis of length 1 is left out, since its lines hold only the position itself, which is on its other lines too. The
    last axis is run even so if all axes have length 1 or with `every_neighbour`: in `affinity` the position itself is a
    neighbour on the last axis only.
    """
    last, positions = len(sizes) - 1, math.prod(sizes)
    axes = [a for a, n in enumerate(sizes) if n > 1 or (every_neighbour and a == last)] or [last]
    steps = [(a, shift) for a in axes for shift in range(-(-sizes[a] // tile))]
    result = []
    for step, (axis, shift) in enumerate(steps):
        segments = -(-sizes[axis] // tile)
        result.append(
            Phase(
                positions,
                sizes[axis],
                math.prod(sizes[axis + 1 :]),
                segments,
                -(-sizes[axis] // segments),
                shift,
                first=int(step == 0),
                last=int(step == len(steps) - 1),
                neighbours=sum(sizes) - last,
                slot=sum(sizes[:axis]) - axis,
                skips=int(axis != last),
                width=sizes[-1],
            )
        )
    return tuple(result)


@cuda.jit(device=True)
def item_of(block: Any, phase: Any) -> Any:
    """Return a block's item: image, first position of the line, query, key, queries, keys.

    query and key are the first places of the two segments on the line, queries and keys their lengths.
    """
    line, segment = block // phase.segments, block % phase.segments
    lines = phase.positions // phase.length  # of an image
    image, line = line // lines, line % lines
    start = line // phase.inner * phase.length * phase.inner + line % phase.inner
    query = segment * phase.span
    key = (segment + phase.shift) % phase.segments * phase.span
    queries, keys = min(phase.span, phase.length - query), min(phase.span, phase.length - key)
    return image, start, query, key, queries, keys
