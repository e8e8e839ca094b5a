"""Backward of criss-cross attention in bfloat16, for a group of lines of an axis at a time; see attention.py.

dP = dO V^T is summed in float32. P and dS are rounded to bfloat16 when they are computed, two queries at a time: P^T dO
and dS^T Q sum over queries, so their words hold two queries of one key. dS K sums over keys, and its words hold two
keys of one query, so dS is written twice. A line that is computed some queries at a time adds its dk and dv in float32,
so that they are rounded once for each axis and not once for each time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba.extending import register_jitable

from ccgpu.kernels.numba_cpu.attention import Sizes
from ccgpu.kernels.numba_cpu.dot_products.forward import FLOAT, QUERIES, columns_panel, energies_of
from ccgpu.kernels.numba_cpu.dot_products.instructions import LANES
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
from ccgpu.kernels.numba_cpu.dot_products.weights import add_rounded, dot, weigh_gradients
from ccgpu.kernels.numba_cpu.lines import Axis, Group, Map, group_at
from ccgpu.kernels.numba_cpu.matrices import Factors, Matrix, compiled
from ccgpu.kernels.numba_cpu.vectors import load, size_of, store


class Memory(NamedTuple):
    """Offsets of the parts of a thread's memory."""

    energies: int  # energies (QUERIES, keys) of some queries, float32
    sheets: int  # for each line dP (queries, keys), float32, then P, the words of two queries in the place of the first
    rows: int  # dS (queries, keys) of a line
    words: int  # dS of a line, the words of two queries
    columns: int  # panels of K^T, or of V^T of a chunk of channels, of a line
    panels: int  # rows of K, of Q, or of dO of a chunk of channels, interleaved, of a line
    dk_sums: int  # float32 sums (keys, channels) of each line, if it is computed some queries at a time
    dv_sums: int
    q: int  # rows of the lines, here and in the next six
    k: int
    dq: int
    dk: int
    dout: int
    v: int
    out: int  # out, then dv
    scale: int  # a single number
    one: int  # the number 1
    end: int


@register_jitable
def divide_memory(axis: Axis, sizes: Sizes) -> Memory:
    """Return where the parts of a thread's memory begin."""
    keys, chunk, pieces = (
        up(axis.length, LANES),
        min(chunk_of(axis), sizes.channels),
        axis.queries < axis.length,
    )
    queries, wide = up(axis.queries, 2), max(chunk, sizes.depth)
    sheets = QUERIES * keys * FLOAT
    rows = sheets + axis.lines * queries * keys * FLOAT
    words = rows + queries * keys * SIZE
    columns = words + queries // 2 * keys * FLOAT
    panels = columns + up(axis.length, PANEL) // PANEL * columns_panel(wide)
    dk_sums = panels + up(wide, PANEL) // PANEL * ((axis.length + 1) // 2) * PANEL_ROW
    dv_sums = dk_sums + (axis.lines * axis.length * up(sizes.depth, PANEL) * FLOAT if pieces else 0)
    q = dv_sums + (axis.lines * axis.length * up(sizes.channels, PANEL) * FLOAT if pieces else 0)
    a_map, a_chunk = buffer_size(axis, sizes.depth), buffer_size(axis, chunk)
    k, dq, dk, dout = q + a_map, q + 2 * a_map, q + 3 * a_map, q + 4 * a_map
    v, out = dout + a_chunk, dout + 2 * a_chunk
    scale = out + a_chunk
    one, end = scale + FLOAT, scale + 2 * FLOAT
    return Memory(
        0, sheets, rows, words, columns, panels, dk_sums, dv_sums, q, k, dq, dk, dout, v, out, scale, one, end
    )


@compiled
def _weight_gradients(
    axis: Axis,
    sizes: Sizes,
    group: Group,
    query: int,
    count: int,
    memory: int,
    at: Memory,
    dout: Map,
    v: Map,
    out: Map,
    dlse: int,
    delta: int,
) -> None:
    """Write dP = dO V^T for `count` queries from `query` on; on the first axis, write dout . out - dlse to delta."""
    none, reads, like = np.int64(0), np.bool_(True), np.float32(0)
    key_row = up(axis.length, LANES) * FLOAT
    sheet, one = up(axis.queries, 2) * key_row, Factors(memory + at.one, none)
    for start, channels in chunks(axis, sizes.channels):
        dout_rows = rows_of(dout, axis, group, start, channels, memory + at.dout, WORD, reads)
        v_rows = rows_of(v, axis, group, start, channels, memory + at.v, WORD, reads)
        for m in range(group.lines):
            values, panel = v_rows.address + m * v_rows.line, columns_panel(channels)
            columns(values, v_rows.row, axis.length, (channels + 1) // 2, memory + at.columns, panel)
            results = memory + at.sheets + m * sheet
            add_product(
                count,
                axis.length,
                channels,
                Matrix(
                    dout_rows.address + m * dout_rows.line + query * dout_rows.row,
                    dout_rows.row,
                    size_of(np.float32(0)),
                ),
                memory + at.columns,
                panel,
                results,
                key_row,
                one,
                Factors(none, none) if start == 0 else one,
                np.int64(0),
                results,
                key_row,
            )
        if axis.first:
            out_rows = rows_of(out, axis, group, start, channels, memory + at.out, WORD, reads)
            for m in range(group.lines):
                for i in range(query, query + count):
                    a = dout_rows.address + m * dout_rows.line + i * dout_rows.row
                    b = out_rows.address + m * out_rows.line + i * out_rows.row
                    here = delta + (m + i * axis.inner) * FLOAT
                    before = load(like, here)
                    if start == 0:
                        before = np.float32(0) if dlse == 0 else -load(like, dlse + (m + i * axis.inner) * FLOAT)
                    store(here, before + dot(a, b, channels))


@compiled
def _weights(
    axis: Axis,
    sizes: Sizes,
    query: int,
    count: int,
    memory: int,
    at: Memory,
    sheet: int,
    q: int,
    q_row: int,
    lse: int,
    delta: int,
) -> None:
    """Turn the dP of a line's queries, in its sheet, into P; write dS.

    Args:
        axis, sizes, query, count, memory, at: as in `_weight_gradients`.
        sheet: address of the line's sheet.
        q, q_row: address of the line's first row of Q, bytes from row to row.
        lse, delta: addresses of the line's first number of these.
    """
    like, key_row, step = np.float32(0), up(axis.length, LANES) * FLOAT, axis.inner * FLOAT
    pairs = (count + 1) // 2
    tiles = (2 * pairs + QUERIES - 1) // QUERIES
    for tile in range(tiles):  # whole pairs of queries
        first, last = pairs * tile // tiles * 2, min(count, pairs * (tile + 1) // tiles * 2)
        energies_of(
            q + (query + first) * q_row,
            q_row,
            memory + at.columns,
            axis,
            sizes.depth,
            query + first,
            last - first,
            memory + at.energies,
            memory + at.scale,
        )
        for i in range(first, last, 2):
            both = i + 1 < last
            here = (query + i) * step
            there = here + step if both else here
            weigh_gradients(
                memory + at.energies + (i - first) * key_row,
                key_row,
                axis.length,
                1 if both else 0,
                load(like, lse + here),
                load(like, lse + there),
                sheet + i * key_row,
                load(like, delta + here),
                load(like, delta + there),
                memory + at.rows + i * (key_row // 2),
                key_row // 2,
                memory + at.words + i * (key_row // 2),
            )


@compiled
def _add_transposed(
    axis: Axis,
    query: int,
    count: int,
    weights: Matrix,
    x: int,
    x_row: int,
    channels: int,
    panels: int,
    rows: int,
    row: int,
    sums: int,
    factor: Factors,
    one: Factors,
) -> None:
    """Add factor W^T X of a line to its rows of bfloat16, for `count` queries from `query` on.

    Args:
        axis, query, count: as in `_weight_gradients`.
        weights: W^T (keys, queries), the words of two queries.
        x, x_row: address of X's row of the first of these queries, bytes from row to row.
        channels: of X and of the result.
        panels: address of memory for X interleaved.
        rows, row: address of the results, bytes from row to row.
        sums: address of float32 sums (keys, channels), which are used if all queries are more than `count`.
        factor, one: factors of the product and of what is added to.
    """
    panel, sums_row = (count + 1) // 2 * PANEL_ROW, up(channels, PANEL) * FLOAT
    nothing = Factors(np.int64(0), np.int64(0))
    interleave(x, x_row, count, channels, panels, panel)
    if count == axis.length:
        adds = nothing if axis.first else one
        add_product(
            axis.length, channels, count, weights, panels, panel, rows, row, factor, adds, np.int64(1), rows, row
        )
        return
    adds = nothing if query == 0 else one
    add_product(
        axis.length,
        up(channels, PANEL),
        count,
        weights,
        panels,
        panel,
        sums,
        sums_row,
        factor,
        adds,
        np.int64(0),
        sums,
        sums_row,
    )
    if query + count == axis.length:
        for n in range(axis.length):
            add_rounded(sums + n * sums_row, channels, 0 if axis.first else 1, rows + n * row)


@compiled
def backward_groups(
    like: Any,
    kept: Any,
    begin: int,
    end: int,
    memory: int,
    axis: Axis,
    sizes: Sizes,
    dout: Map,
    q: Map,
    k: Map,
    v: Map,
    out: Map,
    lse: int,
    dlse: int,
    delta: int,
    dq: Map,
    dk: Map,
    dv: Map,
) -> None:
    """Compute backward for groups begin ... end of an axis, whole lines; see `gradients.backward_groups`.

    All maps are of bfloat16, which `kept` stands for, and the arrays float32, `like`.
    """
    length, depth, queries = axis.length, sizes.depth, axis.queries
    none, reads, adds = np.int64(0), np.bool_(True), not axis.first
    at = divide_memory(axis, sizes)
    key_row = up(length, LANES) * FLOAT
    sheet = up(queries, 2) * key_row
    store(memory + at.scale, np.float32(sizes.scale))
    store(memory + at.one, np.float32(1))
    scale, one, nothing = Factors(memory + at.scale, none), Factors(memory + at.one, none), Factors(none, none)
    panel = (length + 1) // 2 * PANEL_ROW
    for number in range(begin, end):
        group = group_at(axis, number)
        q_rows = rows_of(q, axis, group, none, depth, memory + at.q, WORD, reads)
        k_rows = rows_of(k, axis, group, none, depth, memory + at.k, WORD, reads)
        dq_rows = rows_of(dq, axis, group, none, depth, memory + at.dq, PANEL, adds)
        dk_rows = rows_of(dk, axis, group, none, depth, memory + at.dk, PANEL, adds)
        first = (group.image * sizes.positions + group.position) * FLOAT
        for query in range(0, length, queries):
            count = min(queries, length - query)
            _weight_gradients(
                axis,
                sizes,
                group,
                query,
                count,
                memory,
                at,
                dout,
                v,
                out,
                dlse + first if dlse != 0 else 0,
                delta + first,
            )
            for m in range(group.lines):
                key, line_q = k_rows.address + m * k_rows.line, q_rows.address + m * q_rows.line
                columns(key, k_rows.row, length, (depth + 1) // 2, memory + at.columns, columns_panel(depth))
                here = first + m * FLOAT
                _weights(
                    axis,
                    sizes,
                    query,
                    count,
                    memory,
                    at,
                    memory + at.sheets + m * sheet,
                    line_q,
                    q_rows.row,
                    lse + here,
                    delta + here,
                )
                interleave(key, k_rows.row, length, depth, memory + at.panels, panel)
                results = dq_rows.address + m * dq_rows.line + query * dq_rows.row
                add_product(
                    count,
                    depth,
                    length,
                    Matrix(memory + at.rows, key_row // 2, size_of(np.float32(0))),
                    memory + at.panels,
                    panel,
                    results,
                    dq_rows.row,
                    scale,
                    nothing if axis.first else one,
                    np.int64(1),
                    results,
                    dq_rows.row,
                )
                _add_transposed(
                    axis,
                    query,
                    count,
                    Matrix(memory + at.words, size_of(np.float32(0)), key_row),
                    line_q + query * q_rows.row,
                    q_rows.row,
                    depth,
                    memory + at.panels,
                    dk_rows.address + m * dk_rows.line,
                    dk_rows.row,
                    memory + at.dk_sums + m * length * up(depth, PANEL) * FLOAT,
                    scale,
                    one,
                )
            for start, channels in chunks(axis, sizes.channels):
                dout_rows = rows_of(dout, axis, group, start, channels, memory + at.dout, WORD, reads)
                dv_rows = rows_of(dv, axis, group, start, channels, memory + at.out, PANEL, adds)
                for m in range(group.lines):
                    _add_transposed(
                        axis,
                        query,
                        count,
                        Matrix(memory + at.sheets + m * sheet, size_of(np.float32(0)), 2 * key_row),
                        dout_rows.address + m * dout_rows.line + query * dout_rows.row,
                        dout_rows.row,
                        channels,
                        memory + at.panels,
                        dv_rows.address + m * dv_rows.line,
                        dv_rows.row,
                        memory + at.dv_sums + (m * up(sizes.channels, PANEL) + start) * length * FLOAT,
                        one,
                        one,
                    )
                if query + count == length:
                    put_rows(dv_rows, dv, axis, group, start, channels)
        put_rows(dq_rows, dq, axis, group, none, depth)
        put_rows(dk_rows, dk, axis, group, none, depth)
