"""How the lines of an axis are shared out to threads: whole lines, or where these are few, lines in parts.

A line's queries, and in `aggregate_transposed` its keys, are independent of each other: a group can be a part of its
lines' positions (`parts_of`). In backward dK and dV are sums over queries. There all threads work on one line after
the other, in phases (`backward_phases`): K^T and V^T by keys; then, for some queries at a time, P, dS and dQ by
queries, and what these add to dK and dV by keys. Each sum has the order of its terms that it has on one thread, so the
results are the same to the bit.
"""

from __future__ import annotations

from ccgpu.kernels.numba_cpu.attention import Sizes, divide_memory
from ccgpu.kernels.numba_cpu.lines import Axis, Task
from ccgpu.kernels.numba_cpu.matrices import filled_up
from ccgpu.kernels.numba_cpu.tickets import Phase, phase_of
from ccgpu.kernels.numba_cpu.tiles import TILE_ROWS

# What a part of a line costs beyond its positions, as a number of positions: K is transposed once more and, in NCHW, V
# gathered. Channels-last it is less.
PART_COST = 6
HELD_UP = 8  # one ticket in so many is assumed to come late, so parts are smaller than one for each thread
FEW = 4  # lines for each thread; where there are as many, whole lines are shared evenly enough


def parts_of(lines: int, length: int, threads: int) -> int:
    """Return the number of parts that each of `lines` lines is divided into, so that all threads finish soonest."""
    if lines % threads == 0 or lines >= FEW * threads:
        return 1

    def duration(parts: int) -> float:
        part = -(-length // parts)
        return -(-lines * parts // threads) * (part + PART_COST) + part / HELD_UP

    return min(range(1, max(1, min(length // TILE_ROWS, FEW * threads)) + 1), key=duration)


def whole_lines(axis: Axis) -> Task:
    """Return the task of a phase whose threads have lines to themselves."""
    return Task(0, axis.length, columns=True, by_queries=True, by_keys=True, shared=False)


def backward_phases(axis: Axis, begin: int, end: int, threads: int, tickets: int) -> list[Phase]:
    """Return the phases of backward for groups begin ... end of an axis.

    As many lines as all threads can share evenly are whole; the others go to all threads one by one, if that is faster.

    Args:
        axis: the axis; its lines are whole.
        begin, end: range of groups, counted through all images.
        threads: number of threads.
        tickets: about as many tickets of a phase a thread.
    """
    left = (end - begin) % threads if end - begin < FEW * threads else 0
    parts = max(1, min(axis.length // TILE_ROWS, 2 * threads))
    if left * (-(-axis.length // min(parts, threads)) + PART_COST) >= axis.length:
        left = 0
    phases = []
    if end - left > begin:
        phases.append(phase_of(axis, whole_lines(axis), begin, end - left, threads, tickets))
    shared = axis._replace(parts=parts)
    for group in range((end - left) * parts, end * parts, parts):
        tasks = [Task(0, 0, columns=True, by_queries=False, by_keys=False, shared=True)]
        for first in range(0, axis.length, axis.queries):
            last = min(axis.length, first + axis.queries)
            tasks.append(Task(first, last, columns=False, by_queries=True, by_keys=False, shared=True))
            tasks.append(Task(first, last, columns=False, by_queries=False, by_keys=True, shared=True))
        phases += [phase_of(shared, task, group, group + parts, threads, tickets) for task in tasks]
    return phases


def memory_of_a_shared_line(axis: Axis, sizes: Sizes, size: int, narrow: bool) -> tuple[int, int]:
    """Return the bytes of memory that each thread needs for a line that all threads work on, and those that all share.

    The line's sheets, and K^T and V^T of all channels, lie in the shared memory.

    Args:
        axis: the axis of the line.
        sizes: of the problem.
        size: bytes of a number.
        narrow: whether the numbers of the maps have fewer bytes in memory.
    """
    at = divide_memory(axis, sizes, size, True, narrow)
    v_columns = axis.lines * sizes.channels * filled_up(axis.length * size)
    return at.energies, at.v_columns - at.energies + v_columns
