"""The two stages of criss-cross attention, affinity and aggregate, on the CPU, for a group of lines at a time.

Energies and weights are (images, positions, neighbours) in the order of `kernels.reference.neighbours`. A line's sheet
(queries, keys) holds those of the line; the position itself is a neighbour on the last axis only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ccgpu.kernels.numba_cpu.attention import Sizes, divide_memory
from ccgpu.kernels.numba_cpu.lines import (
    Axis,
    Map,
    chunks,
    columns_of,
    energies,
    group_at,
    matrix_of,
    no_factors,
    padded,
    part_of,
    position_of,
    put_rows,
    rows_of,
)
from ccgpu.kernels.numba_cpu.matrices import Factors, Matrix, add_product, compiled, copy
from ccgpu.kernels.numba_cpu.vectors import address_of_one, load, size_of, store


@compiled
def _put_energies(like: Any, axis: Axis, sizes: Sizes, position: int, own: int, row: int, weights: int) -> None:
    """Write a query's row of the sheet to its energies; `own` is the column of the query's own key.

    `position` is the query's index through all images, `weights` the address of all energies.
    """
    size = size_of(like)
    target = weights + (position * sizes.neighbours + axis.slot) * size
    if axis.skips:
        copy(like, like, row, own, target)
        copy(like, like, row + (own + 1) * size, axis.length - own - 1, target + own * size)
    else:
        copy(like, like, row, axis.length, target)


@compiled
def _get_weights(like: Any, axis: Axis, sizes: Sizes, position: int, own: int, row: int, weights: int) -> None:
    """Read a query's weights into its row of the sheet; the weight of its own key is divided by the number of lines.

    The whole weight on one line and 0 on the others would give 0 * inf = NaN where v is infinite.
    """
    size = size_of(like)
    first = weights + position * sizes.neighbours * size
    source = first + axis.slot * size
    if axis.skips:
        copy(like, like, source, own, row)
        copy(like, like, source + own * size, axis.length - own - 1, row + (own + 1) * size)
    else:
        copy(like, like, source, axis.length, row)
    centre = sizes.neighbours - sizes.width + position % sizes.positions % sizes.width
    share = load(like, first + centre * size) / type(like)(axis.crossing)
    store(row + own * size, share)


@compiled
def affinity_groups(
    like: Any, kept: Any, begin: int, end: int, memory: int, axis: Axis, sizes: Sizes, q: Map, k: Map, weights: int
) -> None:
    """Write the energies of groups begin ... end of an axis.

    Args:
        like, kept, begin, end, memory, axis, sizes: as in `attention.forward_groups`.
        q, k: maps of the dtype in memory.
        weights: address of the energies (images, positions, neighbours), in like's dtype.
    """
    size, length, depth, queries = size_of(like), axis.length, sizes.depth, axis.queries
    none, reads = np.int64(0), np.bool_(True)  # as literals they would make Numba compile the callees for each value
    at = divide_memory(axis, sizes, size, False)
    row = padded(like, length)
    store(memory + at.scale, type(like)(sizes.scale))
    for number in range(begin, end):
        group = group_at(axis, number)
        line = part_of(group, none, length)
        k_rows = rows_of(like, kept, k, axis, line, none, depth, memory + at.k, reads)
        columns_of(like, k_rows, axis, line, depth, memory + at.k_columns)
        for first in range(group.first, group.first + group.length, queries):
            part = part_of(group, first, min(queries, group.first + group.length - first))
            q_rows = rows_of(like, kept, q, axis, part, none, depth, memory + at.q, reads)
            sheets, scale = memory + at.energies, memory + at.scale
            energies(like, q_rows, memory + at.k_columns, axis, part, depth, sheets, scale)
            for m in range(part.lines):
                for i in range(part.length):
                    position, own = position_of(axis, sizes.positions, part, m, i), first + i
                    _put_energies(like, axis, sizes, position, own, sheets + (m * queries + i) * row, weights)


@compiled
def aggregate_groups(
    like: Any,
    kept: Any,
    begin: int,
    end: int,
    memory: int,
    axis: Axis,
    sizes: Sizes,
    weights: int,
    v: Map,
    out: Map,
    transposed: bool,
) -> None:
    """Add the weighted sums of groups begin ... end of an axis to out, which the first axis writes.

    Args:
        like, kept, begin, end, memory, axis, sizes: as in `attention.forward_groups`.
        weights: address of the weights (images, positions, neighbours), in like's dtype.
        v, out: maps of the dtype in memory.
        transposed: sum a query's values into its keys, instead of the keys' values into the query.
    """
    size, length, queries = size_of(like), axis.length, axis.queries
    reads = np.bool_(True)
    at = divide_memory(axis, sizes, size, False)
    row = padded(like, length)
    none, one = np.int64(0), Factors(address_of_one(like), np.int64(0))
    for number in range(begin, end):
        group = group_at(axis, number)
        line = part_of(group, none, length)
        summed = line if transposed else group
        for first in range(summed.first, summed.first + summed.length, queries):
            part = part_of(summed, first, min(queries, summed.first + summed.length - first))
            for m in range(part.lines):
                for i in range(part.length):
                    position, own = position_of(axis, sizes.positions, part, m, i), first + i
                    target = memory + at.energies + (m * queries + i) * row
                    _get_weights(like, axis, sizes, position, own, target, weights)
            adds = not axis.first or (transposed and first > 0)
            here, there = (part, group) if transposed else (line, part)
            for start, channels in chunks(like, axis, sizes.channels):
                v_rows = rows_of(like, kept, v, axis, here, start, channels, memory + at.v, reads)
                out_rows = rows_of(like, kept, out, axis, there, start, channels, memory + at.out, adds)
                for m in range(part.lines):
                    sheet, beta = memory + at.energies + m * queries * row, one if adds else no_factors()
                    weighting = (
                        Matrix(sheet + group.first * size, size, row) if transposed else Matrix(sheet, row, size)
                    )
                    values, sums = matrix_of(like, v_rows, m, none), matrix_of(like, out_rows, m, none)
                    add_product(like, there.length, channels, here.length, weighting, values, sums, one, beta)
                put_rows(like, kept, out_rows, out, axis, there, start, channels)
