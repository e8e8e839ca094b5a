"""Forward of criss-cross attention in bfloat16, for a group of lines of an axis at a time; see attention.py.

The energies of a few queries stay in float32 in the first cache until they are weights, which are rounded to bfloat16.
The values are interleaved 32 channels at a time, just before the product that reads them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba.extending import register_jitable

from ccgpu.kernels.numba_cpu.attention import Sizes, merge
from ccgpu.kernels.numba_cpu.dot_products.instructions import LANES, NUMBERS
from ccgpu.kernels.numba_cpu.dot_products.interleaving import columns, interleave
from ccgpu.kernels.numba_cpu.dot_products.multiplication import PANEL_ROW, add_product
from ccgpu.kernels.numba_cpu.dot_products.rows import (
    PANEL,
    SIZE,
    WORD,
    buffer_size,
    chunk_of,
    chunks,
    put_rows,
    rows_of,
    up,
)
from ccgpu.kernels.numba_cpu.dot_products.weights import weigh
from ccgpu.kernels.numba_cpu.lines import Axis, Group, Map, Rows, group_at, part_of, position_of
from ccgpu.kernels.numba_cpu.matrices import Factors, Matrix, compiled
from ccgpu.kernels.numba_cpu.vectors import load, size_of, store

FLOAT = 4  # bytes of a float32
QUERIES = 12  # queries whose energies are in float32 at once, in the first cache


class Memory(NamedTuple):
    """Offsets of the parts of a thread's memory."""

    energies: int  # energies (QUERIES, keys) of some queries, float32
    weights: int  # a sheet (queries, keys) for each line, bfloat16
    k: int  # panels of K^T of a line
    v: int  # a panel of a line's values, interleaved
    q_rows: int  # rows of the lines, here and in the next three
    k_rows: int
    v_rows: int
    out_rows: int
    factors: int  # a float32 for each query: the factor of this axis's part of out
    befores: int  # likewise, of what the earlier axes have written to out
    scale: int
    end: int


@register_jitable
def divide_memory(axis: Axis, sizes: Sizes) -> Memory:
    """Return where the parts of a thread's memory begin."""
    keys, channels = up(axis.length, LANES), min(chunk_of(axis), sizes.channels)
    weights = QUERIES * keys * FLOAT
    k = weights + up(axis.lines * axis.queries * keys * SIZE, 64)
    v = k + up(axis.length, NUMBERS) // NUMBERS * columns_panel(sizes.depth)
    q_rows = v + up(channels, PANEL) // PANEL * ((axis.length + 1) // 2) * PANEL_ROW
    k_rows = q_rows + buffer_size(axis, sizes.depth)
    v_rows = k_rows + buffer_size(axis, sizes.depth)
    out_rows = v_rows + buffer_size(axis, channels)
    factors = out_rows + buffer_size(axis, channels)
    befores = factors + axis.lines * axis.queries * FLOAT
    scale = befores + axis.lines * axis.queries * FLOAT
    return Memory(0, weights, k, v, q_rows, k_rows, v_rows, out_rows, factors, befores, scale, scale + FLOAT)


@register_jitable
def columns_panel(channels: int) -> int:
    """Return the bytes of a panel of 32 rows of `channels` numbers, transposed."""
    return up((channels + 1) // 2, LANES) * PANEL_ROW


@compiled
def energies_of(
    q: int, q_row: int, k: int, axis: Axis, depth: int, query: int, count: int, energies: int, scale: int
) -> None:
    """Write the energies of `count` queries, at most QUERIES, from `query` on, whose rows begin at `q`.

    `k` is the address of the panels of K^T, `scale` that of a number.
    """
    row = up(axis.length, LANES) * FLOAT
    add_product(
        count,
        axis.length,
        depth,
        Matrix(q, q_row, size_of(np.float32(0))),
        k,
        columns_panel(depth),
        energies,
        row,
        Factors(scale, np.int64(0)),
        Factors(np.int64(0), np.int64(0)),
        np.int64(0),
        energies,
        row,
    )
    share = np.float32(math.log(axis.crossing))
    for i in range(count):  # the position itself is on `crossing` lines, and counts 1 / crossing on each of them
        own = energies + i * row + (query + i) * FLOAT
        store(own, load(np.float32(0), own) - share)


@compiled
def _weights(
    axis: Axis,
    sizes: Sizes,
    part: Group,
    m: int,
    memory: int,
    at: Memory,
    q: Rows,
    k: Rows,
    lse: int,
    row_maxima: int,
    row_sums: int,
) -> None:
    """Write the weights of the queries of line `m` of a part of a group, and the factors of their results."""
    energy_row, weight_row = up(axis.length, LANES) * FLOAT, up(axis.length, LANES) * SIZE
    panel, words, like = columns_panel(sizes.depth), (sizes.depth + 1) // 2, np.float32(0)
    columns(k.address + m * k.line, k.row, axis.length, words, memory + at.k, panel)
    tiles = (part.length + QUERIES - 1) // QUERIES
    for tile in range(tiles):
        first, last = part.length * tile // tiles, part.length * (tile + 1) // tiles
        energies_of(
            q.address + m * q.line + first * q.row,
            q.row,
            memory + at.k,
            axis,
            sizes.depth,
            part.first + first,
            last - first,
            memory + at.energies,
            memory + at.scale,
        )
        for i in range(first, last):
            row, number = memory + at.energies + (i - first) * energy_row, m * axis.queries + i
            row_max, row_sum = weigh(row, axis.length, memory + at.weights + number * weight_row)
            place = position_of(axis, sizes.positions, part, m, i) * FLOAT
            factor, before = merge(like, axis, place, row_max, row_sum, lse, row_maxima, row_sums)
            store(memory + at.factors + number * FLOAT, factor)
            store(memory + at.befores + number * FLOAT, before)


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
    """Compute forward for groups begin ... end of an axis; see `attention.forward_groups`.

    q, k, v and out are maps of bfloat16, which `kept` stands for, and the arrays float32, `like`.
    """
    length, depth, queries = axis.length, sizes.depth, axis.queries
    none, reads, float_size = np.int64(0), np.bool_(True), size_of(np.float32(0))
    at = divide_memory(axis, sizes)
    weight_row, panel = up(length, LANES) * SIZE, (length + 1) // 2 * PANEL_ROW
    store(memory + at.scale, np.float32(sizes.scale))
    next_line = length * v.position if axis.inner == 1 else v.position
    for number in range(begin, end):
        group = group_at(axis, number)
        line = part_of(group, none, length)
        k_rows = rows_of(k, axis, line, none, depth, memory + at.k_rows, WORD, reads)
        for first in range(group.first, group.first + group.length, queries):
            part = part_of(group, first, min(queries, group.first + group.length - first))
            q_rows = rows_of(q, axis, part, none, depth, memory + at.q_rows, WORD, reads)
            for m in range(part.lines):
                _weights(axis, sizes, part, m, memory, at, q_rows, k_rows, lse, row_maxima, row_sums)
            for start, channels in chunks(axis, sizes.channels):
                v_rows = rows_of(v, axis, line, start, channels, memory + at.v_rows, WORD, reads)
                out_rows = rows_of(out, axis, part, start, channels, memory + at.out_rows, PANEL, not axis.first)
                for m in range(part.lines):
                    values, sheet = v_rows.address + m * v_rows.line, m * queries * FLOAT
                    interleave(values, v_rows.row, length, channels, memory + at.v, panel)
                    add_product(
                        part.length,
                        channels,
                        length,
                        Matrix(memory + at.weights + m * queries * weight_row, weight_row, float_size),
                        memory + at.v,
                        panel,
                        out_rows.address + m * out_rows.line,
                        out_rows.row,
                        Factors(memory + at.factors + sheet, float_size),
                        Factors(none if axis.first else memory + at.befores + sheet, float_size),
                        np.int64(1),
                        values + next_line,
                        v_rows.row,
                    )
                put_rows(out_rows, out, axis, part, start, channels)
