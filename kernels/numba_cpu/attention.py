"""Forward and backward of criss-cross attention on the CPU, for a group of lines of an axis at a time.

Forward, axis after axis:    E = scale Q K^T; row_max and row_sum = sum of exp(E - row_max) are merged with those of the
                             earlier axes; out = before out + factor exp(E - row_max) V.
Backward, axis after axis:   P = exp(E - lse), dP = dO V^T, dS = P (dP - delta), with delta_u = dout_u . out_u - dlse_u;
                             dQ += scale dS K, dK += scale dS^T Q, dV += P^T dO.

A sheet holds the energies of a line in memory, of all its queries or, where lines are long, of some at a time. A group
only writes to the positions of its own lines, so the groups of an axis may run at the same time and in any order: the
results are the same to the bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba.extending import register_jitable

from ccgpu.kernels.numba_cpu.lines import (
    Axis,
    Group,
    Map,
    Rows,
    chunks,
    columns_of,
    energies,
    exponentials_of,
    group_at,
    matrix_of,
    no_factors,
    padded,
    put_rows,
    rows_of,
    weigh,
)
from ccgpu.kernels.numba_cpu.matrices import Factors, Matrix, add_product, compiled, filled_up
from ccgpu.kernels.numba_cpu.vectors import VECTOR_BYTES, dot, load, size_of, store, subtract_and_multiply


class Sizes(NamedTuple):
    """Sizes of a problem, and its scale."""

    positions: int  # positions of an image
    depth: int  # channels of q and k
    channels: int  # channels of v
    scale: float
    neighbours: int  # neighbours of a position, including itself
    width: int  # length of the last axis


class Memory(NamedTuple):
    """Offsets of the parts of a thread's memory: buffers for a group's lines and for what is computed from them."""

    energies: int  # a sheet (queries, keys) for each line: energies, then weights
    gradients: int  # sheets as well: gradients of the weights, then of the energies
    k_columns: int  # K^T (depth, keys) of each line
    v_columns: int  # V^T (chunk, keys) of each line, of one chunk of channels
    q: int  # rows of the lines, here and in the next six
    k: int
    dq: int
    dk: int
    dout: int
    v: int
    out: int  # in backward: out, then dv
    factors: int  # a number for each query: the factor of this axis's part of out
    befores: int  # likewise, of what the earlier axes have written to out
    scale: int  # a single number
    one: int  # the number 1
    end: int


@register_jitable
def divide_memory(axis: Axis, sizes: Sizes, size: int, backward: bool) -> Memory:
    """Return where the parts of a thread's memory begin, for numbers of `size` bytes."""
    key_row, lines, positions = filled_up(axis.length * size), axis.lines, axis.lines * axis.length
    chunk = min(axis.chunk, sizes.channels)
    gradients = lines * axis.queries * key_row
    k_columns = gradients + (gradients if backward else 0)
    v_columns = k_columns + lines * sizes.depth * key_row
    q = v_columns + (lines * chunk * key_row if backward else 0)
    a_map, a_chunk = positions * filled_up(sizes.depth * size), positions * filled_up(chunk * size)
    k = q + a_map
    dq = k + a_map
    dk = dq + (a_map if backward else 0)
    dout = dk + (a_map if backward else 0)
    v = dout + (a_chunk if backward else 0)
    out = v + a_chunk
    factors = out + a_chunk
    befores = factors + lines * axis.queries * size
    scale = befores + lines * axis.queries * size
    one, end = scale + size, scale + 2 * size
    return Memory(0, gradients, k_columns, v_columns, q, k, dq, dk, dout, v, out, factors, befores, scale, one, end)


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
    zero, lowest = type(like)(0), type(like)(-np.inf)
    old_max = lowest if axis.first else load(like, row_maxima + at)
    merged_max = max(row_max, old_max)
    offset = merged_max if merged_max > lowest else zero
    factor = np.exp(row_max - offset)
    before = zero if axis.first else load(like, row_sums + at) * np.exp(old_max - offset)
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
        like: a number of the dtype of q, k, v and out.
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
        q_rows = rows_of(like, q, axis, group, none, depth, memory + at.q, reads)
        k_rows = rows_of(like, k, axis, group, none, depth, memory + at.k, reads)
        columns_of(like, k_rows, axis, group, depth, memory + at.k_columns)
        for query in range(0, length, queries):
            count = min(queries, length - query)
            energies(
                like,
                q_rows,
                memory + at.k_columns,
                axis,
                group,
                depth,
                query,
                count,
                memory + at.energies,
                memory + at.scale,
            )
            for m in range(group.lines):
                for i in range(count):
                    row = memory + at.energies + m * sheet + i * key_row
                    row_max, row_sum = weigh(like, row, length, query + i, axis.crossing)
                    position = group.image * sizes.positions + group.position + m + (query + i) * axis.inner
                    place = position * size
                    factor, before = merge(like, axis, place, row_max, row_sum, lse, row_maxima, row_sums)
                    store(memory + at.factors + (m * queries + i) * size, factor)
                    store(memory + at.befores + (m * queries + i) * size, before)
            for start, channels in chunks(like, axis, sizes.channels):
                v_rows = rows_of(like, v, axis, group, start, channels, memory + at.v, reads)
                adds = not axis.first or query > 0
                out_rows = rows_of(like, out, axis, group, start, channels, memory + at.out, adds)
                for m in range(group.lines):
                    add_product(
                        like,
                        count,
                        channels,
                        length,
                        Matrix(memory + at.energies + m * sheet, key_row, size),
                        matrix_of(like, v_rows, m, none),
                        matrix_of(like, out_rows, m, query),
                        Factors(memory + at.factors + m * queries * size, size),
                        Factors(none if axis.first else memory + at.befores + m * queries * size, size),
                    )
                put_rows(like, out_rows, out, axis, group, start, channels)


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
def _weight_gradients(
    like: Any,
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
    delta: int,
) -> None:
    """Write dP = dO V^T for `count` queries from `query` on; on the first axis, add dout . out to delta."""
    size, key_row, reads, none = size_of(like), padded(like, axis.length), np.bool_(True), np.int64(0)
    sheet, one = axis.queries * key_row, Factors(memory + at.one, none)
    for start, channels in chunks(like, axis, sizes.channels):
        dout_rows = rows_of(like, dout, axis, group, start, channels, memory + at.dout, reads)
        v_rows = rows_of(like, v, axis, group, start, channels, memory + at.v, reads)
        columns_of(like, v_rows, axis, group, channels, memory + at.v_columns)
        for m in range(group.lines):
            add_product(
                like,
                count,
                axis.length,
                channels,
                matrix_of(like, dout_rows, m, query),
                Matrix(memory + at.v_columns + m * channels * key_row, key_row, size),
                Matrix(memory + at.gradients + m * sheet, key_row, size),
                one,
                no_factors() if start == 0 else one,
            )
        if axis.first:
            out_rows = rows_of(like, out, axis, group, start, channels, memory + at.out, reads)
            for m in range(group.lines):
                for i in range(query, query + count):
                    a = dout_rows.address + m * dout_rows.line + i * dout_rows.row
                    b = out_rows.address + m * out_rows.line + i * out_rows.row
                    add_dot(like, delta + (m + i * axis.inner) * size, a, b, channels)


@compiled
def _query_and_key_gradients(
    like: Any,
    axis: Axis,
    sizes: Sizes,
    group: Group,
    query: int,
    count: int,
    memory: int,
    at: Memory,
    q: Rows,
    k: Rows,
    dq: Rows,
    dk: Rows,
) -> None:
    """Add scale dS K to dq and scale dS^T Q to dk, for `count` queries from `query` on."""
    size, key_row, none = size_of(like), padded(like, axis.length), np.int64(0)
    scale, one = Factors(memory + at.scale, none), Factors(memory + at.one, none)
    for m in range(group.lines):
        sheet = memory + at.gradients + m * axis.queries * key_row
        add_product(
            like,
            count,
            sizes.depth,
            axis.length,
            Matrix(sheet, key_row, size),
            matrix_of(like, k, m, none),
            matrix_of(like, dq, m, query),
            scale,
            no_factors() if axis.first else one,
        )
        add_product(
            like,
            axis.length,
            sizes.depth,
            count,
            Matrix(sheet, size, key_row),
            matrix_of(like, q, m, query),
            matrix_of(like, dk, m, none),
            scale,
            no_factors() if axis.first and query == 0 else one,
        )


@compiled
def _value_gradients(
    like: Any,
    axis: Axis,
    sizes: Sizes,
    group: Group,
    query: int,
    count: int,
    memory: int,
    at: Memory,
    dout: Map,
    dv: Map,
) -> None:
    """Add P^T dO to dv, for `count` queries from `query` on."""
    size, key_row, reads, none = size_of(like), padded(like, axis.length), np.bool_(True), np.int64(0)
    one, adds = Factors(memory + at.one, none), not axis.first or query > 0
    for start, channels in chunks(like, axis, sizes.channels):
        dout_rows = rows_of(like, dout, axis, group, start, channels, memory + at.dout, reads)
        dv_rows = rows_of(like, dv, axis, group, start, channels, memory + at.out, adds)
        for m in range(group.lines):
            add_product(
                like,
                axis.length,
                channels,
                count,
                Matrix(memory + at.energies + m * axis.queries * key_row, size, key_row),
                matrix_of(like, dout_rows, m, query),
                matrix_of(like, dv_rows, m, none),
                one,
                one if adds else no_factors(),
            )
        put_rows(like, dv_rows, dv, axis, group, start, channels)


@compiled
def backward_groups(
    like: Any,
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
    delta: int,
    dq: Map,
    dk: Map,
    dv: Map,
) -> None:
    """Compute backward for groups begin ... end of an axis.

    Args:
        like, begin, end, memory, axis, sizes: as in `forward_groups`.
        dout, q, k, v, out, dq, dk, dv: maps of like's dtype.
        lse: address of an array (images, positions).
        delta: address of such an array that holds -dlse; the first axis adds dout . out to it.
    """
    size, length, depth, queries = size_of(like), axis.length, sizes.depth, axis.queries
    none, reads, adds = np.int64(0), np.bool_(True), not axis.first
    at = divide_memory(axis, sizes, size, True)
    key_row = padded(like, length)
    sheet = queries * key_row
    store(memory + at.scale, type(like)(sizes.scale))
    store(memory + at.one, type(like)(1))
    for number in range(begin, end):
        group = group_at(axis, number)
        q_rows = rows_of(like, q, axis, group, none, depth, memory + at.q, reads)
        k_rows = rows_of(like, k, axis, group, none, depth, memory + at.k, reads)
        dq_rows = rows_of(like, dq, axis, group, none, depth, memory + at.dq, adds)
        dk_rows = rows_of(like, dk, axis, group, none, depth, memory + at.dk, adds)
        columns_of(like, k_rows, axis, group, depth, memory + at.k_columns)
        first = (group.image * sizes.positions + group.position) * size
        for query in range(0, length, queries):
            count = min(queries, length - query)
            energies(
                like,
                q_rows,
                memory + at.k_columns,
                axis,
                group,
                depth,
                query,
                count,
                memory + at.energies,
                memory + at.scale,
            )
            for m in range(group.lines):
                for i in range(count):
                    row = memory + at.energies + m * sheet + i * key_row
                    offset = load(like, lse + first + (m + (query + i) * axis.inner) * size)
                    exponentials_of(like, row, length, query + i, axis.crossing, offset)
            _weight_gradients(like, axis, sizes, group, query, count, memory, at, dout, v, out, delta + first)
            for m in range(group.lines):
                for i in range(count):
                    row = m * sheet + i * key_row
                    offset = load(like, delta + first + (m + (query + i) * axis.inner) * size)
                    subtract_and_multiply(
                        like, memory + at.gradients + row, memory + at.energies + row, key_row, offset
                    )
            _query_and_key_gradients(
                like, axis, sizes, group, query, count, memory, at, q_rows, k_rows, dq_rows, dk_rows
            )
            _value_gradients(like, axis, sizes, group, query, count, memory, at, dout, dv)
        put_rows(like, dq_rows, dq, axis, group, none, depth)
        put_rows(like, dk_rows, dk, axis, group, none, depth)
