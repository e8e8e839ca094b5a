"""What the CPU kernels do with the lines of a map: rows of a group of lines, products of matrices, softmax weights.

A worker takes the lines of an axis by groups. The rows of a line are its positions: a matrix with the channels side by
side. They are the map's own memory where it is channels-last and its channels fill whole vectors; else they are
gathered into a buffer, some channels at a time, by transposing tiles in registers. Where positions are side by side in
memory (NCHW), a group is many neighbouring columns, so that long pieces of memory are gathered.

All functions are compiled by Numba when first called. Addresses and strides are in bytes, a `row` of a buffer is filled
up to whole vectors, and `like` is any number of the dtype, float32 or float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ccgpu.kernels.numba_cpu.matrices import Factors, Matrix, add_product, compiled, copy, filled_up, transpose
from ccgpu.kernels.numba_cpu.vectors import VECTOR_BYTES, exponentials, largest_of, load, size_of, store


class Map(NamedTuple):
    """An array (images, positions, channels): its address and strides."""

    address: int
    image: int
    position: int
    channel: int


class Axis(NamedTuple):
    """The lines along an axis, dealt out to groups.

    Line (outer, i) of an image is its positions outer * length * inner + n * inner + i, n = 0 ... length - 1.
    """

    length: int
    inner: int
    outer: int
    groups: int  # to which the `inner` lines with the same `outer` are dealt out
    lines: int  # of a group, at most
    queries: int  # of a line whose energies are held at a time
    chunk: int  # channels of values taken at a time
    crossing: int  # lines through a position: each has as large a share of the centre
    first: bool  # of the axes that are run: it writes what the others add to
    last: bool
    slot: int  # the number among a position's neighbours of its line's first
    skips: bool  # whether the centre is left out of the neighbours on this axis


class Group(NamedTuple):
    """Neighbouring lines of an axis: those through `lines` positions from `position` of an image on."""

    image: int
    position: int
    lines: int


class Rows(NamedTuple):
    """The positions of a group's lines as matrices: the address, and the bytes from row to row and line to line."""

    address: int
    row: int
    line: int


@compiled
def group_at(axis: Axis, number: int) -> Group:
    """Return a group of an axis, counted through all images."""
    rest, group = divmod(number, axis.groups)
    image, outer = divmod(rest, axis.outer)
    start, end = axis.inner * group // axis.groups, axis.inner * (group + 1) // axis.groups
    return Group(image, outer * axis.length * axis.inner + start, end - start)


@compiled
def padded(like: Any, count: int) -> int:
    """Return the bytes of so many numbers in a row of a buffer."""
    return filled_up(count * size_of(like))


@compiled
def chunks(like: Any, axis: Axis, channels: int) -> Iterator[tuple[int, int]]:
    """Yield the first channel and the number of each chunk: whole vectors, which may be in place, then what is left."""
    lanes, start = VECTOR_BYTES // size_of(like), 0
    while start < channels:
        count = min(axis.chunk, channels - start)
        if count > lanes:
            count = count // lanes * lanes
        yield start, count
        start += count


@compiled
def in_place(like: Any, x: Map, channels: int) -> bool:
    """Tell whether rows of so many channels of a map are matrices where they are."""
    return x.channel == size_of(like) and channels * size_of(like) % VECTOR_BYTES == 0


@compiled
def rows_of(like: Any, x: Map, axis: Axis, group: Group, start: int, channels: int, buffer: int, reads: bool) -> Rows:
    """Return the rows of a group's lines, channels `start` ... `start` + `channels`: in place or in the buffer.

    With `reads` false the buffer is only given its shape: all of it will be written.
    """
    here = x.address + group.image * x.image + group.position * x.position + start * x.channel
    step, size = axis.inner * x.position, size_of(like)
    if in_place(like, x, channels):
        return Rows(here, step, x.position)
    row = padded(like, channels)
    line = axis.length * row
    if not reads:
        return Rows(buffer, row, line)
    if x.position != size:
        for m in range(group.lines):
            for n in range(axis.length):
                copy(like, here + m * x.position + n * step, x.channel, channels, buffer + m * line + n * row, size)
    elif axis.inner == 1:
        transpose(like, here, x.channel, channels, axis.length, buffer, row)
    else:
        for n in range(axis.length):
            transpose(like, here + n * step, x.channel, channels, group.lines, buffer + n * row, line)
    return Rows(buffer, row, line)


@compiled
def put_rows(like: Any, rows: Rows, x: Map, axis: Axis, group: Group, start: int, channels: int) -> None:
    """Bring rows, as `rows_of` gave them, to the map, where they are not in place."""
    here = x.address + group.image * x.image + group.position * x.position + start * x.channel
    step, size = axis.inner * x.position, size_of(like)
    if in_place(like, x, channels):
        return
    if x.position != size:
        for m in range(group.lines):
            for n in range(axis.length):
                source = rows.address + m * rows.line + n * rows.row
                copy(like, source, size, channels, here + m * x.position + n * step, x.channel)
    elif axis.inner == 1:
        transpose(like, rows.address, rows.row, axis.length, channels, here, x.channel)
    else:
        for n in range(axis.length):
            transpose(like, rows.address + n * rows.row, rows.line, group.lines, channels, here + n * step, x.channel)


@compiled
def matrix_of(like: Any, rows: Rows, line: int, row: int) -> Matrix:
    """Return the rows of a line from one on as a matrix."""
    return Matrix(rows.address + line * rows.line + row * rows.row, rows.row, size_of(like))


@compiled
def no_factors() -> Factors:
    """Return what stands for no factors; not literals, for which Numba would compile what they are passed to anew."""
    return Factors(np.int64(0), np.int64(0))


@compiled
def columns_of(like: Any, rows: Rows, axis: Axis, group: Group, channels: int, columns: int) -> None:
    """Write the transposed rows of each line, (channels, keys), one line behind the other."""
    row = padded(like, axis.length)
    for m in range(group.lines):
        target = columns + m * channels * row
        transpose(like, rows.address + m * rows.line, rows.row, axis.length, channels, target, row)


@compiled
def energies(
    like: Any,
    q: Rows,
    k_columns: int,
    axis: Axis,
    group: Group,
    depth: int,
    query: int,
    count: int,
    sheets: int,
    scale: int,
) -> None:
    """Write scale Q K^T of `count` queries of each line, from `query` on, to the line's sheet (queries, keys).

    k_columns is the address of what `columns_of` wrote; scale is an address too.
    """
    row, one_for_all, none = padded(like, axis.length), np.int64(0), no_factors()
    for m in range(group.lines):
        columns = Matrix(k_columns + m * depth * row, row, size_of(like))
        sheet = Matrix(sheets + m * axis.queries * row, row, size_of(like))
        factor = Factors(scale, one_for_all)
        add_product(like, count, axis.length, depth, matrix_of(like, q, m, query), columns, sheet, factor, none)


@compiled
def exponentials_of(like: Any, row: int, keys: int, own: int, crossing: int, offset: Any) -> Any:
    """Turn a query's energies into exp(E - offset), its own key's into its share of that; return their sum.

    What fills up the row must be -inf.
    """
    total = exponentials(like, row, padded(like, keys), offset)
    here = row + own * size_of(like)
    centre = load(like, here)
    share = centre / type(like)(crossing)
    store(here, share)
    return total - (centre - share)


@compiled
def weigh(like: Any, row: int, keys: int, own: int, crossing: int) -> tuple[Any, Any]:
    """Turn a query's energies into exp(E - largest), its own key's into its share; return the largest and the sum."""
    size, end = size_of(like), padded(like, keys)
    for j in range(keys, end // size):
        store(row + j * size, type(like)(-np.inf))
    largest = largest_of(like, row, end)
    # All -inf: no weights, and a sum of 0.
    return largest, exponentials_of(like, row, keys, own, crossing, largest if largest > -np.inf else type(like)(0))
