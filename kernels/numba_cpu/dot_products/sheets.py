"""Memory of backward in bfloat16: what is computed from lines, a thread's own or shared by all threads.

A thread that has lines to itself keeps dP and P of all lines of a group, and everything else of one line at a time, of
one chunk of channels. Where all threads share lines, some of them compute what others read, so memory holds everything
of all lines of the group: K^T, V^T and K interleaved, and for some queries Q and dO interleaved, P and dS.
"""

from __future__ import annotations

from typing import NamedTuple

from numba.extending import register_jitable

from ccgpu.kernels.numba_cpu.attention import Sizes
from ccgpu.kernels.numba_cpu.dot_products.forward import FLOAT, QUERIES, columns_panel
from ccgpu.kernels.numba_cpu.dot_products.instructions import LANES
from ccgpu.kernels.numba_cpu.dot_products.multiplication import PANEL_ROW
from ccgpu.kernels.numba_cpu.dot_products.rows import PANEL, SIZE, buffer_size, chunk_of, up
from ccgpu.kernels.numba_cpu.lines import Axis
from ccgpu.kernels.numba_cpu.matrices import compiled
from ccgpu.kernels.numba_cpu.vectors import VECTOR_BYTES


class Memory(NamedTuple):
    """Offsets of the parts of a thread's memory; those from `weights` on may lie in memory that all threads share."""

    energies: int  # energies (QUERIES, keys) of some queries, float32
    q: int  # rows of the lines, here and in the next six
    k: int
    dq: int
    dk: int
    dout: int
    v: int
    out: int  # out, then dv
    scale: int  # a single number
    weights: int  # the parts of Sheets, here and in the next nine
    rows: int
    words: int
    k_columns: int
    v_columns: int
    k_panels: int
    q_panels: int
    dout_panels: int
    dk_sums: int
    dv_sums: int
    end: int


class Sheets(NamedTuple):
    """Addresses of what is computed from a line and some of its queries, and of what is computed from that."""

    weights: int  # dP (queries, keys), float32, then P, the words of two queries in the place of the first
    rows: int  # dS (queries, keys)
    words: int  # dS, the words of two queries
    k_columns: int  # panels of K^T
    v_columns: int  # panels of V^T
    k_panels: int  # K interleaved
    q_panels: int  # Q of the queries, interleaved
    dout_panels: int  # dO of the queries, interleaved
    dk_sums: int  # float32 sums (keys, channels), if the line is computed some queries at a time
    dv_sums: int


@register_jitable
def columns_size(axis: Axis, channels: int) -> int:
    """Return the bytes of the panels of `channels` channels of a line, transposed."""
    return up(axis.length, PANEL) // PANEL * columns_panel(channels)


@register_jitable
def panel_size(rows: int) -> int:
    """Return the bytes of a panel of interleaved rows."""
    return (rows + 1) // 2 * PANEL_ROW


@register_jitable
def panels_size(rows: int, channels: int) -> int:
    """Return the bytes of the panels of interleaved rows of `channels` channels."""
    return up(channels, PANEL) // PANEL * panel_size(rows)


@register_jitable
def sums_size(axis: Axis, channels: int) -> int:
    """Return the bytes of the float32 sums of a line's keys, whole panels of channels."""
    return axis.length * up(channels, PANEL) * FLOAT


@register_jitable
def divide_memory(axis: Axis, sizes: Sizes, shared: bool) -> Memory:
    """Return where the parts of memory begin: of a thread's own or, from `weights` on, of that which threads share."""
    keys, chunk = up(axis.length, LANES), min(chunk_of(axis), sizes.channels)
    queries, wide = up(axis.queries, 2), max(chunk, sizes.depth)
    at_once = axis.lines if shared else 1
    a_map, a_chunk = buffer_size(axis, sizes.depth), buffer_size(axis, chunk)
    q = QUERIES * keys * FLOAT
    k, dq, dk, dout = q + a_map, q + 2 * a_map, q + 3 * a_map, q + 4 * a_map
    v, out = dout + a_chunk, dout + 2 * a_chunk
    scale = out + a_chunk
    weights = up(scale + FLOAT, VECTOR_BYTES)
    rows = weights + axis.lines * queries * keys * FLOAT
    words = rows + at_once * queries * keys * SIZE
    k_columns = words + at_once * queries * keys * SIZE
    if shared:
        v_columns = k_columns + axis.lines * columns_size(axis, sizes.depth)
        k_panels = v_columns + axis.lines * columns_size(axis, sizes.channels)
        q_panels = k_panels + axis.lines * panels_size(axis.length, sizes.depth)
        dout_panels = q_panels + axis.lines * panels_size(axis.queries, sizes.depth)
        dk_sums = dout_panels + axis.lines * panels_size(axis.queries, sizes.channels)
    else:  # one after the other in the same place
        v_columns = k_columns
        k_panels = k_columns + columns_size(axis, wide)
        q_panels = k_panels
        dout_panels = k_panels
        dk_sums = k_panels + panels_size(axis.length, wide)
    pieces = axis.queries < axis.length
    dv_sums = dk_sums + (axis.lines * sums_size(axis, sizes.depth) if pieces else 0)
    end = dv_sums + (axis.lines * sums_size(axis, sizes.channels) if pieces else 0)
    buffers = 0, q, k, dq, dk, dout, v, out, scale
    return Memory(
        *buffers, weights, rows, words, k_columns, v_columns, k_panels, q_panels, dout_panels, dk_sums, dv_sums, end
    )


def memory_of_a_shared_line(axis: Axis, sizes: Sizes) -> tuple[int, int]:
    """Return the bytes of memory of each thread and of all together; see `sharing.memory_of_a_shared_line`."""
    at = divide_memory(axis, sizes, True)
    return at.weights, at.end - at.weights


@compiled
def sheets_of(start: int, at: Memory, axis: Axis, sizes: Sizes, shared: bool, line: int, query: int) -> Sheets:
    """Return the sheets of a line of a group, from one of its queries in memory on, which begins a pair.

    Args:
        start: address that the offsets `at` count from.
        at: where the parts of memory begin.
        axis, sizes: of the problem.
        shared: whether all lines of the group have memory for what a thread otherwise computes line after line.
        line: number of the line in its group.
        query: number of the query among those in memory.
    """
    key_row = up(axis.length, LANES) * FLOAT
    sheet, place = up(axis.queries, 2) * key_row, query * key_row
    here = line if shared else 0
    return Sheets(
        start + at.weights + line * sheet + place,
        start + at.rows + (here * sheet + place) // 2,
        start + at.words + (here * sheet + place) // 2,
        start + at.k_columns + here * columns_size(axis, sizes.depth),
        start + at.v_columns + here * columns_size(axis, sizes.channels),
        start + at.k_panels + here * panels_size(axis.length, sizes.depth),
        start + at.q_panels + here * panels_size(axis.queries, sizes.depth) + panel_size(query),
        start + at.dout_panels + here * panels_size(axis.queries, sizes.channels) + panel_size(query),
        start + at.dk_sums + line * sums_size(axis, sizes.depth),
        start + at.dv_sums + line * sums_size(axis, sizes.channels),
    )
