"""Models of an L2 cache: one queue of 128-byte lines, the least recently used last, or 16-way sets with hashed places.

A line has four sectors, which are read from DRAM and written back on their own. A written sector is not read before:
the kernels write whole sectors. Lines that an access gives up (`evict_first`) are dropped before all others, in the
order in which they were given up.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

LINE, SECTOR = 128, 32  # bytes
WAYS = 16
NEWER, OLDER, FLAGS = range(3)  # columns of Cache.lines
# Bits of a line's flags: whether it is held, whether it is given up, and for each sector whether it is valid, dirty,
# was read before it was ever written, and was ever written.
HELD, GIVEN_UP, VALID, DIRTY, READ, WRITTEN = 1 << 16, 1 << 17, 0, 4, 8, 12
FETCHED, WRITTEN_BACK, USED, CLOCK = range(4)  # entries of Cache.counts
NEWEST, OLDEST = range(2)  # columns of Cache.ends


class Cache(NamedTuple):
    """A cache over the lines of a memory."""

    lines: np.ndarray  # int32 (lines of the memory, 4)
    tags: np.ndarray  # int32 (sets, WAYS), the lines held; no rows in a queue
    stamps: np.ndarray  # int64 (sets, WAYS): when a line was last used, or a number before all times
    ends: np.ndarray  # the ends of two queues: of the lines to keep, and of those given up
    counts: np.ndarray  # sectors and lines
    capacity: int  # lines


def cache(lines: int, capacity_bytes: int, sets: bool) -> Cache:
    """Return an empty cache over a memory of so many lines."""
    capacity = capacity_bytes // LINE
    rows = capacity // WAYS if sets else 0
    records = np.zeros((lines, 4), np.int32)
    records[:, (NEWER, OLDER)] = -1
    stamps = np.full((rows, WAYS), np.iinfo(np.int64).min, np.int64)
    return Cache(
        records, np.full((rows, WAYS), -1, np.int32), stamps, np.full((2, 2), -1), np.zeros(4, np.int64), capacity
    )


@njit(cache=True)
def _sectors(mask: int) -> int:
    """Return the number of sectors in a mask of four."""
    return (mask & 1) + (mask >> 1 & 1) + (mask >> 2 & 1) + (mask >> 3 & 1)


@njit(cache=True)
def _unlink(c: Cache, line: int) -> None:
    newer, older = c.lines[line, NEWER], c.lines[line, OLDER]
    queue = int(c.lines[line, FLAGS] & GIVEN_UP != 0)
    if newer >= 0:
        c.lines[newer, OLDER] = older
    else:
        c.ends[queue, NEWEST] = older
    if older >= 0:
        c.lines[older, NEWER] = newer
    else:
        c.ends[queue, OLDEST] = newer


@njit(cache=True)
def _link(c: Cache, line: int, queue: int) -> None:
    newest = c.ends[queue, NEWEST]
    c.lines[line, NEWER], c.lines[line, OLDER] = -1, newest
    if newest >= 0:
        c.lines[newest, NEWER] = line
    else:
        c.ends[queue, OLDEST] = line
    c.ends[queue, NEWEST] = line


@njit(cache=True)
def _drop(c: Cache, line: int) -> None:
    flags = c.lines[line, FLAGS]
    c.counts[WRITTEN_BACK] += _sectors(flags >> DIRTY & 15)
    c.lines[line, FLAGS] = flags & (15 << READ | 15 << WRITTEN)


@njit(cache=True)
def _in_queue(c: Cache, line: int, give_up: bool) -> None:
    if c.lines[line, FLAGS] & HELD:
        _unlink(c, line)
    elif c.counts[USED] < c.capacity:
        c.counts[USED] += 1
    else:
        oldest = c.ends[1, OLDEST] if c.ends[1, OLDEST] >= 0 else c.ends[0, OLDEST]
        _unlink(c, oldest)
        _drop(c, oldest)
    _link(c, line, int(give_up))


@njit(cache=True)
def _in_sets(c: Cache, line: int, give_up: bool) -> None:
    # The multiplications and shifts of splitmix64 spread lines over the sets; hardware has a hash of its own.
    h = np.uint64(line) * np.uint64(0x9E3779B97F4A7C15)
    h = (h ^ h >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    row = np.int64((h ^ h >> np.uint64(27)) % np.uint64(len(c.tags)))
    place = 0
    if c.lines[line, FLAGS] & HELD:
        while c.tags[row, place] != line:
            place += 1
    else:
        for way in range(1, WAYS):
            if c.stamps[row, way] < c.stamps[row, place]:
                place = way
        if c.tags[row, place] >= 0:
            _drop(c, c.tags[row, place])
        c.tags[row, place] = line
    c.counts[CLOCK] += 1
    c.stamps[row, place] = c.counts[CLOCK] - (1 << 60 if give_up else 0)


@njit(cache=True)
def access(c: Cache, line: int, sectors: int, write: bool, give_up: bool) -> None:
    """Read or write sectors, a mask of four, of a line; with `give_up` the line is the next to be dropped."""
    if len(c.tags):
        _in_sets(c, line, give_up)
    else:
        _in_queue(c, line, give_up)
    flags = c.lines[line, FLAGS] & ~GIVEN_UP | (GIVEN_UP if give_up else 0)
    if write:
        flags |= sectors << DIRTY | sectors << WRITTEN
    else:
        missing = sectors & ~(flags >> VALID)
        c.counts[FETCHED] += _sectors(missing)
        flags |= (missing & ~(flags >> WRITTEN)) << READ
    c.lines[line, FLAGS] = flags | HELD | sectors << VALID


def traffic(c: Cache, lines: int | None = None) -> tuple[int, int, int]:
    """Return the bytes read from DRAM, the bytes written, all that is left included, and the least of their sum.

    The least is that of the first `lines` lines of the memory, by default of all.
    """
    flags = c.lines[:, FLAGS]
    left, once, ever = (
        int(sum(np.count_nonzero(part >> kind & 1 << i) for i in range(4)))
        for kind, part in ((DIRTY, flags), (READ, flags[:lines]), (WRITTEN, flags[:lines]))
    )
    return int(c.counts[FETCHED]) * SECTOR, (int(c.counts[WRITTEN_BACK]) + left) * SECTOR, (once + ever) * SECTOR
