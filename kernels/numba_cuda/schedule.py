"""Which block computes what, and in which launch: items, segments and phases.

The twin of cuda/schedule.cuh, with the same names. A line longer than a tile is cut into segments; an item is a line,
one segment of it as queries and one as keys, and a block computes one item. In a phase, queries of segment j meet keys
of segment j + shift (modulo the number of segments), on all lines of an axis, so no two blocks of a phase write the
same place. A phase is one launch: the order of the stream takes the place of tickets.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

from numba import cuda


class Phase(NamedTuple):
    """An axis and a shift: what all blocks of a launch have in common. Its numbers reach the kernels as they are."""

    positions: int  # of an image
    length: int  # positions of a line
    inner: int  # positions between neighbours on a line
    segments: int  # parts a line is cut into
    span: int  # positions of a part; the last may have fewer
    shift: int
    first: int  # 1 if there is nothing to add to yet
    last: int  # 1 if there is nothing to come
    neighbours: int  # positions of a criss-cross
    slot: int  # where the axis's neighbours begin among those of a position
    skips: int  # 1 if the position itself is left out there
    width: int  # positions on the last axis, where the position itself has its place among the neighbours

    def blocks(self, images: int) -> int:
        """Return the number of blocks, one for each item."""
        return images * self.positions // self.length * self.segments


@lru_cache(maxsize=4096)
def phases(sizes: tuple[int, ...], tile: int, every_neighbour: bool = False) -> tuple[Phase, ...]:
    """Return the phases of a map of `sizes`, in order.

    An axis of length 1 has nothing to add: its lines hold nothing but the position, which is on its other lines too. It
    is run only if all are such or, the last axis, for `every_neighbour`: in `affinity` it holds the position itself.
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
    """Return a block's item: image, the line's first position in it, then first place and size of its two segments."""
    line, segment = block // phase.segments, block % phase.segments
    lines = phase.positions // phase.length  # of an image
    image, line = line // lines, line % lines
    start = line // phase.inner * phase.length * phase.inner + line % phase.inner
    query = segment * phase.span
    key = (segment + phase.shift) % phase.segments * phase.span
    queries, keys = min(phase.span, phase.length - query), min(phase.span, phase.length - key)
    return image, start, query, key, queries, keys
