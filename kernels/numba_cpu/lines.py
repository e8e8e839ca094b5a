"""The lines of a map as matrices, their energies and softmax weights: the steps that the CPU kernels are made of.

A thread computes a group of lines of an axis at a time. A line is a matrix: a row for each position, with the channels
side by side. These rows are the map's own memory if it is channels-last and its channels fill whole vectors; otherwise
they are gathered into a buffer, some channels at a time, by transposing tiles in registers. Where positions are side by
side in memory (NCHW), a group is many neighbouring columns, so that long pieces of memory are gathered.

All functions are compiled by Numba when first called. Addresses and strides are in bytes, and a row of a buffer is
padded to whole vectors. `like` is any number of the arithmetic's dtype, float32 or float64, and `kept` one of the type
that stands for the maps' dtype in memory (conversions.py): maps of 16 bits are gathered into a buffer in any layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numba.extending import register_jitable

from ccgpu.kernels.numba_cpu.matrices import Factors, Matrix, add_product, compiled, copy, filled_up, transpose
from ccgpu.kernels.numba_cpu.vectors import VECTOR_BYTES, exponentials, fill_padding, load, maximum, size_of, store

# Bytes of exponentials that are summed in one vector; such sums are added. A longer chain of additions loses digits.
SUMMED = 32 * VECTOR_BYTES


class Map(NamedTuple):
    """A map (images, positions, channels): its address, and the stride of each axis."""

    address: int
    image: int
    position: int
    channel: int


class Axis(NamedTuple):
    """The lines along an axis, and how they are divided into groups.

    Line (outer, i) of an image consists of the positions outer * length * inner + n * inner + i, n = 0 ... length - 1.
    """

    length: int
    inner: int
    outer: int
    groups: int  # groups that the `inner` lines with the same `outer` are divided into
    lines: int  # most lines in a group
    parts: int  # parts that the positions of a line are divided into, each in a group of its own; see `group_at`
    queries: int  # queries of a line whose energies are in memory at once
    chunk: int  # channels of v processed at once
    crossing: int  # lines through a position: the position itself counts 1 / crossing on each of them
    first: bool  # the first axis to run writes results, the others add to them
    last: bool
    slot: int  # index, among a position's neighbours, of the first one on this axis
    skips: bool  # whether the position itself is left out of the neighbours on this axis
    strips: bool  # whether neighbouring lines are gathered together, as many as a group has


class Task(NamedTuple):
    """What a phase of backward computes of its groups, for queries first ... end of each line; see gradients.py."""

    first: int
    end: int
    columns: bool  # K^T of the group's keys, and V^T if the line is shared
    by_queries: bool  # P, dS and dQ of the group's queries
    by_keys: bool  # what the queries add to dK and dV of the group's keys
    shared: bool  # whether all threads work on one group of lines, whose sheets lie in memory that they share


class Group(NamedTuple):
    """Neighbouring lines of an axis, or a part of each: `length` positions of every line, from its `first` one on.

    The lines start at `lines` positions, from `position` of an image on.
    """

    image: int
    position: int
    lines: int
    first: int
    length: int


class Rows(NamedTuple):
    """A group's lines as matrices: the address, and the bytes from row to row and from line to line."""

    address: int
    row: int
    line: int


@compiled
def group_at(axis: Axis, number: int) -> Group:
    """Return group `number` of an axis, counted through all images: lines, or the part of them that it computes."""
    rest, part = divmod(number, axis.parts)
    rest, group = divmod(rest, axis.groups)
    image, outer = divmod(rest, axis.outer)
    start, end = axis.inner * group // axis.groups, axis.inner * (group + 1) // axis.groups
    line = Group(image, outer * axis.length * axis.inner + start, end - start, 0, axis.length)
    return share_of(line, part, axis.parts)


@compiled
def part_of(group: Group, first: int, length: int) -> Group:
    """Return `length` positions, from `first` on, of each of a group's lines."""
    return Group(group.image, group.position, group.lines, first, length)


@compiled
def share_of(group: Group, number: int, parts: int) -> Group:
    """Return part `number` of a group whose positions are divided into `parts` parts."""
    first, end = group.length * number // parts, group.length * (number + 1) // parts
    return part_of(group, group.first + first, end - first)


@compiled
def position_of(axis: Axis, positions: int, group: Group, line: int, row: int) -> int:
    """Return the index of a position of a group, row `row` of line `line`, counted through images of `positions`."""
    return group.image * positions + group.position + line + (group.first + row) * axis.inner


@compiled
def padded(like: Any, count: int) -> int:
    """Return the bytes of a buffer's row of `count` numbers, padded to whole vectors."""
    return filled_up(count * size_of(like))


@compiled
def chunks(like: Any, axis: Axis, channels: int) -> Iterator[tuple[int, int]]:
    """Yield the first channel and the number of channels of each chunk: whole vectors, then the rest.

    Chunks of whole vectors need no gathering where the map is channels-last.
    """
    lanes, start = VECTOR_BYTES // size_of(like), 0
    while start < channels:
        count = min(axis.chunk, channels - start)
        if count > lanes:
            count = count // lanes * lanes
        yield start, count
        start += count


@compiled
def in_place(like: Any, kept: Any, x: Map, channels: int) -> bool:
    """Tell whether rows of `channels` channels can be used in the map's own memory, without a buffer."""
    return (
        size_of(kept) == size_of(like) and x.channel == size_of(like) and channels * size_of(like) % VECTOR_BYTES == 0
    )


@register_jitable
def address_of(x: Map, axis: Axis, group: Group, start: int) -> int:
    """Return the address of channel `start` of the first position of a group."""
    first = group.position + group.first * axis.inner
    return x.address + group.image * x.image + first * x.position + start * x.channel


@compiled
def gather(like: Any, kept: Any, x: Map, axis: Axis, group: Group, start: int, channels: int, rows: Rows) -> None:
    """Fill rows in a buffer with channels `start` ... `start` + `channels` of a group's positions."""
    step = axis.inner * x.position
    here = address_of(x, axis, group, start)
    if x.channel == size_of(kept):
        for m in range(group.lines):
            for n in range(group.length):
                target = rows.address + m * rows.line + n * rows.row
                copy(kept, like, here + m * x.position + n * step, channels, target)
    elif axis.inner == 1:
        transpose(kept, like, here, x.channel, channels, group.length, rows.address, rows.row)
    else:
        for n in range(group.length):
            target = rows.address + n * rows.row
            transpose(kept, like, here + n * step, x.channel, channels, group.lines, target, rows.line)


@compiled
def rows_of(
    like: Any, kept: Any, x: Map, axis: Axis, group: Group, start: int, channels: int, buffer: int, reads: bool
) -> Rows:
    """Return channels `start` ... `start` + `channels` of a group's positions: in the map's memory or in the buffer.

    Without `reads`, the buffer is not filled, because the caller overwrites all of it.
    """
    if in_place(like, kept, x, channels):
        return Rows(address_of(x, axis, group, start), axis.inner * x.position, x.position)
    row = padded(like, channels)
    rows = Rows(buffer, row, group.length * row)
    if reads:
        gather(like, kept, x, axis, group, start, channels, rows)
    return rows


@compiled
def put_rows(like: Any, kept: Any, rows: Rows, x: Map, axis: Axis, group: Group, start: int, channels: int) -> None:
    """Write rows that `rows_of` returned back to the map, if they are in a buffer."""
    step = axis.inner * x.position
    here = address_of(x, axis, group, start)
    if in_place(like, kept, x, channels):
        return
    if x.channel == size_of(kept):
        for m in range(group.lines):
            for n in range(group.length):
                source = rows.address + m * rows.line + n * rows.row
                copy(like, kept, source, channels, here + m * x.position + n * step)
    elif axis.inner == 1:
        transpose(like, kept, rows.address, rows.row, group.length, channels, here, x.channel)
    else:
        for n in range(group.length):
            source = rows.address + n * rows.row
            transpose(like, kept, source, rows.line, group.lines, channels, here + n * step, x.channel)


@compiled
def matrix_of(like: Any, rows: Rows, line: int, row: int) -> Matrix:
    """Return the rows of a line, from `row` on, as a matrix."""
    return Matrix(rows.address + line * rows.line + row * rows.row, rows.row, size_of(like))


@compiled
def no_factors() -> Factors:
    """Return Factors that stand for none. As literals they would make Numba compile each callee once more for them."""
    return Factors(np.int64(0), np.int64(0))


@compiled
def columns_of(like: Any, rows: Rows, axis: Axis, group: Group, channels: int, columns: int) -> None:
    """Write the transpose of a group's rows to their columns of matrices (channels, keys), one for each line."""
    row = padded(like, axis.length)
    for m in range(group.lines):
        target = columns + m * channels * row + group.first * size_of(like)
        transpose(like, like, rows.address + m * rows.line, rows.row, group.length, channels, target, row)


@compiled
def energies(
    like: Any,
    q: Rows,
    k_columns: int,
    axis: Axis,
    group: Group,
    depth: int,
    sheets: int,
    scale: int,
) -> None:
    """Write the energies scale Q K^T of a group's queries to the sheet (queries, keys) of each line.

    q are the group's rows, k_columns is the address to which `columns_of` wrote all keys; scale is an address too.
    """
    row, one_for_all, none = padded(like, axis.length), np.int64(0), no_factors()
    for m in range(group.lines):
        columns = Matrix(k_columns + m * depth * row, row, size_of(like))
        sheet = Matrix(sheets + m * axis.queries * row, row, size_of(like))
        factor = Factors(scale, one_for_all)
        queries = matrix_of(like, q, m, one_for_all)
        add_product(like, group.length, axis.length, depth, queries, columns, sheet, factor, none)


@compiled
def exponentials_of(like: Any, row: int, keys: int, own: int, crossing: int, offset: Any) -> Any:
    """Replace a query's energies by exp(E - offset) and return the sum; its own key's counts 1 / crossing of that.

    The padding of the row must be -inf.
    """
    row_sum, size = type(like)(0), padded(like, keys)
    for start in range(0, size, SUMMED):
        row_sum += exponentials(like, row + start, min(SUMMED, size - start), offset)
    here = row + own * size_of(like)
    centre = load(like, here)
    share = centre / type(like)(crossing)
    store(here, share)
    return row_sum - (centre - share)


@compiled
def weigh(like: Any, row: int, keys: int, own: int, crossing: int) -> tuple[Any, Any]:
    """Replace a query's energies by exp(E - row_max), as `exponentials_of` does; return row_max and row_sum."""
    fill_padding(like, row, keys, type(like)(-np.inf))
    row_max = maximum(like, row, padded(like, keys))
    # Where all energies are -inf, an offset of 0 gives weights and a sum of 0; -inf - -inf would be NaN.
    offset = row_max if row_max > -np.inf else type(like)(0)
    return row_max, exponentials_of(like, row, keys, own, crossing, offset)
