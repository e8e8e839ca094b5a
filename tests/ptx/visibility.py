"""Whose writes to global memory a warp may read: the order among blocks, by release and acquire.

PTX ISA, "Memory Consistency Model", simplified: a release (red.release, or a fence before an atomic operation)
publishes what its warp has written, and what the block's other warps have written before the last barrier. An acquire
(ld.acquire, or a fence after a volatile read) lets its warp, and after the next barrier the block, read everything that
has been published until then. Reading anything else that another block wrote in this launch is a race.
"""

from __future__ import annotations

import numpy as np

NOBODY, HOST = -1, -2  # instead of a stamp: not written yet; written before the launch
NEVER = 2**62


class Clock:
    """The state of a block that is running: barriers passed, and until when its warps have seen publications."""

    def __init__(self, warps: int) -> None:
        self.block, self.epoch, self.seen = 0, 0, np.zeros(warps, np.int64)

    def start(self, block: int) -> None:
        """Start another block, which has seen nothing of this launch."""
        self.block, self.epoch = block, 0
        self.seen.fill(0)

    def pass_barrier(self) -> None:
        """What a warp has seen, all have seen."""
        self.epoch += 1
        self.seen.fill(self.seen.max())


class Publications:
    """When writes were published; a stamp stands for the writes of a warp between two barriers."""

    def __init__(self) -> None:
        self._time, self._count = 0, 0
        self._numbers: dict[tuple[int, int, int], int] = {}
        self._of_block: dict[int, list[tuple[int, int, int]]] = {}  # (warp, epoch, stamp)
        self._table = np.empty((0, 4), np.int64)  # block, warp, epoch, time of publication

    def stamps(self, clock: Clock, warps: np.ndarray) -> np.ndarray:
        """Return the stamp of each warp's writes now."""
        known: dict[int, int] = {}
        for warp in set(warps.tolist()):
            key = clock.block, warp, clock.epoch
            if key not in self._numbers:
                number = self._numbers[key] = self._count
                self._count += 1
                self._of_block.setdefault(clock.block, []).append((warp, clock.epoch, number))
                if number >= len(self._table):
                    grown = np.empty((2 * number + 64, 4), np.int64)
                    grown[:number] = self._table[:number]
                    self._table = grown
                self._table[number] = (*key, NEVER)
            known[warp] = self._numbers[key]
        return np.array([known[warp] for warp in warps.tolist()], np.int32)

    def release(self, clock: Clock, warp: int) -> None:
        """Publish what a warp has written, and what the others have before the last barrier."""
        self._time += 1
        for of, epoch, number in self._of_block.get(clock.block, ()):
            if (of == warp or epoch < clock.epoch) and self._table[number, 3] == NEVER:
                self._table[number, 3] = self._time
        # Later writes of the warp are not published by this release.
        key = clock.block, warp, clock.epoch
        self._numbers.pop(key, None)

    def acquire(self, clock: Clock, warp: int) -> None:
        """Let a warp read what has been published."""
        clock.seen[warp] = self._time

    def reason(self, stamps: np.ndarray, clock: Clock, warps: np.ndarray) -> str | None:
        """Return why warps may not read bytes with these stamps (reads, bytes), or None."""
        written = np.maximum(stamps, 0)
        if not len(self._table):
            return None
        block, warp, epoch, time = np.moveaxis(self._table[written], -1, 0)
        real = stamps >= 0
        own = real & (block == clock.block)
        if (own & (epoch == clock.epoch) & (warp != warps[:, None])).any():
            return "which another warp of the block has written since the last barrier"
        others = real & (block != clock.block)
        if (others & (time > clock.seen[warps][:, None])).any():
            return "written by another block, without a release there and an acquire here in between"
        return None

    def foreign(self, stamps: np.ndarray, clock: Clock) -> bool:
        """Tell whether another block of this launch wrote any of these bytes."""
        if not len(self._table):
            return False
        return bool(((stamps >= 0) & (self._table[np.maximum(stamps, 0), 0] != clock.block)).any())
