"""Forward of criss-cross attention in bfloat16, for a group of lines of an axis at a time; see attention.py.

The energies of a few queries stay in float32 in the first cache until they are weights, which are rounded to bfloat16.
The values are interleaved 32 channels at a time, just before the product that reads them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable

from ccgpu.kernels.numba_cpu.attention import Sizes, merge
from ccgpu.kernels.numba_cpu.dot_products.instructions import LANES, NUMBERS
from ccgpu.kernels.numba_cpu.dot_products.interleaving import columns, interleave
from ccgpu.kernels.numba_cpu.dot_products.products import PANEL_ROW, TILE_ROWS, add_product
from ccgpu.kernels.numba_cpu.dot_products.rows import PANEL, SIZE, WORD, buffer_size, chunks, put_rows, rows_of, up
from ccgpu.kernels.numba_cpu.dot_products.weights import weigh
from ccgpu.kernels.numba_cpu.lines import Axis, Map, group_at
from ccgpu.kernels.numba_cpu.matrices import Factors, Matrix, compiled
from ccgpu.kernels.numba_cpu.vectors import load, store

FLOAT = 4  # bytes of a float32


class Memory(NamedTuple):
    """Offsets of the parts of a thread's memory."""

    energies: int  # energies (TILE_ROWS, keys) of some queries, float32
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
    keys, channels = up(axis.length, LANES), min(max(PANEL, axis.chunk), sizes.channels)
    weights = TILE_ROWS * keys * FLOAT
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
    """Write the energies of `count` queries, at most TILE_ROWS, from `query` on, whose rows begin at `q`.

    `k` is the address of the panels of K^T, `scale` that of a number.
    """
    row = up(axis.length, LANES) * FLOAT
    add_product(
        count,
        axis.length,
        depth,
        Matrix(q, q_row, np.int64(FLOAT)),
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
def forward_groups(
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

    q, k, v and out are maps of bfloat16, the other arrays are float32.
    """
    length, depth, queries, like = axis.length, sizes.depth, axis.queries, np.float32(0)
    none, reads = np.int64(0), np.bool_(True)
    at = divide_memory(axis, sizes)
    energy_row, weight_row = up(length, LANES) * FLOAT, up(length, LANES) * SIZE
    store(memory + at.scale, np.float32(sizes.scale))
    panel = (length + 1) // 2 * PANEL_ROW
    next_line = length * v.position if axis.inner == 1 else v.position
    for number in range(begin, end):
        group = group_at(axis, number)
        q_rows = rows_of(q, axis, group, none, depth, memory + at.q_rows, WORD, reads)
        k_rows = rows_of(k, axis, group, none, depth, memory + at.k_rows, WORD, reads)
        for query in range(0, length, queries):
            count = min(queries, length - query)
            for m in range(group.lines):
                columns(
                    np.int16(0),
                    k_rows.address + m * k_rows.line,
                    k_rows.row,
                    length,
                    (depth + 1) // 2,
                    memory + at.k,
                    columns_panel(depth),
                )
                tiles = (count + TILE_ROWS - 1) // TILE_ROWS
                for tile in range(tiles):
                    first, last = count * tile // tiles, count * (tile + 1) // tiles
                    here = q_rows.address + m * q_rows.line + (query + first) * q_rows.row
                    energies_of(
                        here,
                        q_rows.row,
                        memory + at.k,
                        axis,
                        depth,
                        query + first,
                        last - first,
                        memory + at.energies,
                        memory + at.scale,
                    )
                    for i in range(first, last):
                        number_of = m * queries + i
                        row = memory + at.energies + (i - first) * energy_row
                        row_max, row_sum = weigh(row, length, memory + at.weights + number_of * weight_row)
                        position = group.image * sizes.positions + group.position + m + (query + i) * axis.inner
                        factor, before = merge(
                            like, axis, position * FLOAT, row_max, row_sum, lse, row_maxima, row_sums
                        )
                        store(memory + at.factors + number_of * FLOAT, factor)
                        store(memory + at.befores + number_of * FLOAT, before)
            for start, channels in chunks(axis, sizes.channels):
                v_rows = rows_of(v, axis, group, start, channels, memory + at.v_rows, WORD, reads)
                adds = not axis.first or query > 0
                out_rows = rows_of(out, axis, group, start, channels, memory + at.out_rows, PANEL, adds)
                for m in range(group.lines):
                    weights = Matrix(memory + at.weights + m * queries * weight_row, weight_row, np.int64(FLOAT))
                    factors = Factors(memory + at.factors + m * queries * FLOAT, np.int64(FLOAT))
                    befores = Factors(
                        none if axis.first else memory + at.befores + m * queries * FLOAT, np.int64(FLOAT)
                    )
                    values = v_rows.address + m * v_rows.line
                    results = out_rows.address + m * out_rows.line + query * out_rows.row
                    interleave(np.int16(0), values, v_rows.row, length, channels, memory + at.v, panel)
                    add_product(
                        count,
                        channels,
                        length,
                        weights,
                        memory + at.v,
                        panel,
                        results,
                        out_rows.row,
                        factors,
                        befores,
                        np.int64(1),
                        values + next_line,
                        v_rows.row,
                    )
                put_rows(out_rows, out, axis, group, start, channels)
