"""Plans of calls: all that shapes, strides, dtypes and the number of threads decide, worked out once and kept.

A call of a known plan fills in addresses and runs. Of the last `PLANS` problems the plans are kept, a few kB each.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ccgpu.kernels.numba_cpu import dot_products, schedule, scratch, workers
from ccgpu.kernels.numba_cpu.attention import Sizes, divide_memory
from ccgpu.kernels.numba_cpu.blocks import Call, call_block, plan_block
from ccgpu.kernels.numba_cpu.cache import kernel_of
from ccgpu.kernels.numba_cpu.dot_products import forward as pairs_forward
from ccgpu.kernels.numba_cpu.dot_products import sheets as pairs_sheets
from ccgpu.kernels.numba_cpu.lines import Axis
from ccgpu.kernels.numba_cpu.matrices import filled_up
from ccgpu.kernels.numba_cpu.operands import (
    ARITHMETIC,
    Arithmetic,
    Array,
    Layout,
    Operand,
    channels_last,
    extent,
    flat,
    itemsize,
    word,
    words_of,
)
from ccgpu.kernels.numba_cpu.pages import may_have_large_pages, prefer_large_pages
from ccgpu.kernels.numba_cpu.sharing import memory_of_a_shared_line
from ccgpu.kernels.numba_cpu.tickets import new_counters

PLANS = 256


class Problem(NamedTuple):
    """What a plan is made for."""

    kernel: str  # its name in cache.py
    maps: tuple[Layout, ...]  # in the kernel's order: those that are read, then the results
    results: int  # number of maps that are results
    depth: int  # channels of q and k
    channels: int  # channels of v
    products: int  # multiply-adds for each pair of a position and a neighbour
    states: int  # arrays (images, positions) that pass numbers from axis to axis
    threads: int  # most threads that share the work
    crossing: int | None = None  # lines through a position, the map's among them; None: the map has all of them


def _memory_of(kernel: str, arithmetic: Arithmetic, sizes: Sizes) -> Callable[[Axis], int]:
    """Return the function that returns the bytes of memory that a thread needs for the lines of an axis."""
    if dot_products.used_for(arithmetic.kept) and kernel in ("forward", "backward"):
        if kernel == "backward":
            return lambda axis: pairs_sheets.divide_memory(axis, sizes, False).end
        return lambda axis: pairs_forward.divide_memory(axis, sizes).end
    size, narrow = (np.dtype(dtype).itemsize for dtype in arithmetic)
    return lambda axis: divide_memory(axis, sizes, size, kernel == "backward", narrow < size).end


def _shared_of(kernel: str, arithmetic: Arithmetic, sizes: Sizes) -> Callable[[Axis], tuple[int, int]] | None:
    """Return the function that `schedule.divide` asks for lines that all threads work on, or None."""
    if kernel != "backward":
        return None
    if dot_products.used_for(arithmetic.kept):
        return lambda axis: pairs_sheets.memory_of_a_shared_line(axis, sizes)
    size, narrow = (np.dtype(dtype).itemsize for dtype in arithmetic)
    return lambda axis: memory_of_a_shared_line(axis, sizes, size, narrow < size)


class Plan:
    """A problem ready to run: `run` takes the addresses of a call.

    Raises:
        ValueError: the maps differ in images, sizes or dtype. The kernels would read beside them.
    """

    def __init__(self, problem: Problem) -> None:
        first = problem.maps[0]
        images, extents, positions = first.shape[0], first.shape[2:], math.prod(first.shape[2:])
        self._problem, self._maps, self._empty = problem, len(problem.maps), images * positions == 0
        for x in problem.maps:
            if (x.shape[0], x.shape[2:], x.dtype) != (images, extents, first.dtype):
                raise ValueError(
                    f"{problem.kernel}: all maps must have one dtype, batch and map size, got {first.dtype} "
                    f"{first.shape} and {x.dtype} {x.shape}; convert or reshape one of them"
                )
        layouts = [flat(Operand(0, *layout)) for layout in problem.maps]
        maps = [layout for layout in layouts if layout is not None]
        self._copies = len(maps) < len(layouts)
        self._misaligned = itemsize(first) - 1  # the bits of an address that are 0 where it is aligned
        if self._empty or self._copies:
            return
        results = list(enumerate(problem.maps))[self._maps - problem.results :]
        sizes_of_results = [(number, extent(x)) for number, x in results if min(x.strides) >= 0]
        self._large = [(number, size) for number, size in sizes_of_results if may_have_large_pages(size)]
        arithmetic = ARITHMETIC[first.dtype]
        size = np.dtype(arithmetic.like).itemsize
        neighbours = sum(extents) - len(extents) + 1
        sizes = Sizes(positions, problem.depth, problem.channels, 1.0, neighbours, extents[-1])
        division = schedule.divide(
            images,
            extents,
            sizes,
            size,
            gathers=any(layout.channel != itemsize(first) for layout in maps),
            memory_of=_memory_of(problem.kernel, arithmetic, sizes),
            shared_of=_shared_of(problem.kernel, arithmetic, sizes),
            whole=problem.kernel == "backward",
            threads=problem.threads,
            products=problem.products,
            crossing=problem.crossing,
        )
        self._threads, self._phases, self._memory = division.threads, len(division.phases), division.memory
        state = filled_up(images * positions * size)
        self._shared = problem.states * state + division.shared
        self._block = plan_block(sizes, state, maps, division.phases)
        self._address = self._block.ctypes.data
        self._kernel = kernel_of(problem.kernel, arithmetic.like, arithmetic.kept)

    def run(self, addresses: Sequence[int], scale: float = 1.0, team: workers.Team | None = None) -> None:
        """Run the problem.

        Args:
            addresses: of the maps, then of the kernel's arrays of numbers; the caller keeps all memory until the end.
            scale: factor of the energies.
            team: threads that share the work; None: helpers from the pool.
        """
        if self._empty:
            return
        if self._copies or functools.reduce(operator.or_, addresses[: self._maps]) & self._misaligned:
            self._run_on_copies(addresses, scale, team)
            return
        for number, size in self._large:  # the memory of a new result is often new to this process, too
            prefer_large_pages(addresses[number], size)
        if self._threads == 1:
            memory = scratch.take(self._shared + self._memory)
            call = Call(self._address, scale, 0, memory.address + self._shared, self._memory, 0)
            self._kernel.run(call_block(call, (*addresses, memory.address)))
            scratch.give_back(memory)
        elif team is not None and workers.team_works():
            self._run_on_team(addresses, scale, team)
        else:
            self._run_with_helpers(addresses, scale)

    def _run_on_team(self, addresses: Sequence[int], scale: float, team: workers.Team) -> None:
        """Run the kernel on threads of an OpenMP library, of which the calling one is the first."""
        memory = scratch.take(self._shared + self._threads * self._memory)
        counters = new_counters(self._phases)
        own = memory.address + self._shared
        call = Call(self._address, scale, counters.ctypes.data, own, self._memory, team.number)
        team.parallel(self._kernel.address, call_block(call, (*addresses, memory.address)), self._threads, 0)
        scratch.give_back(memory, self._threads)

    def _run_with_helpers(self, addresses: Sequence[int], scale: float) -> None:
        """Run the kernel on the calling thread and on helpers from the pool, each of which has memory of its own."""
        memory = scratch.take(self._shared + self._memory)
        counters = new_counters(self._phases)
        first = Call(self._address, scale, counters.ctypes.data, memory.address + self._shared, self._memory, 0)
        everything = *addresses, memory.address

        def help_along() -> None:
            own = scratch.take(self._memory)
            self._kernel.run(call_block(first._replace(memory=own.address), everything))
            scratch.give_back(own)
            counters.size  # noqa: B018  a helper that comes late still finds them

        workers.together(lambda: self._kernel.run(call_block(first, everything)), help_along, self._threads - 1)
        scratch.give_back(memory)

    def _run_on_copies(self, addresses: Sequence[int], scale: float, team: workers.Team | None) -> None:
        """Run the problem with copies in the place of maps whose memory the kernels cannot use."""
        layouts, results = self._problem.maps, len(self._problem.maps) - self._problem.results
        maps = [Operand(address, *layout) for address, layout in zip(addresses, layouts, strict=False)]
        copies: dict[int, Array] = {}
        for number, x in enumerate(maps):
            if flat(x) is None:
                copies[number] = copy = channels_last(words_of(x) if number < results else np.empty(x.shape, word(x)))
                maps[number] = Operand(copy.ctypes.data, x.shape, copy.strides, x.dtype)
        problem = self._problem._replace(maps=tuple(x.layout for x in maps))
        plan_of(problem).run([*(x.address for x in maps), *addresses[len(maps) :]], scale, team)
        for number, copy in copies.items():
            if number >= results:
                words_of(Operand(addresses[number], *layouts[number]))[...] = copy


@functools.lru_cache(maxsize=PLANS)
def plan_of(problem: Problem) -> Plan:
    """Return the plan of a problem."""
    return Plan(problem)
