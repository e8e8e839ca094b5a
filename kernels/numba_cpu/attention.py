"""Forward of criss-cross attention on the CPU, for a group of lines of an axis at a time; sizes, and a thread's memory.

Axis after axis:    E = scale Q K^T; row_max and row_sum = sum of exp(E - row_max) are merged with those of the earlier
                    axes; out = before out + factor exp(E - row_max) V.

A sheet holds the energies of a line in memory, of all its queries or, where lines are long, of some at a time. A group
only writes to its own positions, so the groups of an axis may run at the same time and in any order: the results are
the same to the bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba.extending import register_jitable

from ccgpu.kernels.numba_cpu.lines import (
    Axis,
    Map,
    chunks,
    columns_of,
    energies,
    group_at,
    matrix_of,
    padded,
    part_of,
    position_of,
    put_rows,
    rows_of,
    weigh,
)
from ccgpu.kernels.numba_cpu.matrices import Factors, Matrix, add_product, compiled, filled_up
from ccgpu.kernels.numba_cpu.vectors import load, size_of, store


class Sizes(NamedTuple):
    """Sizes of a problem, and its scale."""

    positions: int  # positions of an image
    depth: int  # channels of q and k
    channels: int  # channels of v
    scale: float
    neighbours: int  # neighbours of a position, including itself
    width: int  # length of the last axis


class Memory(NamedTuple):
    """Offsets of the parts of a thread's memory: buffers for a group's lines and for what is computed from them.

    What is needed only where the thread has lines to itself comes last, from `energies` on.
    """

    q: int  # rows of the group, here and in the next six
    k: int
    dq: int
    dk: int
    dout: int
    v: int
    out: int  # in backward: out, then dv
    factors: int  # a number for each query: the factor of this axis's part of out
    befores: int  # likewise, of what the earlier axes have written to out
    scale: int  # a single number
    energies: int  # a sheet (queries, keys) for each line: energies, then weights
    gradients: int  # sheets as well: gradients of the weights, then of the energies
    k_columns: int  # K^T (depth, keys) of each line
    dk_sums: int  # rows of all keys of each line, and here of all channels, where memory has fewer bits than sums
    dv_sums: int
    v_columns: int  # V^T (chunk, keys) of each line, of one chunk of channels
    end: int


@register_jitable
def divide_memory(axis: Axis, sizes: Sizes, size: int, backward: bool, narrow: bool = False) -> Memory:
    """Return where the parts of a thread's memory begin, for numbers of `size` bytes.

    `narrow` tells whether the numbers of the maps have fewer bytes in memory.
    """
    key_row, depth_row = filled_up(axis.length * size), filled_up(sizes.depth * size)
    lines, chunk = axis.lines, min(axis.chunk, sizes.channels)
    queries, keys, chunk_row = lines * axis.queries, lines * axis.length, filled_up(chunk * size)
    k = queries * depth_row
    dq = k + keys * depth_row
    dk = dq + (queries * depth_row if backward else 0)
    dout = dk + (keys * depth_row if backward else 0)
    v = dout + (queries * chunk_row if backward else 0)
    out = v + keys * chunk_row
    factors = out + keys * chunk_row
    befores = factors + queries * size
    scale = befores + queries * size
    energies = filled_up(scale + size)
    gradients = energies + queries * key_row
    k_columns = gradients + (queries * key_row if backward else 0)
    dk_sums = k_columns + lines * sizes.depth * key_row
    apart = backward and narrow and axis.queries < axis.length
    dv_sums = dk_sums + (keys * depth_row if apart else 0)
    v_columns = dv_sums + (keys * filled_up(sizes.channels * size) if apart else 0)
    end = v_columns + (lines * chunk * key_row if backward else 0)
    starts = 0, k, dq, dk, dout, v, out, factors, befores, scale, energies, gradients
    return Memory(*starts, k_columns, dk_sums, dv_sums, v_columns, end)


@compiled
def merge(
    like: Any, axis: Axis, at: int, row_max: Any, row_sum: Any, lse: int, row_maxima: int, row_sums: int
) -> tuple[Any, Any]:
    """Merge a query's row maximum and row sum on this axis with those of the earlier axes.

    `row_maxima` and `row_sums` hold the merged numbers for the next axis; the last axis writes lse instead. All three
    are addresses, and the query's number is `at` bytes after each.

    Returns:
        The factors of exp(E - row_max) V and of what the earlier axes have written to out.
    """
    zero, one, lowest = type(like)(0), type(like)(1), type(like)(-np.inf)
    old_max = lowest if axis.first else load(like, row_maxima + at)
    merged_max = max(row_max, old_max)
    offset = merged_max if merged_max > lowest else zero
    # One of the two is the merged maximum, and exp(0) = 1 needs no exponential.
    factor = one if row_max == offset else np.exp(row_max - offset)
    before = zero
    if not axis.first:
        before = load(like, row_sums + at) * (one if old_max == offset else np.exp(old_max - offset))
    merged_sum = before + factor * row_sum
    if axis.last:
        store(lse + at, offset + np.log(merged_sum))
    else:
        store(row_maxima + at, merged_max)
        store(row_sums + at, merged_sum)
        if merged_sum == 0:  # no weight so far; a later axis may have some
            return zero, zero
    return factor / merged_sum, before / merged_sum


@compiled
def forward_groups(
    like: Any,
    kept: Any,
    begin: int,
    end: int,
    memory: int,
    axis: Axis,
    sizes: Sizes,
    q: Map,
    k: Map,
    v: Map,
    out: Map,
    lse: int,
    row_maxima: int,
    row_sums: int,
) -> None:
    """Compute forward for groups begin ... end of an axis.

    Args:
        like: a number of the dtype of the arithmetic.
        kept: a number that stands for the dtype of q, k, v and out in memory.
        begin, end: range of groups, counted through all images.
        memory: address of the thread's memory, aligned to vectors; see `divide_memory`.
        axis: the axis whose lines are computed.
        sizes: of the problem.
        q, k, v, out: maps.
        lse: address of an array (images, positions), written on the last axis.
        row_maxima, row_sums: addresses of such arrays, which pass the state of the softmax from axis to axis.
    """
    size, length, depth, queries = size_of(like), axis.length, sizes.depth, axis.queries
    none, reads = np.int64(0), np.bool_(True)  # as literals they would make Numba compile the callees for each value
    at = divide_memory(axis, sizes, size, False)
    key_row = padded(like, length)
    sheet = queries * key_row
    store(memory + at.scale, type(like)(sizes.scale))
    for number in range(begin, end):
        group = group_at(axis, number)
        line = part_of(group, none, length)
        k_rows = rows_of(like, kept, k, axis, line, none, depth, memory + at.k, reads)
        columns_of(like, k_rows, axis, line, depth, memory + at.k_columns)
        for first in range(group.first, group.first + group.length, queries):
            part = part_of(group, first, min(queries, group.first + group.length - first))
            q_rows = rows_of(like, kept, q, axis, part, none, depth, memory + at.q, reads)
            energies(like, q_rows, memory + at.k_columns, axis, part, depth, memory + at.energies, memory + at.scale)
            for m in range(part.lines):
                for i in range(part.length):
                    row = memory + at.energies + m * sheet + i * key_row
                    row_max, row_sum = weigh(like, row, length, first + i, axis.crossing)
                    place = position_of(axis, sizes.positions, part, m, i) * size
                    factor, before = merge(like, axis, place, row_max, row_sum, lse, row_maxima, row_sums)
                    store(memory + at.factors + (m * queries + i) * size, factor)
                    store(memory + at.befores + (m * queries + i) * size, before)
            for start, channels in chunks(like, axis, sizes.channels):
                v_rows = rows_of(like, kept, v, axis, line, start, channels, memory + at.v, reads)
                out_rows = rows_of(like, kept, out, axis, part, start, channels, memory + at.out, not axis.first)
                for m in range(part.lines):
                    add_product(
                        like,
                        part.length,
                        channels,
                        length,
                        Matrix(memory + at.energies + m * sheet, key_row, size),
                        matrix_of(like, v_rows, m, none),
                        matrix_of(like, out_rows, m, none),
                        Factors(memory + at.factors + m * queries * size, size),
                        Factors(none if axis.first else memory + at.befores + m * queries * size, size),
                    )
                put_rows(like, kept, out_rows, out, axis, part, start, channels)
