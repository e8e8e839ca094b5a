"""How threads share groups of lines: they take tickets from counters in memory, phase by phase.

A phase is an axis of some images. Its groups may run in any order, but all of them before the next phase: who finds no
ticket left waits until the others have finished theirs. A thread may come at any time, also when all is done; the one
that called does everything alone if no other wakes up in time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from ccgpu.kernels.numba_cpu.lines import Axis
from ccgpu.kernels.numba_cpu.matrices import compiled

LINE = 64  # bytes of a cache line: a counter's own
_I64 = ir.IntType(64)


@intrinsic
def atomic_add(typingctx: Any, address: Any, number: Any) -> Any:
    """Add to the integer at an address, for all threads to see with all that this one wrote; return the old one."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, number = arguments
        return builder.atomic_rmw("add", builder.inttoptr(address, _I64.as_pointer()), number, "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_load(typingctx: Any, address: Any) -> Any:
    """Return the integer at an address, with all that was written before it was."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(arguments[0], _I64.as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), codegen


def phase_of(axis: Axis, begin: int, end: int, threads: int, parts: int) -> tuple[int, ...]:
    """Return a phase as numbers: groups begin ... end of an axis, about `parts` tickets a thread."""
    return (*axis, begin, end, max(1, (end - begin) // (threads * parts)))


def new_counters(phases: int) -> NDArray[np.int64]:
    """Return counters, all 0: of tickets taken and tickets finished for each phase."""
    return np.zeros(phases * 2 * LINE // 8, np.int64)


@compiled
def axis_of(phases: NDArray[np.int64], phase: int) -> Axis:
    """Return the axis of a phase."""
    n = phases[phase]
    return Axis(n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11])


@compiled
def tickets(phases: NDArray[np.int64], counters: NDArray[np.int64]) -> Iterator[tuple[Axis, int, int]]:
    """Yield the axis and the groups, begin ... end, of every ticket that this thread gets; return when all are done."""
    for phase in range(len(phases)):
        axis = axis_of(phases, phase)
        begin, end, step = phases[phase, 12], phases[phase, 13], phases[phase, 14]
        taken = counters.ctypes.data + phase * 2 * LINE
        finished = taken + LINE
        ticket = begin + atomic_add(taken, 1) * step
        while ticket < end:
            yield axis, ticket, min(end, ticket + step)
            atomic_add(finished, 1)
            ticket = begin + atomic_add(taken, 1) * step
        while atomic_load(finished) < (end - begin + step - 1) // step:
            pass
