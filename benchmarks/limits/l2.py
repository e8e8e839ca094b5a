"""How many bytes a call moves between DRAM and the L2 cache, by a model of the cache and of the order of accesses.

The model executes the launches of `plans.plan`: as many blocks as the GPU holds take items by ticket, and advance in
turns, a chunk of channels in a tick. Until its wait an item reads its tiles of q and k and its first chunk; a tick in
which it waits for the earlier phases of its unit, a pass through an image, is idle. In a unit's last phase, the loop
over the chunks gives up the lines that it accesses, all but those of its first chunk (`hints`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import njit

from benchmarks.limits.caches import LINE, SECTOR, Cache, access, cache, traffic
from benchmarks.limits.schedule import Items, items_of, schedule_of
from ccgpu.kernels.cuda.configurations import ARITHMETICS, UNIT
from ccgpu.kernels.cuda.plans import Launch

TENSORS = ("q", "k", "v", "out", "lse", "dout", "delta", "dq", "dk", "dv", "scratch")
Q, K, V, OUT, LSE, DOUT, DELTA, DQ, DK, DV, SCRATCH = range(len(TENSORS))


class Traffic(NamedTuple):
    """What a call moves and how long it is idle."""

    dram_read: int  # bytes
    dram_written: int
    least: int  # bytes of the call's tensors once: those of a cache that holds everything, without scratch
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


FIRST, AFTER, PASS, NUMBER, WANTED, START, INNER, QUERY, KEY, QUERIES, KEYS, CUT, EXISTS = range(13)


def _table(items: Items) -> np.ndarray:
    """Return items as rows of int64, in the order of the constants above."""
    columns = (
        "first",
        "after",
        "pass_number",
        "unit",
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
def _gives_up(item: np.ndarray, hints: bool) -> bool:
    """Return whether the loop over the chunks of an item gives lines up."""
    return hints and item[AFTER] == 0 and not item[FIRST]


@njit(cache=True)
def _before_wait(
    c: Cache, at: np.ndarray, item: np.ndarray, backward: bool, chunk: int, first: int, hints: bool, parts: int
) -> int:
    """Access what an item reads before it waits; `first` is its first chunk."""
    last_use = hints and item[AFTER] == 0 and item[CUT] == parts - 1
    moved = _rows(c, at, Q, item, False, 0, at[1, Q], False, last_use)
    moved += _rows(c, at, K, item, True, 0, at[1, K], False, last_use)
    moved += _rows(c, at, V, item, True, first * chunk, (first + 1) * chunk, False, False)
    if backward:
        moved += _rows(c, at, DOUT, item, False, first * chunk, (first + 1) * chunk, False, False)
        moved += _rows(c, at, LSE, item, False, 0, at[1, LSE], False, False)
    return moved


@njit(cache=True)
def _chunk(
    c: Cache, at: np.ndarray, item: np.ndarray, backward: bool, chunk: int, n: int, more: bool, hints: bool
) -> int:
    """Access what an item reads and writes at chunk `n`; the next chunk is read too where there are `more`."""
    last_use, again = _gives_up(item, hints), not item[FIRST]
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
def _lse(c: Cache, at: np.ndarray, item: np.ndarray, other: bool, array: int, write: bool) -> int:
    """Access lse, or the array `array` of scratch in the place of it."""
    positions = at[2, LSE] if other else 0
    row, moved = at[1, LSE], 0
    for i in range(item[QUERIES]):
        position = array * positions + item[START] + (item[QUERY] + i) * item[INNER]
        moved += _touch(c, at, SCRATCH if other else LSE, position, 0, row, write, False)
    return moved


@njit(cache=True)
def _scalars(c: Cache, at: np.ndarray, item: np.ndarray, backward: bool, cuts: int) -> int:
    """Access lse or delta after the wait.

    Where an image has several parts, the phases of a pass write lse in turn to two arrays: its first cut does.
    """
    again, moved = not item[FIRST], 0
    if backward:
        return _rows(c, at, DELTA, item, False, 0, at[1, DELTA], False, False) if again else 0
    turns, number, odd = at[2, SCRATCH] > 0, item[PASS], item[AFTER] % 2 == 1
    # Of the two arrays of a pass, the one that its last phase writes is lse in pass 0.
    if again:
        moved += _lse(c, at, item, turns and (number > 0 or not odd), 2 * number - odd, False)
    if item[CUT] == number * cuts:
        moved += _lse(c, at, item, turns and (number > 0 or odd), 2 * number - (not odd), True)
    return moved


@njit(cache=True)
def _after_chunks(c: Cache, at: np.ndarray, item: np.ndarray) -> int:
    """Access delta, dq and dk at the end of an item of backward."""
    again, moved = not item[FIRST], 0
    if not again:
        moved += _rows(c, at, DELTA, item, False, 0, at[1, DELTA], True, False)
    for tensor in (DQ, DK):
        if again:
            moved += _rows(c, at, tensor, item, tensor == DK, 0, at[1, tensor], False, False)
        moved += _rows(c, at, tensor, item, tensor == DK, 0, at[1, tensor], True, False)
    return moved


@njit(cache=True)
def _run(
    c: Cache,
    at: np.ndarray,
    items: np.ndarray,
    units: int,
    backward: bool,
    chunk: int,
    chunks: int,
    cuts: int,
    parts: int,
    slots: int,
    hints: bool,
) -> tuple[int, int, int, int]:
    """Execute a launch and return bytes asked, ticks, and the blocks' ticks at work and waiting."""
    done = np.zeros(units, np.int64)
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
            low, high = chunks * item[CUT] // parts, chunks * (item[CUT] + 1) // parts
            if stage[slot] == 0:
                asked += _before_wait(c, at, item, backward, chunk, low, hints, parts)
            elif stage[slot] == 1 and done[item[NUMBER]] < item[WANTED]:
                idle += 1
                continue
            else:
                if stage[slot] == 1:
                    asked += _scalars(c, at, item, backward, cuts)
                n = low + stage[slot] - 1
                asked += _chunk(c, at, item, backward, chunk, n, n + 1 < high, hints)
                if n + 1 == high:
                    if backward:
                        asked += _after_chunks(c, at, item)
                    done[item[NUMBER]] += 1
                    held[slot] = -1
            stage[slot] += 1
            busy += 1
        if not active:
            return asked, ticks, busy, idle
        ticks += 1


def _memory(launch: Launch, size: int, sum_size: int) -> tuple[np.ndarray, int]:
    """Return where each tensor begins, the bytes of its rows and their number, as an array (3, tensors), and all lines.

    The rows of scratch are those of arrays like lse, one after the other.
    """
    schedule = schedule_of(launch)
    depth, channels = schedule.depth * size, schedule.channels * size
    rows = [depth, depth, channels, channels, sum_size, channels, sum_size, depth, depth, channels, sum_size]
    numbers = [schedule.images * schedule.positions] * (len(TENSORS) - 1)
    numbers.append(numbers[0] * launch.scratch)
    lengths = [-(-number * row // LINE) * LINE for number, row in zip(numbers, rows, strict=True)]
    starts = np.cumsum([0, *lengths])
    return np.array([starts[:-1], rows, numbers], np.int64), int(starts[-1]) // LINE


def bytes_between_phases(launch: Launch, l2_bytes: int) -> int:
    """Return the bytes that a cache moves besides the least, however it chooses what it keeps from phase to phase.

    Each phase uses all rows of its pass once, so of these the next one finds at most what the cache holds. What is kept
    of results saves a write and a read, of other tensors a read. What blocks read before they wait is left out.
    """
    s, configuration = schedule_of(launch), launch.configuration
    kind, phases = ARITHMETICS[configuration.arithmetic], sum(axis.segments for axis in s.axes)
    depth, channels = s.depth * kind.size, s.channels * kind.size // s.passes
    if configuration.kernel == "backward":
        operands, results = 2 * depth + 2 * channels + 2 * kind.sum, 2 * depth + channels
    else:
        operands, results = 2 * depth + channels, channels + kind.sum
    rows = l2_bytes / s.positions  # bytes of a position that the cache holds
    missing = 2 * max(0, results - rows) + min(operands, max(0, operands + results - rows))
    return int(s.images * s.passes * (phases - 1) * s.positions * missing)


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

    Raises:
        ValueError: the launches are of a stage, or add to results in L2, which the model does not know.
    """
    configuration = launches[0].configuration
    if configuration.kernel not in ("forward", "backward"):
        raise ValueError(f"simulate: launches must be of forward or backward, got {configuration.kernel}")
    if configuration.adds:
        raise ValueError(f"simulate: launches must not add in L2, got {configuration.entry}; plan them without adds")
    kind = ARITHMETICS[configuration.arithmetic]
    at, lines = _memory(launches[0], kind.size, kind.sum)
    c = cache(lines, l2_bytes, sets)
    asked = ticks = busy = idle = 0
    for launch, held in zip(launches, slots, strict=True):
        chunk = launch.configuration.chunk_units * UNIT
        s = schedule_of(launch)
        a, t, b, i = _run(
            c,
            at,
            _table(items_of(launch)),
            s.images * s.passes,
            configuration.kernel == "backward",
            chunk,
            math.ceil(s.channels * kind.size / chunk),
            s.cuts,
            s.cuts * s.passes,
            held,
            hints,
        )
        asked, ticks, busy, idle = asked + a, ticks + t, busy + b, idle + i
    read, written, least = traffic(c, int(at[0, SCRATCH]) // LINE)
    return Traffic(read, written, least, asked, ticks, idle / (busy + idle))
