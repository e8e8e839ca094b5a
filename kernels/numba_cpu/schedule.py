"""How a call is divided and run on threads: axes as groups of lines, a thread pool.

The kernels release Python's global lock and run on a pool of Python threads instead of Numba's threading layers, so
that calls from several threads at once and from forked processes (data loaders) work with any OpenMP library loaded.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import numpy as np
from numba import config

from ccgpu.kernels.numba_cpu.attention import Sizes, divide_memory
from ccgpu.kernels.numba_cpu.cache import COMPILATION, prepare
from ccgpu.kernels.numba_cpu.lines import Axis
from ccgpu.kernels.numba_cpu.matrices import filled_up
from ccgpu.kernels.numba_cpu.operands import Arithmetic, Input, Output
from ccgpu.kernels.numba_cpu.tickets import new_counters, phase_of
from ccgpu.kernels.numba_cpu.tiles import TILE_ROWS
from ccgpu.kernels.numba_cpu.vectors import VECTOR_BYTES

# Most bytes of a group's energies in a thread's memory. A group then has half of the 97 columns of 97 x 97 positions
# (43 kB of energies each): a strip that is read and written 200 bytes at a time. Strips of 13 columns took 1.7 times as
# long.
SHEET_BYTES = 5 * 2**19
CHUNK, CHUNK_GATHERED = 512, 128  # bytes of a position's channels processed at once; the second, for gathered lines
PARTS = 8  # tickets of a phase for each thread, so that a thread that is held up takes fewer
SMALL = 2**20  # multiply-adds that one thread finishes before another one is awake
TOGETHER = 2**20  # elements of the images that go through all axes together, while the CPU's caches hold them


def plan_axes(sizes: tuple[int, ...], images: int, itemsize: int, gathers: bool, threads: int) -> list[Axis]:
    """Return the axes to run, the last one first, with their lines divided into groups.

    Axes of length 1 are left out, but for the last: their lines hold the position itself alone.

    Args:
        sizes: of the map, one to three.
        images: number of images.
        itemsize: bytes of a number in the dtype of the arithmetic.
        gathers: whether some map has contiguous positions instead of contiguous channels.
        threads: number of threads.
    """
    wanted = [len(sizes) - 1, *(a for a in range(len(sizes) - 1) if sizes[a] > 1)]
    axes = []
    for number, axis in enumerate(wanted):
        length, inner, outer = sizes[axis], math.prod(sizes[axis + 1 :]), math.prod(sizes[:axis])
        many = gathers and inner > 1
        row = filled_up(length * itemsize)
        fewest = min(inner, VECTOR_BYTES // itemsize) if many else 1
        queries = min(length, max(TILE_ROWS, SHEET_BYTES // max(2, fewest) // row))
        lines = min(inner, max(fewest, SHEET_BYTES // (queries * row))) if many else 1
        groups = -(-inner // lines)
        if images * outer * groups < threads * PARTS:  # few groups: as many for each thread
            groups = min(inner, -(-groups // threads) * threads)
        axes.append(
            Axis(
                length=length,
                inner=inner,
                outer=outer,
                groups=groups,
                lines=-(-inner // groups),
                parts=1,
                queries=queries,
                chunk=(CHUNK_GATHERED if many else CHUNK) // itemsize,
                crossing=len(wanted),
                first=number == 0,
                last=number == len(wanted) - 1,
                slot=sum(sizes[:axis]) - axis,
                skips=axis != len(sizes) - 1,
            )
        )
    return axes


# The thread pool ------------------------------------------------------------------------------------------------------

_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):  # a forked child inherits the pool object but not its threads
    os.register_at_fork(after_in_child=_forget_pool)


def _helpers() -> ThreadPoolExecutor:
    """Return the pool of threads that help the calling one."""
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max_workers=max(32, os.cpu_count() or 1), thread_name_prefix="ccgpu")
    return _pool


class Problem(NamedTuple):
    """A batch of maps to compute, how, and the number of threads."""

    images: int
    sizes: tuple[int, ...]  # of a map
    arithmetic: Arithmetic
    threads: int
    backward: bool = False

    def run(
        self,
        kernel: Callable[..., None],
        operands: list[Input | Output],
        depth: int,
        channels: int,
        scale: float,
        products: int,
        arguments: tuple[Any, ...],
    ) -> None:
        """Run a kernel on all groups of lines of all axes, some images at a time.

        Args:
            kernel: one of the kernels in cache.py.
            operands: all maps that it reads or writes.
            depth, channels, scale: as in `Sizes`.
            products: multiply-adds for each pair of a position and a neighbour.
            arguments: arguments of the kernel after the sizes.
        """
        prepare(self.arithmetic.like, self.arithmetic.kept)
        like, kept = self.arithmetic.like(0), self.arithmetic.kept(0)
        gathers = any(x.map.channel != kept.itemsize for x in operands)
        axes = plan_axes(self.sizes, self.images, like.itemsize, gathers, self.threads)
        neighbours = sum(self.sizes) - len(self.sizes) + 1
        sizes = Sizes(math.prod(self.sizes), depth, channels, scale, neighbours, self.sizes[-1])
        step = max(1, TOGETHER // (sizes.positions * max(depth, channels)))
        rows, work = [], 0
        for start in range(0, self.images, step):
            end = min(self.images, start + step)
            for axis in axes:
                a_image = axis.outer * axis.groups
                rows.append(phase_of(axis, start * a_image, end * a_image, self.threads, PARTS))
                work += (end - start) * sizes.positions * axis.length * products
        phases, counters = np.array(rows, np.int64), new_counters(len(rows))
        narrow = kept.itemsize < like.itemsize
        size = max(divide_memory(axis, sizes, like.itemsize, self.backward, narrow).end for axis in axes)

        def take_part() -> None:
            memory = np.empty(size + VECTOR_BYTES, np.uint8)
            start = -memory.ctypes.data % VECTOR_BYTES
            kernel(like, kept, phases, counters, memory.ctypes.data + start, sizes, *arguments)

        helpers: list[Future[None]] = []
        try:
            with contextlib.suppress(RuntimeError):  # no thread can be started, for example at interpreter shutdown
                for _ in range(self.threads - 1 if work >= SMALL else 0):
                    helpers.append(_helpers().submit(take_part))
            take_part()
        except BaseException:  # helpers may still be writing to this call's arrays
            wait(helper for helper in helpers if not helper.cancel())
            raise
        finally:
            COMPILATION.end()
        for helper in helpers:  # all work is done: a helper that starts now would find no ticket
            helper.cancel()


def thread_count(threads: int | None) -> int:
    """Return the number of threads to use; for None, NUMBA_NUM_THREADS, or all cores if that is not set."""
    return int(config.NUMBA_NUM_THREADS) if threads is None else threads
