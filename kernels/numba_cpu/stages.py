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
from ccgpu.kernels.numba_cpu.vectors import load, size_of, store


@compiled
def _put_energies(like: Any, axis: Axis, sizes: Sizes, position: int, own: int, row: int, weights: int) -> None:
    """Write a query's row of the sheet to its energies; `own` is the column of the query's own key.

    `position` is the query's index through all images, `weights` the address of all energies.
    """
    size = size_of(like)
    target = weights + (position * sizes.neighbours + axis.slot) * size
    if axis.skips:
        copy(like, row, size, own, target, size)
        copy(like, row + (own + 1) * size, size, axis.length - own - 1, target + own * size, size)
    else:
        copy(like, row, size, axis.length, target, size)


@compiled
def _get_weights(like: Any, axis: Axis, sizes: Sizes, position: int, own: int, row: int, weights: int) -> None:
    """Read a query's weights into its row of the sheet; the weight of its own key is divided by the number of lines.

    The whole weight on one line and 0 on the others would give 0 * inf = NaN where v is infinite.
    """
    size = size_of(like)
    first = weights + position * sizes.neighbours * size
    source = first + axis.slot * size
    if axis.skips:
        copy(like, source, size, own, row, size)
        copy(like, source + own * size, size, axis.length - own - 1, row + (own + 1) * size, size)
    else:
        copy(like, source, size, axis.length, row, size)
    centre = sizes.neighbours - sizes.width + position % sizes.positions % sizes.width
    share = load(like, first + centre * size) / type(like)(axis.crossing)
    store(row + own * size, share)


@compiled
def affinity_groups(
    like: Any, begin: int, end: int, memory: int, axis: Axis, sizes: Sizes, q: Map, k: Map, weights: int
) -> None:
    """Write the energies of groups begin ... end of an axis.

    Args:
        like, begin, end, memory, axis, sizes: as in `attention.forward_groups`.
        q, k: maps of like's dtype.
        weights: address of the energies (images, positions, neighbours).
    """
    size, length, depth, queries = size_of(like), axis.length, sizes.depth, axis.queries
    none, reads = np.int64(0), np.bool_(True)  # as literals they would make Numba compile the callees for each value
    at = divide_memory(axis, sizes, size, False)
    row = padded(like, length)
    store(memory + at.scale, type(like)(sizes.scale))
    for number in range(begin, end):
        group = group_at(axis, number)
        line = part_of(group, none, length)
        k_rows = rows_of(like, k, axis, line, none, depth, memory + at.k, reads)
        columns_of(like, k_rows, axis, line, depth, memory + at.k_columns)
        for first in range(group.first, group.first + group.length, queries):
            part = part_of(group, first, min(queries, group.first + group.length - first))
            q_rows = rows_of(like, q, axis, part, none, depth, memory + at.q, reads)
            sheets, scale = memory + at.energies, memory + at.scale
            energies(like, q_rows, memory + at.k_columns, axis, part, depth, sheets, scale)
            for m in range(part.lines):
                for i in range(part.length):
                    position, own = position_of(axis, sizes.positions, part, m, i), first + i
                    _put_energies(like, axis, sizes, position, own, sheets + (m * queries + i) * row, weights)


@compiled
def aggregate_groups(
    like: Any,
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
        like, begin, end, memory, axis, sizes: as in `attention.forward_groups`.
        weights: address of the weights (images, positions, neighbours).
        v, out: maps of like's dtype.
        transposed: sum a query's values into its keys, instead of the keys' values into the query.
    """
    size, length, queries = size_of(like), axis.length, axis.queries
    reads = np.bool_(True)
    at = divide_memory(axis, sizes, size, False)
    row = padded(like, length)
    none, one = np.int64(0), Factors(memory + at.one, np.int64(0))
    store(one.address, type(like)(1))
    for number in range(begin, end):
        group = group_at(axis, number)
        line = part_of(group, none, length)
        for first in range(group.first, group.first + group.length, queries):
            part = part_of(group, first, min(queries, group.first + group.length - first))
            for m in range(part.lines):
                for i in range(part.length):
                    position, own = position_of(axis, sizes.positions, part, m, i), first + i
                    target = memory + at.energies + (m * queries + i) * row
                    _get_weights(like, axis, sizes, position, own, target, weights)
            adds = not axis.first or (transposed and first > 0)
            here, there = (part, line) if transposed else (line, part)
            for start, channels in chunks(like, axis, sizes.channels):
                v_rows = rows_of(like, v, axis, here, start, channels, memory + at.v, reads)
                out_rows = rows_of(like, out, axis, there, start, channels, memory + at.out, adds)
                for m in range(part.lines):
                    sheet, beta = memory + at.energies + m * queries * row, one if adds else no_factors()
                    weighting = Matrix(sheet, size, row) if transposed else Matrix(sheet, row, size)
                    values, sums = matrix_of(like, v_rows, m, none), matrix_of(like, out_rows, m, none)
                    add_product(like, there.length, channels, here.length, weighting, values, sums, one, beta)
                put_rows(like, out_rows, out, axis, there, start, channels)
