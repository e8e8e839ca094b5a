"""How threads share the groups of lines of a call: each takes tickets from counters in memory, phase by phase.

A phase is an axis of some images. Its groups may run in any order, but all of them before the next phase: a thread that
finds no ticket left waits until the other threads have finished theirs. A thread may join at any time, even when all is
done; the calling thread does everything alone if no other one wakes up in time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from ccgpu.kernels.numba_cpu.lines import Axis, Task
from ccgpu.kernels.numba_cpu.matrices import compiled

PHASE = len(Axis._fields) + len(Task._fields) + 3  # numbers of a phase
LOOKS = 2**16  # how often a thread looks whether others have finished, a tenth of a millisecond, before it gives way
LINE = 64  # bytes of a cache line; each counter has one of its own
_I64 = ir.IntType(64)


@intrinsic
def atomic_add(typingctx: Any, address: Any, number: Any) -> Any:
    """Add to the integer at an address and return its old value; earlier writes become visible to other threads."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, number = arguments
        return builder.atomic_rmw("add", builder.inttoptr(address, _I64.as_pointer()), number, "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_load(typingctx: Any, address: Any) -> Any:
    """Return the integer at an address; writes before the one that stored it become visible to this thread."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(arguments[0], _I64.as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), codegen


class Phase(NamedTuple):
    """Groups begin ... end of an axis, counted through all images, and what is computed of them."""

    axis: Axis
    task: Task
    begin: int
    end: int
    step: int  # groups of a ticket


@intrinsic
def give_way(typingctx: Any) -> Any:
    """Let another thread that is ready run on this one's core, where the operating system has POSIX's sched_yield."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if llvmlite.binding.address_of_symbol("sched_yield"):
            kind = ir.FunctionType(ir.IntType(32), [])
            function = cgutils.get_or_insert_function(builder.module, kind, "sched_yield")
            builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), codegen


def phase_of(axis: Axis, task: Task, begin: int, end: int, threads: int, parts: int) -> Phase:
    """Return a phase of about `parts` tickets for each thread."""
    return Phase(axis, task, begin, end, max(1, (end - begin) // (threads * parts)))


def numbers_of(phases: Sequence[Phase]) -> NDArray[np.int64]:
    """Return phases as the kernels take them: a row of numbers for each."""
    return np.array([(*phase.axis, *phase.task, *phase[2:]) for phase in phases], np.int64).reshape(-1, PHASE)


def new_counters(phases: int) -> NDArray[np.int64]:
    """Return zeros: for each phase, a counter of tickets taken and one of tickets finished."""
    return np.zeros(phases * 2 * LINE // 8, np.int64)


@compiled
def axis_of(phases: NDArray[np.int64], phase: int) -> Axis:
    """Return the axis of a phase."""
    n = phases[phase]
    return Axis(n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12], n[13])


@compiled
def task_of(phases: NDArray[np.int64], phase: int) -> Task:
    """Return the task of a phase."""
    n = phases[phase, 14:20]
    return Task(n[0], n[1], n[2], n[3], n[4], n[5])


@compiled
def tickets(phases: NDArray[np.int64], counters: int) -> Iterator[tuple[Axis, Task, int, int]]:
    """Yield axis, task and groups, begin ... end, of each ticket that this thread takes; return when all are done.

    `counters` is the address of `new_counters`, or 0 for a thread that works alone: it takes each phase as a whole.
    """
    for phase in range(len(phases)):
        axis, task = axis_of(phases, phase), task_of(phases, phase)
        begin, end, step = phases[phase, 20], phases[phase, 21], phases[phase, 22]
        if counters == 0:
            yield axis, task, begin, end
            continue
        taken = counters + phase * 2 * LINE
        finished = taken + LINE
        ticket = begin + atomic_add(taken, 1) * step
        while ticket < end:
            yield axis, task, ticket, min(end, ticket + step)
            atomic_add(finished, 1)
            ticket = begin + atomic_add(taken, 1) * step
        looks = 0
        while atomic_load(finished) < (end - begin + step - 1) // step:
            looks += 1
            if looks > LOOKS:  # the thread that this one waits for may be waiting for this core
                give_way()
