"""The two stages of criss-cross attention on the CPU, group by group of the lines of an axis.

Energies and weights are (images, positions, neighbours) in the order of `kernels.reference.neighbours`. A line's sheet
(queries, keys) is a part of them, but for the centre, which stands on the last axis alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ccgpu.kernels.numba_cpu.attention import Sizes, divide_memory
from ccgpu.kernels.numba_cpu.lines import (
    Axis,
    Group,
    Map,
    chunks,
    columns_of,
    energies,
    group_at,
    matrix_of,
    no_factors,
    padded,
    put_rows,
    rows_of,
)
from ccgpu.kernels.numba_cpu.matrices import Factors, Matrix, add_product, compiled, copy
from ccgpu.kernels.numba_cpu.vectors import load, size_of, store


@compiled
def _position(axis: Axis, sizes: Sizes, group: Group, line: int, query: int) -> int:
    """Return the number of a line's position, counted through all images."""
    return group.image * sizes.positions + group.position + line + query * axis.inner


@compiled
def _put_energies(like: Any, axis: Axis, sizes: Sizes, position: int, own: int, row: int, weights: int) -> None:
    """Write a query's energies with the keys of its line to their places; its own one stands at `own`."""
    size = size_of(like)
    target = weights + (position * sizes.neighbours + axis.slot) * size
    if axis.skips:
        copy(like, row, size, own, target, size)
        copy(like, row + (own + 1) * size, size, axis.length - own - 1, target + own * size, size)
    else:
        copy(like, row, size, axis.length, target, size)


@compiled
def _get_weights(like: Any, axis: Axis, sizes: Sizes, position: int, own: int, row: int, weights: int) -> None:
    """Read a query's weights of the keys of its line; of its own, an equal share on each of the lines through it.

    All of it on one line and 0 on the others would give 0 * inf = NaN where v is infinite.
    """
    size = size_of(like)
    all_of_them = weights + position * sizes.neighbours * size
    source = all_of_them + axis.slot * size
    if axis.skips:
        copy(like, source, size, own, row, size)
        copy(like, source + own * size, size, axis.length - own - 1, row + (own + 1) * size, size)
    else:
        copy(like, source, size, axis.length, row, size)
    centre = sizes.neighbours - sizes.width + position % sizes.positions % sizes.width
    share = load(like, all_of_them + centre * size) / type(like)(axis.crossing)
    store(row + own * size, share)


@compiled
def affinity_groups(
    like: Any, begin: int, end: int, memory: int, axis: Axis, sizes: Sizes, q: Map, k: Map, weights: int
) -> None:
    """Write the energies on groups begin ... end of an axis.

    Args:
        memory: address of the worker's memory, as in `numba_cpu_attention.forward_groups`.
        q, k: of like's dtype.
        weights: address of the energies.
    """
    size, length, depth, queries = size_of(like), axis.length, sizes.depth, axis.queries
    none, reads = np.int64(0), np.bool_(True)  # not literals: Numba would compile what they are passed to for each
    at = divide_memory(axis, sizes, size, False)
    row = padded(like, length)
    store(memory + at.scale, type(like)(sizes.scale))
    for number in range(begin, end):
        group = group_at(axis, number)
        q_rows = rows_of(like, q, axis, group, none, depth, memory + at.q, reads)
        k_rows = rows_of(like, k, axis, group, none, depth, memory + at.k, reads)
        columns_of(like, k_rows, axis, group, depth, memory + at.k_columns)
        for query in range(0, length, queries):
            count = min(queries, length - query)
            sheets, scale = memory + at.energies, memory + at.scale
            energies(like, q_rows, memory + at.k_columns, axis, group, depth, query, count, sheets, scale)
            for m in range(group.lines):
                for i in range(count):
                    position, own = _position(axis, sizes, group, m, query + i), query + i
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
    """Add the weighted sums on groups begin ... end of an axis to out; the first axis writes.

    Args:
        memory, weights: as in `affinity_groups`.
        v, out: of like's dtype.
        transposed: whether a query's values go to its keys, instead of the keys' values to it.
    """
    size, length, queries = size_of(like), axis.length, axis.queries
    reads = np.bool_(True)
    at = divide_memory(axis, sizes, size, False)
    row = padded(like, length)
    none, one = np.int64(0), Factors(memory + at.one, np.int64(0))
    store(one.address, type(like)(1))
    for number in range(begin, end):
        group = group_at(axis, number)
        for query in range(0, length, queries):
            count = min(queries, length - query)
            for m in range(group.lines):
                for i in range(count):
                    position, own = _position(axis, sizes, group, m, query + i), query + i
                    target = memory + at.energies + (m * queries + i) * row
                    _get_weights(like, axis, sizes, position, own, target, weights)
            for start, channels in chunks(like, axis, sizes.channels):
                v_rows = rows_of(like, v, axis, group, start, channels, memory + at.v, reads)
                adds = not axis.first or query > 0
                out_rows = rows_of(like, out, axis, group, start, channels, memory + at.out, adds)
                for m in range(group.lines):
                    sheet, beta = memory + at.energies + m * queries * row, one if adds else no_factors()
                    if transposed:
                        weighting = Matrix(sheet, size, row)
                        values, sums = matrix_of(like, v_rows, m, query), matrix_of(like, out_rows, m, none)
                        add_product(like, length, channels, count, weighting, values, sums, one, beta)
                    else:
                        weighting, beta = Matrix(sheet, row, size), no_factors() if axis.first else one
                        values, sums = matrix_of(like, v_rows, m, none), matrix_of(like, out_rows, m, query)
                        add_product(like, count, channels, length, weighting, values, sums, one, beta)
                put_rows(like, out_rows, out, axis, group, start, channels)
