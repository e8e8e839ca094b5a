"""Backward of criss-cross attention on the CPU, for a group of lines of an axis at a time.

Axis after axis:    P = exp(E - lse), dP = dO V^T, dS = P (dP - delta), with delta_u = dout_u . out_u - dlse_u;
                    dQ += scale dS K, dK += scale dS^T Q, dV += P^T dO.

P, dP, dS and dQ belong to queries; dK and dV belong to keys and are sums over queries. So some queries of a line at a
time are computed in two steps: `query_gradients` fills their rows of the sheets P and dS, `key_gradients` reads
columns of these. A thread does both for lines of its own. Where all threads share a line, each does a part of the
queries, and when all are done, a part of the keys; K^T and V^T are written before, in parts as well.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ccgpu.kernels.numba_cpu.attention import Memory, Sizes, divide_memory
from ccgpu.kernels.numba_cpu.lines import (
    Axis,
    Group,
    Map,
    Rows,
    Task,
    chunks,
    columns_of,
    energies,
    exponentials_of,
    gather,
    group_at,
    matrix_of,
    no_factors,
    padded,
    part_of,
    position_of,
    put_rows,
    rows_of,
    share_of,
)
from ccgpu.kernels.numba_cpu.matrices import Factors, Matrix, add_product, compiled
from ccgpu.kernels.numba_cpu.vectors import (
    VECTOR_BYTES,
    address_of_one,
    dot,
    load,
    size_of,
    store,
    subtract_and_multiply,
)


class Sheets(NamedTuple):
    """Addresses of what is computed from a group's lines for some of their queries: matrices, line after line."""

    weights: int  # E, then P (queries, keys)
    gradients: int  # dP, then dS (queries, keys)
    k_columns: int  # K^T (depth, keys)
    dk_sums: int  # dk and dv of the keys so far, rows of all their channels, where maps have fewer bits in memory
    dv_sums: int
    v_columns: int  # V^T (channels, keys), of one chunk of channels; in shared memory chunk after chunk


class Maps(NamedTuple):
    """The maps of backward, and the addresses of arrays (images, positions)."""

    dout: Map
    q: Map
    k: Map
    v: Map
    out: Map
    lse: int
    dlse: int  # 0: zeros
    delta: int  # dout . out - dlse, from the first axis on
    dq: Map
    dk: Map
    dv: Map


@compiled
def _from_row(sheets: Sheets, offset: int) -> Sheets:
    """Return the sheets from the rows of P and dS on that lie `offset` bytes after the first ones."""
    weights, gradients = sheets.weights + offset, sheets.gradients + offset
    return Sheets(weights, gradients, sheets.k_columns, sheets.dk_sums, sheets.dv_sums, sheets.v_columns)


@compiled
def add_dot(like: Any, target: int, a: int, b: int, channels: int) -> None:
    """Add the dot product of two rows of `channels` numbers to the number at `target`."""
    size = size_of(like)
    whole = channels * size // VECTOR_BYTES * VECTOR_BYTES
    product = dot(like, a, b, whole) if whole else type(like)(0)
    for place in range(whole, channels * size, size):
        product += load(like, a + place) * load(like, b + place)
    store(target, load(like, target) + product)


@compiled
def _value_columns(
    like: Any, kept: Any, axis: Axis, sizes: Sizes, keys: Group, columns: int, memory: int, at: Memory, v: Map
) -> None:
    """Write V^T of some keys of a group, chunk after chunk of the channels."""
    reads = np.bool_(True)
    for start, channels in chunks(like, axis, sizes.channels):
        v_rows = rows_of(like, kept, v, axis, keys, start, channels, memory + at.v, reads)
        columns_of(like, v_rows, axis, keys, channels, columns + keys.lines * start * padded(like, axis.length))


@compiled
def _weight_gradients(
    like: Any,
    kept: Any,
    axis: Axis,
    task: Task,
    sizes: Sizes,
    part: Group,
    sheets: Sheets,
    memory: int,
    at: Memory,
    maps: Maps,
) -> None:
    """Write dP = dO V^T for the queries of a part of a group; on the first axis, add dout . out to delta."""
    size, key_row, reads, none = size_of(like), padded(like, axis.length), np.bool_(True), np.int64(0)
    line, sheet, one = part_of(part, none, axis.length), axis.queries * key_row, Factors(address_of_one(like), none)
    for start, channels in chunks(like, axis, sizes.channels):
        dout_rows = rows_of(like, kept, maps.dout, axis, part, start, channels, memory + at.dout, reads)
        columns = sheets.v_columns
        if task.shared:
            columns += part.lines * start * key_row
        else:
            v_rows = rows_of(like, kept, maps.v, axis, line, start, channels, memory + at.v, reads)
            columns_of(like, v_rows, axis, line, channels, columns)
        for m in range(part.lines):
            add_product(
                like,
                part.length,
                axis.length,
                channels,
                matrix_of(like, dout_rows, m, none),
                Matrix(columns + m * channels * key_row, key_row, size),
                Matrix(sheets.gradients + m * sheet, key_row, size),
                one,
                no_factors() if start == 0 else one,
            )
        if axis.first:
            out_rows = rows_of(like, kept, maps.out, axis, part, start, channels, memory + at.out, reads)
            for m in range(part.lines):
                for i in range(part.length):
                    a = dout_rows.address + m * dout_rows.line + i * dout_rows.row
                    b = out_rows.address + m * out_rows.line + i * out_rows.row
                    target = maps.delta + position_of(axis, sizes.positions, part, m, i) * size
                    add_dot(like, target, a, b, channels)


@compiled
def query_gradients(
    like: Any,
    kept: Any,
    axis: Axis,
    task: Task,
    sizes: Sizes,
    part: Group,
    sheets: Sheets,
    k: Rows,
    memory: int,
    at: Memory,
    maps: Maps,
) -> None:
    """Write P and dS and add scale dS K to dq, for the queries of a part of a group.

    The sheets P and dS begin with the first of these queries; k are the rows of all keys.
    """
    size, key_row, depth, none = size_of(like), padded(like, axis.length), sizes.depth, np.int64(0)
    reads, adds, sheet = np.bool_(True), not axis.first, axis.queries * key_row
    scale, beta = Factors(memory + at.scale, none), Factors(address_of_one(like) if adds else none, none)
    q_rows = rows_of(like, kept, maps.q, axis, part, none, depth, memory + at.q, reads)
    energies(like, q_rows, sheets.k_columns, axis, part, depth, sheets.weights, memory + at.scale)
    for m in range(part.lines):
        for i in range(part.length):
            row = sheets.weights + m * sheet + i * key_row
            place = position_of(axis, sizes.positions, part, m, i) * size
            exponentials_of(like, row, axis.length, part.first + i, axis.crossing, load(like, maps.lse + place))
            if axis.first:
                store(maps.delta + place, type(like)(0) if maps.dlse == 0 else -load(like, maps.dlse + place))
    _weight_gradients(like, kept, axis, task, sizes, part, sheets, memory, at, maps)
    for m in range(part.lines):
        for i in range(part.length):
            row = m * sheet + i * key_row
            offset = load(like, maps.delta + position_of(axis, sizes.positions, part, m, i) * size)
            subtract_and_multiply(like, sheets.gradients + row, sheets.weights + row, key_row, offset)
    dq_rows = rows_of(like, kept, maps.dq, axis, part, none, depth, memory + at.dq, adds)
    for m in range(part.lines):
        gradients = Matrix(sheets.gradients + m * sheet, key_row, size)
        keys, target = matrix_of(like, k, m, none), matrix_of(like, dq_rows, m, none)
        add_product(like, part.length, depth, axis.length, gradients, keys, target, scale, beta)
    put_rows(like, kept, dq_rows, maps.dq, axis, part, none, depth)


@compiled
def _sums_of(
    like: Any,
    kept: Any,
    x: Map,
    axis: Axis,
    keys: Group,
    adds: bool,
    start: int,
    channels: int,
    all_channels: int,
    buffer: int,
    sums: int,
) -> Rows:
    """Return the rows of dk or of dv that the queries of a part add to: of the map, or of `sums`.

    The first part begins the sums with what the earlier axes have written to the map x.
    """
    if not _sums_apart(like, kept, axis):
        return rows_of(like, kept, x, axis, keys, start, channels, buffer, adds)
    row = padded(like, all_channels)
    rows = Rows(sums + keys.first * row + start * size_of(like), row, axis.length * row)
    if adds:
        gather(like, kept, x, axis, keys, start, channels, rows)
    return rows


@compiled
def _sums_apart(like: Any, kept: Any, axis: Axis) -> bool:
    """Tell whether dk and dv are summed outside of the maps, whose memory would round them once for each part."""
    return size_of(kept) < size_of(like) and axis.queries < axis.length


@compiled
def key_gradients(
    like: Any,
    kept: Any,
    axis: Axis,
    sizes: Sizes,
    keys: Group,
    part: Group,
    sheets: Sheets,
    memory: int,
    at: Memory,
    maps: Maps,
) -> None:
    """Add scale dS^T Q to dk and P^T dO to dv, for some keys of a group and the queries of a part of it.

    The sheets begin with the first query of the part and with the first key of the line.
    """
    size, key_row, depth, none = size_of(like), padded(like, axis.length), sizes.depth, np.int64(0)
    reads, adds, sheet = np.bool_(True), not axis.first or part.first > 0, axis.queries * key_row
    scale, one = Factors(memory + at.scale, none), Factors(address_of_one(like), none)
    beta, here = one if adds else no_factors(), keys.first * size
    apart = _sums_apart(like, kept, axis)
    gathers = not axis.first if apart and part.first == 0 else adds and not apart
    puts = not apart or part.first + part.length == axis.length
    q_rows = rows_of(like, kept, maps.q, axis, part, none, depth, memory + at.q, reads)
    dk_rows = _sums_of(like, kept, maps.dk, axis, keys, gathers, none, depth, depth, memory + at.dk, sheets.dk_sums)
    for m in range(part.lines):
        gradients = Matrix(sheets.gradients + m * sheet + here, size, key_row)
        queries, target = matrix_of(like, q_rows, m, none), matrix_of(like, dk_rows, m, none)
        add_product(like, keys.length, depth, part.length, gradients, queries, target, scale, beta)
    if puts:
        put_rows(like, kept, dk_rows, maps.dk, axis, keys, none, depth)
    for start, channels in chunks(like, axis, sizes.channels):
        dout_rows = rows_of(like, kept, maps.dout, axis, part, start, channels, memory + at.dout, reads)
        dv_rows = _sums_of(
            like,
            kept,
            maps.dv,
            axis,
            keys,
            gathers,
            start,
            channels,
            sizes.channels,
            memory + at.out,
            sheets.dv_sums,
        )
        for m in range(part.lines):
            weights = Matrix(sheets.weights + m * sheet + here, size, key_row)
            values, target = matrix_of(like, dout_rows, m, none), matrix_of(like, dv_rows, m, none)
            add_product(like, keys.length, channels, part.length, weights, values, target, one, beta)
        if puts:
            put_rows(like, kept, dv_rows, maps.dv, axis, keys, start, channels)


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
    """Compute a task of backward for groups begin ... end of an axis.

    Args:
        like, kept, begin, end, memory, axis, sizes: as in `attention.forward_groups`.
        task: all steps, if the thread has the lines to itself; one of them, if all threads share a line.
        shared: address of memory that all threads share, aligned to vectors; see `sharing.memory_of_a_shared_line`.
        maps: maps of the dtype in memory, and addresses of arrays.
    """
    size, key_row, depth, none = size_of(like), padded(like, axis.length), sizes.depth, np.int64(0)
    at = divide_memory(axis, sizes, size, True, size_of(kept) < size)
    start = shared - at.energies if task.shared else memory
    sheets = Sheets(
        start + at.energies,
        start + at.gradients,
        start + at.k_columns,
        start + at.dk_sums,
        start + at.dv_sums,
        start + at.v_columns,
    )
    store(memory + at.scale, type(like)(sizes.scale))
    for number in range(begin, end):
        group = group_at(axis, number)
        line = part_of(group, none, axis.length)
        rows_read = line if task.by_queries else group
        reads = task.by_queries or task.columns
        k_rows = rows_of(like, kept, maps.k, axis, rows_read, none, depth, memory + at.k, reads)
        if task.columns:
            columns_of(like, k_rows, axis, group, depth, sheets.k_columns)
            if task.shared:
                _value_columns(like, kept, axis, sizes, group, sheets.v_columns, memory, at, maps.v)
        for first in range(task.first, task.end, axis.queries):
            queries = part_of(line, first, min(axis.queries, task.end - first))
            part = share_of(queries, number % axis.parts, axis.parts)
            if task.by_queries and part.length > 0:
                own = _from_row(sheets, (part.first - first) * key_row)
                query_gradients(like, kept, axis, task, sizes, part, own, k_rows, memory, at, maps)
            if task.by_keys:
                key_gradients(like, kept, axis, sizes, group, queries, sheets, memory, at, maps)
