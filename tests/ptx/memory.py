"""Global and shared memory, and what the machine forbids there.

Global memory is the given buffers and nothing else: an access must lie in one, aligned, and may write only where that
is allowed. A result is readable once it is written and, if another block wrote it, published (visibility.py), by an
instruction that bypasses L1: that does not see what others write (PTX ISA, "Cache Operators").

Shared memory remembers for every byte whether it was written, or is being written by an asynchronous copy, and which
warp wrote and which warps read it since the last barrier: accesses of two warps, one of them a write, without a
barrier in between are a race.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tests.ptx.visibility import HOST, NOBODY, Clock, Publications

UNWRITTEN, WRITTEN, PENDING = 0, 1, 2
ONES = {1: 0x01, 2: 0x0101, 4: 0x01010101}  # a byte's value, repeated
UNSIGNED = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8")}
SHARED_START = 1024  # no shared variable lies at address 0
MANY = 0xFF  # several warps read a byte
# Generic addresses of shared and of local memory; addresses of the host's memory are smaller.
SHARED_WINDOW, LOCAL_WINDOW = 1 << 56, 1 << 57


class Fault(RuntimeError):
    """A kernel did something that the machine forbids."""


class Buffer(NamedTuple):
    """Global memory that a kernel may access: bytes (uint8) that exist, `fresh` ones hold no value yet."""

    name: str
    bytes: np.ndarray
    writable: bool
    fresh: bool = False


class Place(NamedTuple):
    """Where accesses lie: a buffer's index, byte offsets in it, and which accesses (None: all)."""

    buffer: int
    offsets: np.ndarray
    which: np.ndarray | None


class GlobalMemory:
    """The buffers of a launch."""

    def __init__(self, buffers: list[Buffer]) -> None:
        for buffer in buffers:
            if buffer.bytes.dtype != np.uint8 or not buffer.bytes.flags.c_contiguous:
                raise ValueError(f"GlobalMemory: buffer {buffer.name} must be contiguous bytes")
        self.buffers = sorted(buffers, key=lambda b: b.bytes.ctypes.data)
        self._starts = np.array([b.bytes.ctypes.data for b in self.buffers], np.uint64)
        self._ends = np.array([b.bytes.ctypes.data + b.bytes.size for b in self.buffers], np.uint64)
        self.publications = Publications()
        self._stamps = [
            np.full(b.bytes.size, NOBODY if b.fresh else HOST, np.int32) if b.writable else None for b in self.buffers
        ]
        self._views: dict[tuple[int, np.dtype], np.ndarray] = {}

    def view(self, buffer: int, dtype: np.dtype) -> np.ndarray:
        """Return a buffer as an array of elements from its first byte on, a remainder left out."""
        if (buffer, dtype) not in self._views:
            held = self.buffers[buffer].bytes
            self._views[buffer, dtype] = held[: held.size // dtype.itemsize * dtype.itemsize].view(dtype)
        return self._views[buffer, dtype]

    def places(self, addresses: np.ndarray, size: int, write: bool) -> list[Place]:
        """Return where accesses of `size` bytes lie.

        Raises:
            Fault: one lies outside, is not aligned, or writes to a buffer that is read-only.
        """
        if addresses.size == 0:
            return []
        misaligned = addresses & np.uint64(size - 1)
        if misaligned.any():
            raise Fault(f"address {int(addresses[np.argmax(misaligned > 0)]):#x} is not aligned to {size} bytes")
        index = np.searchsorted(self._starts, addresses, "right").astype(np.int64) - 1
        known = np.maximum(index, 0)
        outside = (index < 0) | (addresses + np.uint64(size) > self._ends[known])
        if outside.any():
            raise Fault(self._outside(int(addresses[np.argmax(outside)]), size))
        first = int(index[0])
        groups = (
            [(first, None)] if (index == first).all() else [(int(b), np.flatnonzero(index == b)) for b in set(index)]
        )
        result = []
        for buffer, which in groups:
            if write and not self.buffers[buffer].writable:
                raise Fault(f"a write to {self.buffers[buffer].name}, which is only to be read")
            at = addresses if which is None else addresses[which]
            result.append(Place(buffer, (at - self._starts[buffer]).astype(np.int64), which))
        return result

    def _outside(self, address: int, size: int) -> str:
        distances = [
            (min(abs(address - int(start)), abs(address - int(end))), b.name, address - int(start), b.bytes.size)
            for start, end, b in zip(self._starts, self._ends, self.buffers, strict=True)
        ]
        _, name, offset, held = min(distances)
        return f"{size} bytes at offset {offset} from the start of {name}, which has {held} bytes: out of bounds"

    def check_read(self, place: Place, size: int, clock: Clock, warps: np.ndarray, bypasses: bool) -> None:
        """Raise if bytes are not written yet, or may not be visible to the warps that read them."""
        stamps = self._stamps[place.buffer]
        if stamps is None:
            return
        found = stamps[place.offsets[:, None] + np.arange(size)]
        if (found == HOST).all():
            return
        name = self.buffers[place.buffer].name
        if (found == NOBODY).any():
            at = int(place.offsets[np.argmax((found == NOBODY).any(1))])
            raise Fault(f"a read of {name} at offset {at} before anything is written there")
        if not bypasses and self.publications.foreign(found, clock):
            raise Fault(f"a read of {name}, written by another block of this launch, that may find old values in L1")
        reason = self.publications.reason(found, clock, warps)
        if reason is not None:
            raise Fault(f"a read of {name}, {reason}")

    def mark_written(self, place: Place, size: int, clock: Clock, warps: np.ndarray) -> None:
        """Remember which warps wrote."""
        stamps = self._stamps[place.buffer]
        if stamps is not None:
            new = self.publications.stamps(clock, warps)
            stamps[place.offsets[:, None] + np.arange(size)] = new[:, None]


class SharedMemory:
    """The shared memory of a block: `size` bytes from SHARED_START on, NaN at first."""

    def __init__(self, size: int) -> None:
        held = -(-size // 16) * 16
        self.size, self.bytes = size, np.empty(held, np.uint8)
        self._state, self._writer, self._reader = (np.empty(held, np.uint8) for _ in range(3))
        # The same bytes as units of 1, 2 and 4 bytes: values, states, writers, readers.
        self.units = {
            n: tuple(x.view(UNSIGNED[n]) for x in (self.bytes, self._state, self._writer, self._reader))
            for n in (1, 2, 4)
        }

    def reset(self) -> None:
        """Start another block."""
        self.bytes.fill(0xFF)
        self._state.fill(UNWRITTEN)
        self.pass_barrier()

    def pass_barrier(self) -> None:
        """All accesses before a barrier come before those after it."""
        self._writer.fill(0)
        self._reader.fill(0)

    def indices(self, addresses: np.ndarray, size: int, alignment: int) -> tuple[int, np.ndarray]:
        """Return the unit of accesses of `size` bytes, and the (accesses, units) indices.

        Raises:
            Fault: an access is not aligned or out of bounds.
        """
        offsets = addresses.astype(np.int64) - SHARED_START
        if (offsets & (alignment - 1)).any():
            raise Fault(f"a shared address is not aligned to {alignment} bytes")
        if offsets.size and (int(offsets.min()) < 0 or int(offsets.max()) + size > self.size):
            bad = offsets[(offsets < 0) | (offsets + size > self.size)][0]
            raise Fault(f"{size} bytes at offset {bad} of {self.size} bytes of shared memory: out of bounds")
        unit = min(size, 4)
        return unit, (offsets // unit)[:, None] + np.arange(size // unit)

    def read(self, unit: int, index: np.ndarray, warps: np.ndarray) -> Any:
        """Return the values at indices, read by a warp for each row.

        Raises:
            Fault: bytes are unwritten, pending, or written by another warp since the last barrier.
        """
        values, states, writers, readers = self.units[unit]
        found = states[index]
        if (found != ONES[unit]).any():
            pending = (found.view(np.uint8) & PENDING).any()
            what = "an asynchronous copy may still be writing" if pending else "nothing has been written to"
            raise Fault(f"a read of shared memory that {what}")
        mine = ((warps + 1) * ONES[unit]).astype(values.dtype)[:, None]
        self._no_race(writers[index], mine, "a read of what another warp has written")
        before = readers[index]
        if (before != mine).any():
            full = values.dtype.type(MANY * ONES[unit])
            readers[index] = now = np.where((before == 0) | (before == mine), mine, full)
            lost = readers[index] != now  # several warps read the same unit in this very access
            if lost.any():
                readers[index[lost]] = full
        return values[index]

    @staticmethod
    def _no_race(found: Any, mine: Any, what: str) -> None:
        if ((found != 0) & (found != mine)).any():
            by_byte, own = (np.ascontiguousarray(x).view(np.uint8) for x in (found, np.broadcast_to(mine, found.shape)))
            if ((by_byte != 0) & (by_byte != own)).any():
                raise Fault(f"a race in shared memory: {what} since the last barrier")

    def check_write(self, unit: int, index: np.ndarray, warps: np.ndarray) -> np.ndarray:
        """Raise for a race or a pending copy; return the mark of each row's warp."""
        _, states, writers, readers = self.units[unit]
        if (states[index].view(np.uint8) & PENDING).any():
            raise Fault("a write to shared memory that an asynchronous copy may still be writing")
        mine = ((warps + 1) * ONES[unit]).astype(states.dtype)[:, None]
        self._no_race(writers[index], mine, "a write to what another warp has written")
        self._no_race(readers[index], mine, "a write to what another warp has read")
        return mine

    def _mark(self, unit: int, index: np.ndarray, mine: np.ndarray) -> None:
        writers = self.units[unit][2]
        writers[index] = mine
        if (writers[index] != mine).any():
            raise Fault("a race in shared memory: two warps write to the same place at once")

    def write(self, unit: int, index: np.ndarray, values: Any, warps: np.ndarray) -> None:
        """Write values at indices, by a warp for each row.

        Raises:
            Fault: as `check_write`.
        """
        mine = self.check_write(unit, index, warps)
        held, states = self.units[unit][:2]
        held[index] = values
        states[index] = ONES[unit]
        self._mark(unit, index, mine)

    def begin_copy(self, index: np.ndarray, warps: np.ndarray) -> None:
        """Units of 4 bytes will be written by an asynchronous copy at an unknown time."""
        self._mark(4, index, self.check_write(4, index, warps))
        self.units[4][1][index] = PENDING * ONES[4]

    def end_copy(self, index: np.ndarray, values: Any, warps: np.ndarray) -> None:
        """The copy is complete for the threads that waited for it, and for the others after a barrier."""
        held, states = self.units[4][:2]
        held[index] = values
        states[index] = ONES[4]
        self._mark(4, index, ((warps + 1) * ONES[4]).astype(np.uint32)[:, None])
