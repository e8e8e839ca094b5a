"""How many bytes a call moves between DRAM and the L2 cache, by a model of the cache and of the order of accesses.

The model executes the launches of `plans.plan`: as many blocks as the GPU holds take items by ticket, and advance in
turns, a chunk of channels in a tick. Until its wait an item reads its tiles of q and k and its first chunk; a tick in
which it waits for the earlier phases of its image is idle. In an image's last phase, accesses give a line up (`hints`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import njit

from benchmarks.limits.caches import LINE, SECTOR, Cache, access, cache, traffic
from benchmarks.limits.schedule import Items, Schedule, items_of, schedule_of
from ccgpu.kernels.cuda.configurations import ARITHMETICS, UNIT
from ccgpu.kernels.cuda.plans import Launch

TENSORS = ("q", "k", "v", "out", "lse", "dout", "delta", "dq", "dk", "dv", "scratch")
Q, K, V, OUT, LSE, DOUT, DELTA, DQ, DK, DV, SCRATCH = range(len(TENSORS))


class Traffic(NamedTuple):
    """What a call moves and how long it is idle."""

    dram_read: int  # bytes
    dram_written: int
    least: int  # bytes between DRAM and a cache that holds everything
    asked: int  # bytes that the kernels read from L2 and write to it
    ticks: int
    idle: float  # share of the blocks' ticks in which they wait

    @property
    def dram(self) -> int:
        """Bytes read and written."""
        return self.dram_read + self.dram_written

    @property
    def ratio(self) -> float:
        """Bytes of DRAM over the least."""
        return self.dram / self.least


@njit(cache=True)
def _touch(
    c: Cache, at: np.ndarray, tensor: int, position: int, first: int, last: int, write: bool, give_up: bool
) -> int:
    """Access bytes [first, last) of a position's row of a tensor and return their number."""
    row = at[1, tensor]
    last = min(last, row)
    start = at[0, tensor] + position * row
    begin, end = (start + first) // SECTOR, (start + last - 1) // SECTOR + 1
    for line in range(begin * SECTOR // LINE, ((end - 1) * SECTOR // LINE + 1) if last > first else 0):
        low, high = max(begin - 4 * line, 0), min(end - 4 * line, 4)
        access(c, line, (1 << high) - (1 << low), write, give_up)
    return max(0, last - first)


@njit(cache=True)
def _rows(
    c: Cache,
    at: np.ndarray,
    tensor: int,
    item: np.ndarray,
    keys: bool,
    first: int,
    last: int,
    write: bool,
    give_up: bool,
) -> int:
    """Access bytes [first, last) of the rows of an item's queries or keys."""
    offset, number = (item[KEY], item[KEYS]) if keys else (item[QUERY], item[QUERIES])
    moved = 0
    for i in range(number):
        moved += _touch(c, at, tensor, item[START] + (offset + i) * item[INNER], first, last, write, give_up)
    return moved


FIRST, AFTER, IMAGE, WANTED, START, INNER, QUERY, KEY, QUERIES, KEYS, CUT, EXISTS = range(12)


def _table(items: Items) -> np.ndarray:
    """Return items as rows of int64, in the order of the constants above."""
    columns = (
        "first",
        "after",
        "image",
        "wanted",
        "start",
        "inner",
        "query",
        "key",
        "queries",
        "keys",
        "cut",
        "exists",
    )
    return np.stack([getattr(items, name) for name in columns], axis=1).astype(np.int64)


@njit(cache=True)
def _before_wait(
    c: Cache, at: np.ndarray, item: np.ndarray, backward: bool, chunk: int, first: int, hints: bool, cuts: int
) -> int:
    """Access what an item reads before it waits; `first` is its first chunk."""
    last_use = hints and item[AFTER] == 0
    last_cut = last_use and item[CUT] == cuts - 1
    moved = _rows(c, at, Q, item, False, 0, at[1, Q], False, last_cut)
    moved += _rows(c, at, K, item, True, 0, at[1, K], False, last_cut)
    moved += _rows(c, at, V, item, True, first * chunk, (first + 1) * chunk, False, last_use)
    if backward:
        moved += _rows(c, at, DOUT, item, False, first * chunk, (first + 1) * chunk, False, last_use)
        moved += _rows(c, at, LSE, item, False, 0, at[1, LSE], False, False)
    return moved


@njit(cache=True)
def _chunk(
    c: Cache, at: np.ndarray, item: np.ndarray, backward: bool, chunk: int, n: int, more: bool, hints: bool
) -> int:
    """Access what an item reads and writes at chunk `n`; the next chunk is read too where there are `more`."""
    last_use, again = hints and item[AFTER] == 0, not item[FIRST]
    low, high = n * chunk, (n + 1) * chunk
    moved = 0
    if more:
        moved += _rows(c, at, V, item, True, high, high + chunk, False, last_use)
        if backward:
            moved += _rows(c, at, DOUT, item, False, high, high + chunk, False, last_use)
    if backward and not again:
        moved += _rows(c, at, OUT, item, False, low, high, False, hints)
    result = DV if backward else OUT
    if again:
        moved += _rows(c, at, result, item, backward, low, high, False, last_use)
    return moved + _rows(c, at, result, item, backward, low, high, True, last_use)


@njit(cache=True)
def _scalars(c: Cache, at: np.ndarray, item: np.ndarray, backward: bool, cuts: int) -> int:
    """Access lse or delta after the wait; with cuts, lse's two buffers take turns, and the first cut writes."""
    again, moved = not item[FIRST], 0
    if backward:
        return _rows(c, at, DELTA, item, False, 0, at[1, DELTA], False, False) if again else 0
    written = SCRATCH if cuts > 1 and item[AFTER] % 2 else LSE
    read = LSE if written == SCRATCH or cuts == 1 else SCRATCH
    if again:
        moved += _rows(c, at, read, item, False, 0, at[1, LSE], False, False)
    if item[CUT] == 0:
        moved += _rows(c, at, written, item, False, 0, at[1, LSE], True, False)
    return moved


@njit(cache=True)
def _after_chunks(c: Cache, at: np.ndarray, item: np.ndarray, hints: bool) -> int:
    """Access delta, dq and dk at the end of an item of backward."""
    last_use, again = hints and item[AFTER] == 0, not item[FIRST]
    moved = 0
    if not again:
        moved += _rows(c, at, DELTA, item, False, 0, at[1, DELTA], True, False)
    for tensor in (DQ, DK):
        if again:
            moved += _rows(c, at, tensor, item, tensor == DK, 0, at[1, tensor], False, last_use)
        moved += _rows(c, at, tensor, item, tensor == DK, 0, at[1, tensor], True, last_use)
    return moved


@njit(cache=True)
def _run(
    c: Cache,
    at: np.ndarray,
    items: np.ndarray,
    images: int,
    backward: bool,
    chunk: int,
    chunks: int,
    cuts: int,
    slots: int,
    hints: bool,
) -> tuple[int, int, int, int]:
    """Execute a launch and return bytes asked, ticks, and the blocks' ticks at work and waiting."""
    done = np.zeros(images, np.int64)
    held = np.full(slots, -1, np.int64)  # the ticket of each block's item
    stage = np.zeros(slots, np.int64)
    ticket, asked, ticks, busy, idle, turn = 0, 0, 0, 0, 0, 0
    while True:
        active = False
        for slot in range(slots):
            while held[slot] < 0 and ticket < len(items):
                if items[ticket, EXISTS]:
                    held[slot], stage[slot] = ticket, 0
                ticket += 1
        # Blocks do not advance in the order of their tickets: each tick begins with another one.
        turn = (turn * 1103515245 + 12345) % 2147483648
        for i in range(slots):
            slot = (i + turn) % slots
            if held[slot] < 0:
                continue
            active = True
            item = items[held[slot]]
            low, high = chunks * item[CUT] // cuts, chunks * (item[CUT] + 1) // cuts
            if stage[slot] == 0:
                asked += _before_wait(c, at, item, backward, chunk, low, hints, cuts)
            elif stage[slot] == 1 and done[item[IMAGE]] < item[WANTED]:
                idle += 1
                continue
            else:
                if stage[slot] == 1:
                    asked += _scalars(c, at, item, backward, cuts)
                n = low + stage[slot] - 1
                asked += _chunk(c, at, item, backward, chunk, n, n + 1 < high, hints)
                if n + 1 == high:
                    if backward:
                        asked += _after_chunks(c, at, item, hints)
                    done[item[IMAGE]] += 1
                    held[slot] = -1
            stage[slot] += 1
            busy += 1
        if not active:
            return asked, ticks, busy, idle
        ticks += 1


def _memory(schedule: Schedule, size: int, sum_size: int) -> tuple[np.ndarray, int]:
    """Return where each tensor begins and the bytes of its rows, as an array of shape (2, tensors), and all lines."""
    depth, channels = schedule.depth * size, schedule.channels * size
    rows = [depth, depth, channels, channels, sum_size, channels, sum_size, depth, depth, channels, sum_size]
    lengths = [-(-schedule.images * schedule.positions * row // LINE) * LINE for row in rows]
    starts = np.cumsum([0, *lengths])
    return np.array([starts[:-1], rows], np.int64), int(starts[-1]) // LINE


def simulate(
    launches: Sequence[Launch], l2_bytes: int, slots: Sequence[int], hints: bool = True, sets: bool = False
) -> Traffic:
    """Return the traffic of the launches of a forward or backward call.

    Args:
        launches: of `plans.plan`.
        l2_bytes: size of the cache.
        slots: for each launch, the blocks that the GPU holds at once.
        hints: last uses give up their lines.
        sets: 16-way sets in the place of one queue.
    """
    configuration = launches[0].configuration
    if configuration.kernel not in ("forward", "backward"):
        raise ValueError(f"simulate: launches must be of forward or backward, got {configuration.kernel}")
    kind, schedule = ARITHMETICS[configuration.arithmetic], schedule_of(launches[0])
    at, lines = _memory(schedule, kind.size, kind.sum)
    c = cache(lines, l2_bytes, sets)
    asked = ticks = busy = idle = 0
    for launch, held in zip(launches, slots, strict=True):
        chunk = launch.configuration.chunk_units * UNIT
        s = schedule_of(launch)
        a, t, b, i = _run(
            c,
            at,
            _table(items_of(launch)),
            s.images,
            configuration.kernel == "backward",
            chunk,
            math.ceil(s.channels * kind.size / chunk),
            s.cuts,
            held,
            hints,
        )
        asked, ticks, busy, idle = asked + a, ticks + t, busy + b, idle + i
    read, written, least = traffic(c)
    return Traffic(read, written, least, asked, ticks, idle / (busy + idle))
