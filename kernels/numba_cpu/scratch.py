"""Memory that a thread computes in, kept for its next call: new memory costs a page fault for every 4 kB.

A thread keeps the block that it used last, if that is not larger than `KEPT` bytes for each thread that computed in it.
The memory of a thread that ends is freed.
"""

from __future__ import annotations

import threading

import numpy as np

from ccgpu.kernels.numba_cpu.vectors import VECTOR_BYTES

KEPT = 2**22  # most bytes that are kept, for each thread that computed in them


class Block:
    """Uninitialised memory, aligned to vectors."""

    __slots__ = ("_memory", "address", "size")

    def __init__(self, size: int) -> None:
        self._memory = np.empty(size + VECTOR_BYTES, np.uint8)
        address = self._memory.ctypes.data
        self.address, self.size = address + -address % VECTOR_BYTES, size


class _Kept(threading.local):
    block: Block | None = None
    age = 0  # value of `_age` when the block was kept


_kept = _Kept()
_age = 0  # grows when all threads are to give up what they keep


def take(size: int) -> Block:
    """Return memory of at least `size` bytes, which is the caller's alone until `give_back`.

    Whatever runs on the same thread in between, a signal handler for example, gets memory of its own.
    """
    block, _kept.block = _kept.block, None
    if block is None or block.size < size or _kept.age != _age:
        del block
        return Block(size)
    return block


def give_back(block: Block, threads: int = 1) -> None:
    """Let the thread's next call have the memory, in which `threads` threads computed; without this it is freed."""
    if block.size <= KEPT * threads:
        _kept.block, _kept.age = block, _age


def forget() -> None:
    """Make every thread compute in new memory at its next call, which frees what it keeps and can be measured."""
    global _age
    _age += 1
