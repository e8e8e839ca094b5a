"""Lines of maps as matrices of bfloat16 numbers: in place, or gathered into a buffer.

Rows are the map's own memory where its channels are contiguous and fill whole words (what is only read), or whole
panels of 32 numbers (what is written). Otherwise they are gathered, and a row of the buffer is padded with zeros to
whole panels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numba.extending import register_jitable

from ccgpu.kernels.numba_cpu import lines
from ccgpu.kernels.numba_cpu.dot_products.instructions import NUMBERS
from ccgpu.kernels.numba_cpu.dot_products.interleaving import copy_row, gather, scatter
from ccgpu.kernels.numba_cpu.lines import Axis, Group, Map, Rows, address_of, part_of
from ccgpu.kernels.numba_cpu.matrices import called_by_symbol, compiled

SIZE = 2  # bytes of a number
PANEL_BYTES = 2**18  # of an interleaved line, of one that is not gathered with its neighbours: it stays in the cache
WORD, PANEL = 2, NUMBERS  # numbers that rows in place must be a multiple of, to be read and to be written


@register_jitable
def up(count: int, multiple: int) -> int:
    """Return `count` rounded up to a multiple."""
    return (count + multiple - 1) // multiple * multiple


@register_jitable
def buffer_row(channels: int) -> int:
    """Return the bytes of a row of `channels` numbers in a buffer."""
    return up(channels, PANEL) * SIZE


@register_jitable
def buffer_size(axis: Axis, channels: int) -> int:
    """Return the bytes of a buffer for a group's rows, with room for what `gather` writes besides."""
    lines = 1 if axis.inner == 1 else up(axis.lines, 16)
    return lines * up(axis.length, 16) * buffer_row(channels)


@register_jitable
def chunk_of(axis: Axis) -> int:
    """Return how many channels are processed at once: whole panels, which an interleaved line has room for.

    dO V^T is summed chunk by chunk, so this must not depend on the number of threads, unlike the lines of a group.
    """
    most = axis.chunk if axis.strips else PANEL_BYTES // (axis.length * SIZE)
    return max(PANEL, most // PANEL * PANEL)


@compiled
def share_of(group: Group, number: int, parts: int, multiple: int) -> Group:
    """Return part `number` of a group's positions in `parts` parts, which begin at multiples from the first one on."""
    units = part_of(group, np.int64(0), up(group.length, multiple) // multiple)
    share = lines.share_of(units, number, parts)
    first = share.first * multiple
    return part_of(group, group.first + first, min(group.length - first, share.length * multiple))


@compiled
def chunks(axis: Axis, channels: int) -> Iterator[tuple[int, int]]:
    """Yield the first channel and the number of channels of each chunk: whole panels, then the rest."""
    most = chunk_of(axis)
    for start in range(0, channels, most):
        yield start, min(most, channels - start)


@compiled
def in_place(x: Map, channels: int, multiple: int) -> bool:
    """Tell whether rows of `channels` channels can be used in the map's own memory, without a buffer."""
    return x.channel == SIZE and channels % multiple == 0


@compiled
def _copy(source: int, source_step: int, count: int, target: int, target_step: int, padded: int) -> None:
    """Copy `count` numbers, as many bytes apart as the steps say; fill up contiguous ones with zeros to `padded`."""
    if source_step == SIZE and target_step == SIZE:
        for start in range(0, padded, NUMBERS):
            copy_row(source + start * SIZE, count - start, target + start * SIZE, padded - start)
        return
    for n in range(padded):
        copy_row(source + n * source_step, 1 if n < count else 0, target + n * target_step, 1)


# Large functions, called by symbol; see matrices.py -------------------------------------------------------------------


def large_functions(source: str) -> tuple[Callable[..., None], ...]:
    """Return `gather_lines` and `scatter_lines` as plain functions; see `matrices.large_functions`."""

    def gather_lines(
        x: int,
        x_position: int,
        x_channel: int,
        x_row: int,
        lines: int,
        length: int,
        channels: int,
        rows: int,
        row: int,
        line: int,
    ) -> None:
        """Copy lines of a map to rows of a buffer.

        Args:
            x, x_position, x_channel, x_row: address of the first number; bytes from one position to the next, from
                channel to channel, and from one position of a line to the next.
            lines, length, channels: numbers of lines, of positions of a line, and of channels.
            rows, row, line: address of the buffer, bytes from row to row and from line to line.
        """
        source  # noqa: B018
        if x_position != SIZE or x_channel == SIZE:
            for m in range(lines):
                for n in range(length):
                    here, there = x + m * x_position + n * x_row, rows + m * line + n * row
                    _copy(here, x_channel, channels, there, SIZE, row // SIZE)
        elif x_row == x_position:
            gather(x, x_channel, channels, length, rows, row)
        else:
            for n in range(length):
                gather(x + n * x_row, x_channel, channels, lines, rows + n * row, line)

    def scatter_lines(
        x: int,
        x_position: int,
        x_channel: int,
        x_row: int,
        lines: int,
        length: int,
        channels: int,
        rows: int,
        row: int,
        line: int,
    ) -> None:
        """Copy rows of a buffer to lines of a map: the inverse of `gather_lines`."""
        source  # noqa: B018
        if x_position != SIZE or x_channel == SIZE:
            for m in range(lines):
                for n in range(length):
                    here, there = rows + m * line + n * row, x + m * x_position + n * x_row
                    _copy(here, SIZE, channels, there, x_channel, channels)
        elif x_row == x_position:
            scatter(rows, row, length, channels, x, x_channel)
        else:
            for n in range(length):
                scatter(rows + n * row, line, lines, channels, x + n * x_row, x_channel)

    return gather_lines, scatter_lines


gather_lines, scatter_lines = map(called_by_symbol, large_functions(""))


@register_jitable  # which, unlike `compiled`, compiles it once and not for each literal among its arguments
def rows_of(
    x: Map, axis: Axis, group: Group, start: int, channels: int, buffer: int, multiple: int, reads: bool
) -> Rows:
    """Return channels `start` ... `start` + `channels` of a group's lines: in the map's memory or in the buffer.

    Without `reads`, the buffer is not filled, because the caller overwrites all of it.
    """
    step = axis.inner * x.position
    here = address_of(x, axis, group, start)
    if in_place(x, channels, multiple):
        return Rows(here, step, x.position)
    row = buffer_row(channels)
    line = up(group.length, 16) * row
    if not reads:
        return Rows(buffer, row, line)
    gather_lines(here, x.position, x.channel, step, group.lines, group.length, channels, buffer, row, line)
    return Rows(buffer, row, line)


@compiled
def put_rows(rows: Rows, x: Map, axis: Axis, group: Group, start: int, channels: int) -> None:
    """Write rows of whole panels that `rows_of` returned back to the map, if they are in a buffer."""
    if in_place(x, channels, PANEL):
        return
    step = axis.inner * x.position
    here = address_of(x, axis, group, start)
    lines, length = group.lines, group.length
    scatter_lines(here, x.position, x.channel, step, lines, length, channels, rows.address, rows.row, rows.line)
