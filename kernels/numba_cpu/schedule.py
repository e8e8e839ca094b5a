"""How the work of a call is divided: axes of the map as groups of lines, for a number of threads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from ccgpu.kernels.numba_cpu.attention import Sizes
from ccgpu.kernels.numba_cpu.lines import Axis
from ccgpu.kernels.numba_cpu.matrices import filled_up
from ccgpu.kernels.numba_cpu.sharing import backward_phases, parts_of, whole_lines
from ccgpu.kernels.numba_cpu.tickets import Phase, phase_of
from ccgpu.kernels.numba_cpu.tiles import TILE_ROWS
from ccgpu.kernels.numba_cpu.vectors import VECTOR_BYTES

# Most bytes of a group's energies in a thread's memory. A group then has half of the 97 columns of 97 x 97 positions
# (43 kB of energies each): a strip that is read and written 200 bytes at a time. Strips of 13 columns took 1.7 times as
# long.
SHEET_BYTES = 5 * 2**19
CHUNK, CHUNK_GATHERED = 512, 128  # bytes of a position's channels processed at once; the second, for gathered lines
PARTS = 8  # tickets of a phase for each thread, so that a thread that is held up takes fewer
SMALL = 2**22  # multiply-adds that one thread finishes before another one has been awake for long (0.1 ms)
TOGETHER = 2**20  # elements of the images that go through all axes together, while the CPU's caches hold them


def plan_axes(
    sizes: tuple[int, ...],
    images: int,
    itemsize: int,
    gathers: bool,
    threads: int,
    whole: bool,
    crossing: int | None = None,
) -> list[Axis]:
    """Return the axes to run, the last one first, with their lines divided into groups.

    Axes of length 1 are left out, but for the last: their lines hold the position itself alone.

    Args:
        sizes: of the map, one to three.
        images: number of images that are computed together.
        itemsize: bytes of a number in the dtype of the arithmetic.
        gathers: whether some map has contiguous positions instead of contiguous channels.
        threads: number of threads.
        whole: whether lines must be whole; otherwise few lines are divided into parts.
        crossing: lines through a position; None: as many as are run.
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
                parts=1 if whole else parts_of(images * outer * groups, length, threads),
                queries=queries,
                # A vector or more: products write whole vectors, into the next position's channels beside less.
                chunk=max(CHUNK_GATHERED if many else CHUNK, VECTOR_BYTES) // itemsize,
                crossing=len(wanted) if crossing is None else crossing,
                first=number == 0,
                last=number == len(wanted) - 1,
                slot=sum(sizes[:axis]) - axis,
                skips=axis != len(sizes) - 1,
                strips=many,
            )
        )
    return axes


class Division(NamedTuple):
    """How the work of a call is divided."""

    phases: list[Phase]
    memory: int  # bytes of a thread's memory, whole vectors
    shared: int  # bytes of the memory for lines that all threads work on
    threads: int  # that share the work; 1 where it is done before another one would be awake


def divide(
    images: int,
    extents: tuple[int, ...],
    sizes: Sizes,
    itemsize: int,
    *,
    gathers: bool,
    memory_of: Callable[[Axis], int],
    shared_of: Callable[[Axis], tuple[int, int]] | None,
    whole: bool,
    threads: int,
    products: int,
    crossing: int | None = None,
) -> Division:
    """Divide a call into phases: all axes of some images at a time, each in groups of lines.

    Args:
        images: number of images.
        extents: sizes of the map, one to three.
        sizes: of the problem.
        itemsize: bytes of a number in the dtype of the arithmetic.
        gathers: whether some map has contiguous positions instead of contiguous channels.
        memory_of: function that returns the bytes of a thread's memory for the lines of an axis.
        shared_of: function that returns the bytes of a thread's memory and of all threads' together for a line that
            all of them work on; None: no kernel does that.
        whole: whether a line may not be divided into groups.
        threads: most threads that share the work.
        products: multiply-adds for each pair of a position and a neighbour on an axis.
        crossing: as in `plan_axes`.
    """
    pairs = sizes.positions * sum(
        extent for axis, extent in enumerate(extents) if extent > 1 or axis == len(extents) - 1
    )
    threads = threads if images * pairs * products >= SMALL else 1
    step = max(1, min(images, TOGETHER // (sizes.positions * max(sizes.depth, sizes.channels))))
    if max(extents[:-1], default=1) == 1:
        step = images  # a single axis: no other one will read the images again
    axes = plan_axes(extents, step, itemsize, gathers, threads, whole, crossing)
    phases: list[Phase] = []
    for start in range(0, images, step):
        end = min(images, start + step)
        for axis in axes:
            a_image = axis.outer * axis.groups * axis.parts
            groups = start * a_image, end * a_image
            if shared_of is None:
                phases.append(phase_of(axis, whole_lines(axis), *groups, threads, PARTS))
            else:
                phases += backward_phases(axis, *groups, threads, PARTS)
    alone = {phase.axis for phase in phases if not phase.task.shared}
    shared = [shared_of(axis) for axis in {phase.axis for phase in phases if phase.task.shared}] if shared_of else []
    own = max(*(memory_of(axis) for axis in alone), *(own for own, _ in shared), 0)
    return Division(phases, filled_up(own), filled_up(max((size for _, size in shared), default=0)), threads)
