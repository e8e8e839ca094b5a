"""Backward of criss-cross attention in bfloat16, for a group of lines of an axis at a time; see gradients.py.

dP = dO V^T is summed in float32. P and dS are rounded to bfloat16 when they are computed, two queries at a time: P^T dO
and dS^T Q sum over queries, so their words hold two queries of one key. dS K sums over keys, and its words hold two
keys of one query, so dS is written twice. A line that is computed some queries at a time adds its dk and dv in float32,
so that they are rounded once for each axis and not once for each time.

Where all threads share a line, each transposes and interleaves a part of the keys (whole panels), then computes P, dS
and dq of a part of some queries (whole pairs) and interleaves their rows of Q and dO, and when all are done adds to dk
and dv of a part of the keys.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ccgpu.kernels.numba_cpu.attention import Sizes
from ccgpu.kernels.numba_cpu.dot_products.forward import FLOAT, QUERIES, columns_panel, energies_of
from ccgpu.kernels.numba_cpu.dot_products.instructions import LANES
from ccgpu.kernels.numba_cpu.dot_products.interleaving import columns, interleave
from ccgpu.kernels.numba_cpu.dot_products.multiplication import PANEL_ROW, add_product
from ccgpu.kernels.numba_cpu.dot_products.rows import PANEL, WORD, chunks, put_rows, rows_of, share_of, up
from ccgpu.kernels.numba_cpu.dot_products.sheets import (
    Memory,
    Sheets,
    columns_size,
    divide_memory,
    panel_size,
    panels_size,
    sheets_of,
)
from ccgpu.kernels.numba_cpu.dot_products.weights import add_rounded, dot, weigh_gradients
from ccgpu.kernels.numba_cpu.gradients import Maps
from ccgpu.kernels.numba_cpu.lines import Axis, Group, Rows, Task, group_at, part_of, position_of
from ccgpu.kernels.numba_cpu.matrices import Factors, Matrix, compiled
from ccgpu.kernels.numba_cpu.vectors import address_of_one, load, size_of, store


@compiled
def _key_panels(axis: Axis, sizes: Sizes, keys: Group, memory: int, start: int, at: Memory, maps: Maps) -> None:
    """Write K^T, K interleaved and V^T of some keys, whole panels of them, to memory that all threads share."""
    none, reads, depth = np.int64(0), np.bool_(True), sizes.depth
    k_rows = rows_of(maps.k, axis, keys, none, depth, memory + at.k, WORD, reads)
    panel = keys.first // PANEL
    for m in range(keys.lines):
        sheets, key = sheets_of(start, at, axis, sizes, reads, m, none), k_rows.address + m * k_rows.line
        target = sheets.k_columns + panel * columns_panel(depth)
        columns(key, k_rows.row, keys.length, (depth + 1) // 2, target, columns_panel(depth))
        pairs = sheets.k_panels + keys.first // 2 * PANEL_ROW
        interleave(key, k_rows.row, keys.length, depth, pairs, panel_size(axis.length))
    for first, channels in chunks(axis, sizes.channels):
        v_rows = rows_of(maps.v, axis, keys, first, channels, memory + at.v, WORD, reads)
        for m in range(keys.lines):
            sheets = sheets_of(start, at, axis, sizes, reads, m, none)
            target = sheets.v_columns + columns_size(axis, first) + panel * columns_panel(channels)
            value = v_rows.address + m * v_rows.line
            columns(value, v_rows.row, keys.length, (channels + 1) // 2, target, columns_panel(channels))


@compiled
def _weight_gradients(
    axis: Axis,
    task: Task,
    sizes: Sizes,
    part: Group,
    query: int,
    memory: int,
    start: int,
    at: Memory,
    maps: Maps,
) -> None:
    """Write dP = dO V^T for the queries of a part of a group; on the first axis, write dout . out - dlse to delta.

    Args:
        axis, task, sizes, memory, start, at, maps: as in `backward_groups`.
        part: the queries.
        query: number of the first of them among those whose sheets are in memory.
    """
    none, reads, like, shared = np.int64(0), np.bool_(True), np.float32(0), task.shared != 0
    key_row, one = up(axis.length, LANES) * FLOAT, Factors(address_of_one(np.float32(0)), none)
    line = part_of(part, none, axis.length)
    for first, channels in chunks(axis, sizes.channels):
        panel = columns_panel(channels)
        dout_rows = rows_of(maps.dout, axis, part, first, channels, memory + at.dout, WORD, reads)
        v_rows = rows_of(maps.v, axis, line, first, channels, memory + at.v, WORD, not shared)
        for m in range(part.lines):
            sheets, gradient = (
                sheets_of(start, at, axis, sizes, shared, m, query),
                dout_rows.address + m * dout_rows.line,
            )
            value_columns = sheets.v_columns + (columns_size(axis, first) if shared else 0)
            if shared:
                pairs = sheets.dout_panels + panels_size(axis.queries, first)
                interleave(gradient, dout_rows.row, part.length, channels, pairs, panel_size(axis.queries))
            else:
                value = v_rows.address + m * v_rows.line
                columns(value, v_rows.row, axis.length, (channels + 1) // 2, value_columns, panel)
            add_product(
                part.length,
                axis.length,
                channels,
                Matrix(gradient, dout_rows.row, size_of(like)),
                value_columns,
                panel,
                sheets.weights,
                key_row,
                one,
                Factors(none, none) if first == 0 else one,
                none,
                sheets.weights,
                key_row,
            )
        if axis.first:
            out_rows = rows_of(maps.out, axis, part, first, channels, memory + at.out, WORD, reads)
            for m in range(part.lines):
                for i in range(part.length):
                    a = dout_rows.address + m * dout_rows.line + i * dout_rows.row
                    b = out_rows.address + m * out_rows.line + i * out_rows.row
                    place = position_of(axis, sizes.positions, part, m, i) * FLOAT
                    before = load(like, maps.delta + place)
                    if first == 0:
                        before = np.float32(0) if maps.dlse == 0 else -load(like, maps.dlse + place)
                    store(maps.delta + place, before + dot(a, b, channels))


@compiled
def _weights(
    axis: Axis,
    sizes: Sizes,
    part: Group,
    sheets: Sheets,
    q: int,
    q_row: int,
    memory: int,
    at: Memory,
    lse: int,
    delta: int,
) -> None:
    """Turn the dP of a line's queries, in its sheet, into P; write dS.

    Args:
        axis, sizes, part, memory, at: as in `_weight_gradients`.
        sheets: of the line, from the first of these queries on.
        q, q_row: address of the first query's row of Q, bytes from row to row.
        lse, delta: addresses of the first query's numbers.
    """
    like, key_row, step = np.float32(0), up(axis.length, LANES) * FLOAT, axis.inner * FLOAT
    pairs = (part.length + 1) // 2
    tiles = (2 * pairs + QUERIES - 1) // QUERIES
    for tile in range(tiles):  # whole pairs of queries
        first, last = pairs * tile // tiles * 2, min(part.length, pairs * (tile + 1) // tiles * 2)
        energies_of(
            q + first * q_row,
            q_row,
            sheets.k_columns,
            axis,
            sizes.depth,
            part.first + first,
            last - first,
            memory + at.energies,
            memory + at.scale,
        )
        for i in range(first, last, 2):
            both = i + 1 < last
            here = i * step
            there = here + step if both else here
            weigh_gradients(
                memory + at.energies + (i - first) * key_row,
                key_row,
                axis.length,
                1 if both else 0,
                load(like, lse + here),
                load(like, lse + there),
                sheets.weights + i * key_row,
                load(like, delta + here),
                load(like, delta + there),
                sheets.rows + i * (key_row // 2),
                key_row // 2,
                sheets.words + i * (key_row // 2),
            )


@compiled
def _query_gradients(
    axis: Axis,
    task: Task,
    sizes: Sizes,
    part: Group,
    m: int,
    sheets: Sheets,
    q: Rows,
    k: Rows,
    dq: Rows,
    memory: int,
    at: Memory,
    maps: Maps,
) -> None:
    """Turn dP of a part's queries on line `m` into P, write dS, add scale dS K to dq and interleave their rows of Q.

    Args:
        axis, task, sizes, part, memory, at, maps: as in `_weight_gradients`.
        m, sheets: number of the line in its group; its sheets, from the first query of the part on.
        q, dq: rows of the part.
        k: rows of all keys, which are not read if the line is shared.
    """
    none, key_row, depth = np.int64(0), up(axis.length, LANES) * FLOAT, sizes.depth
    query, key = q.address + m * q.line, k.address + m * k.line
    if not task.shared:
        columns(key, k.row, axis.length, (depth + 1) // 2, sheets.k_columns, columns_panel(depth))
    place = position_of(axis, sizes.positions, part, m, none) * FLOAT
    _weights(axis, sizes, part, sheets, query, q.row, memory, at, maps.lse + place, maps.delta + place)
    if not task.shared:
        interleave(key, k.row, axis.length, depth, sheets.k_panels, panel_size(axis.length))
    results = dq.address + m * dq.line
    add_product(
        part.length,
        depth,
        axis.length,
        Matrix(sheets.rows, key_row // 2, size_of(np.float32(0))),
        sheets.k_panels,
        panel_size(axis.length),
        results,
        dq.row,
        Factors(memory + at.scale, none),
        Factors(none if axis.first else address_of_one(np.float32(0)), none),
        np.int64(1),
        results,
        dq.row,
    )
    interleave(query, q.row, part.length, depth, sheets.q_panels, panel_size(axis.queries))


@compiled
def _add_transposed(
    axis: Axis,
    keys: Group,
    queries: Group,
    words: int,
    words_row: int,
    channels: int,
    panels: int,
    rows: int,
    row: int,
    sums: int,
    factor: Factors,
    one: Factors,
) -> None:
    """Add factor W^T X of a line to its rows of bfloat16, for some keys and the queries whose sheets are in memory.

    Args:
        axis, keys, queries: as in `_key_gradients`.
        words, words_row: address of W (queries, keys), the words of two queries; bytes from one pair to the next.
        channels: of X and of the result.
        panels: address of the queries' rows of X, interleaved.
        rows, row: address of the result of the first of these keys, bytes from row to row.
        sums: address of the line's float32 sums (keys, channels), which are used if these are not all queries.
        factor, one: factors of the product and of what is added to.
    """
    panel, sums_row = panel_size(axis.queries), up(channels, PANEL) * FLOAT
    nothing = Factors(np.int64(0), np.int64(0))
    weights = Matrix(words + keys.first * size_of(np.float32(0)), size_of(np.float32(0)), words_row)
    if queries.length == axis.length:
        adds = nothing if axis.first else one
        add_product(
            keys.length,
            channels,
            queries.length,
            weights,
            panels,
            panel,
            rows,
            row,
            factor,
            adds,
            np.int64(1),
            rows,
            row,
        )
        return
    sums += keys.first * sums_row
    add_product(
        keys.length,
        up(channels, PANEL),
        queries.length,
        weights,
        panels,
        panel,
        sums,
        sums_row,
        factor,
        nothing if queries.first == 0 else one,
        np.int64(0),
        sums,
        sums_row,
    )
    if queries.first + queries.length == axis.length:
        for n in range(keys.length):
            add_rounded(sums + n * sums_row, channels, 0 if axis.first else 1, rows + n * row)


@compiled
def _value_gradients(
    axis: Axis,
    task: Task,
    sizes: Sizes,
    keys: Group,
    queries: Group,
    memory: int,
    start: int,
    at: Memory,
    maps: Maps,
) -> None:
    """Add P^T dO to dv, for some keys of a group and the queries whose sheets are in memory.

    Args:
        axis, task, sizes, memory, start, at, maps: as in `backward_groups`.
        keys, queries: positions of the group's lines.
    """
    none, key_row, shared = np.int64(0), up(axis.length, LANES) * FLOAT, task.shared != 0
    last, one = queries.first + queries.length == axis.length, Factors(address_of_one(np.float32(0)), none)
    reads = last and not axis.first
    for first, channels in chunks(axis, sizes.channels):
        dout_rows = rows_of(maps.dout, axis, queries, first, channels, memory + at.dout, WORD, not shared)
        dv_rows = rows_of(maps.dv, axis, keys, first, channels, memory + at.out, PANEL, reads)
        for m in range(keys.lines):
            sheets = sheets_of(start, at, axis, sizes, shared, m, none)
            panels = sheets.dout_panels + (panels_size(axis.queries, first) if shared else 0)
            if not shared:
                gradient = dout_rows.address + m * dout_rows.line
                interleave(gradient, dout_rows.row, queries.length, channels, panels, panel_size(axis.queries))
            _add_transposed(
                axis,
                keys,
                queries,
                sheets.weights,
                2 * key_row,
                channels,
                panels,
                dv_rows.address + m * dv_rows.line,
                dv_rows.row,
                sheets.dv_sums + first * axis.length * FLOAT,
                one,
                one,
            )
        if last:
            put_rows(dv_rows, maps.dv, axis, keys, first, channels)


@compiled
def backward_groups(
    like: Any,
    kept: Any,
    begin: int,
    end: int,
    memory: int,
    axis: Axis,
    task: Task,
    sizes: Sizes,
    shared: int,
    maps: Maps,
) -> None:
    """Compute a task of backward for groups begin ... end of an axis; see `gradients.backward_groups`.

    All maps are of bfloat16, which `kept` stands for, and the arrays float32, `like`.
    """
    none, depth, alone = np.int64(0), sizes.depth, task.shared == 0
    by_keys, key_row = task.by_keys != 0, up(axis.length, LANES) * FLOAT
    at = divide_memory(axis, sizes, not alone)
    start = memory if alone else shared - at.weights
    store(memory + at.scale, np.float32(sizes.scale))
    scale, one = Factors(memory + at.scale, none), Factors(address_of_one(np.float32(0)), none)
    for number in range(begin, end):
        keys = group_at(axis, number)
        line, share = part_of(keys, none, axis.length), number % axis.parts
        k_rows = rows_of(maps.k, axis, line, none, depth, memory + at.k, WORD, alone)
        if task.columns and not alone:
            whole_panels = share_of(line, share, axis.parts, np.int64(PANEL))
            _key_panels(axis, sizes, whole_panels, memory, start, at, maps)
        for first in range(task.first, task.end, axis.queries):
            queries = part_of(line, first, min(axis.queries, task.end - first))
            part = share_of(queries, share, axis.parts, np.int64(2))
            by_queries, last = task.by_queries != 0 and part.length > 0, first + queries.length == axis.length
            if by_queries:
                _weight_gradients(axis, task, sizes, part, part.first - first, memory, start, at, maps)
            q_rows = rows_of(maps.q, axis, part, none, depth, memory + at.q, WORD, by_queries)
            dq_rows = rows_of(maps.dq, axis, part, none, depth, memory + at.dq, PANEL, by_queries and not axis.first)
            dk_rows = rows_of(
                maps.dk, axis, keys, none, depth, memory + at.dk, PANEL, by_keys and last and not axis.first
            )
            for m in range(keys.lines):
                if by_queries:
                    own = sheets_of(start, at, axis, sizes, not alone, m, part.first - first)
                    _query_gradients(axis, task, sizes, part, m, own, q_rows, k_rows, dq_rows, memory, at, maps)
                if by_keys:
                    sheets = sheets_of(start, at, axis, sizes, not alone, m, none)
                    _add_transposed(
                        axis,
                        keys,
                        queries,
                        sheets.words,
                        key_row,
                        depth,
                        sheets.q_panels,
                        dk_rows.address + m * dk_rows.line,
                        dk_rows.row,
                        sheets.dk_sums,
                        scale,
                        one,
                    )
            if by_queries:
                put_rows(dq_rows, maps.dq, axis, part, none, depth)
            if by_keys:
                if last:
                    put_rows(dk_rows, maps.dk, axis, keys, none, depth)
                _value_gradients(axis, task, sizes, keys, queries, memory, start, at, maps)
