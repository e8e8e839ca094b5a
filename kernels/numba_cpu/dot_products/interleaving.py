"""Rows of bfloat16 interleaved by pairs, into the panels that a product reads; transposes of words and of numbers.

Interleaving rows 2 p and 2 p + 1 of a matrix gives row p of words: word j is (x[2 p, j], x[2 p + 1, j]). The depth of a
product, over which it sums, then runs from row to row; a transpose of words makes panels of pairs that are already side
by side. Both together transpose a matrix of numbers: map memory in which positions are contiguous.

Nothing outside of the given rows and columns is read. What is missing in a vector, a word or a panel is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ccgpu.kernels.numba_cpu.dot_products.instructions import FLOATS, HALVES, LANES, NUMBERS, Pairs
from ccgpu.kernels.numba_cpu.dot_products.multiplication import PANEL_ROW
from ccgpu.kernels.numba_cpu.matrices import called_by_symbol
from ccgpu.kernels.numba_cpu.tiles import transposed
from ccgpu.kernels.numba_cpu.vectors import I64, VECTOR_BYTES, integer


@intrinsic
def interleave_pair(typingctx: Any, first: Any, second: Any, columns: Any, seconds: Any, target: Any) -> Any:
    """Write the 32 words of two rows of up to 32 numbers to `target`, zeros where there are no numbers.

    Args:
        first, second: addresses of the rows.
        columns: numbers of the first row; more than 32 count as 32, and negative ones as none.
        seconds: likewise of the second row.
        target: address of the words.
    """
    signature = types.void(*[types.int64] * 5)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, second, columns, seconds, target = arguments
        vectors = Pairs(builder)
        rows = vectors.read_first(HALVES, first, columns), vectors.read_first(HALVES, second, seconds)
        for start in (0, LANES):
            lanes = [lane for i in range(start, start + LANES) for lane in (i, NUMBERS + i)]
            vectors.write(vectors.shuffle(*rows, lanes), target, 4 * start)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def separate_pair(typingctx: Any, words: Any, first: Any, second: Any, columns: Any, seconds: Any) -> Any:
    """Write two rows of up to 32 numbers from their words: the inverse of `interleave_pair`."""
    signature = types.void(*[types.int64] * 5)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words, first, second, columns, seconds = arguments
        vectors = Pairs(builder)
        parts = vectors.read(HALVES, words), vectors.read(HALVES, words, VECTOR_BYTES)
        for place, target, count in ((0, first, columns), (1, second, seconds)):
            vectors.write_first(vectors.shuffle(*parts, list(range(place, 2 * NUMBERS, 2))), target, count)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def transpose_words(
    typingctx: Any, source: Any, source_row: Any, rows: Any, words: Any, target: Any, target_row: Any
) -> Any:
    """Write the transpose of a tile of up to 16 rows of up to 16 words, zeros where there are none.

    Args:
        source, source_row: word j of row i is at source + i source_row + 4 j.
        rows, words: of the tile; more than 16 count as 16.
        target, target_row: row j of the transpose is at target + j target_row; 16 rows of 16 words are written.
    """
    signature = types.void(*[types.int64] * 6)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, source_row, rows, words, target, target_row = arguments
        vectors = Pairs(builder)
        tile = []
        for i in range(LANES):
            count = builder.select(builder.icmp_signed("<", integer(i), rows), words, integer(0))
            tile.append(vectors.read_first(FLOATS, source, count))
            source = builder.add(source, source_row)
        for row in transposed(vectors, tile):
            vectors.write(row, target)
            target = builder.add(target, target_row)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def copy_row(typingctx: Any, source: Any, columns: Any, target: Any, targets: Any) -> Any:
    """Copy up to 32 numbers, the first `columns` of them, to `target`; zeros after them up to `targets` numbers."""
    signature = types.void(*[types.int64] * 4)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, columns, target, targets = arguments
        vectors = Pairs(builder)
        vectors.write_first(vectors.read_first(HALVES, source, columns), target, targets)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def stack_panel(typingctx: Any) -> Any:
    """Return the address of room for 16 rows of a panel on the stack of the calling function."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        memory = cgutils.alloca_once(builder, ir.ArrayType(ir.IntType(8), LANES * PANEL_ROW))
        return builder.ptrtoint(memory, I64)

    return types.int64(), codegen


def large_functions(source: str) -> tuple[Callable[..., None], ...]:
    """Return `interleave`, `columns`, `gather` and `scatter` as plain functions; see `matrices.large_functions`."""

    def interleave(x: int, x_row: int, rows: int, columns: int, panels: int, panel: int) -> None:
        """Interleave the rows of a matrix (rows, columns) by pairs: panels of (rows / 2, 32) words.

        `panel` is the number of bytes from a panel to the next one.
        """
        source  # noqa: B018
        for row in range(0, rows, 2):
            here, target = x + row * x_row, panels + row // 2 * PANEL_ROW
            for column in range(0, columns, NUMBERS):
                width = columns - column
                interleave_pair(here, here + x_row, width, width if row + 1 < rows else 0, target)
                here += 2 * NUMBERS
                target += panel

    def columns(x: int, x_row: int, rows: int, words: int, panels: int, panel: int) -> None:
        """Transpose a matrix of words (rows, words): panels of (words, 32), rounded up to a multiple of 16 words.

        `panel` is the number of bytes from a panel to the next one.
        """
        source  # noqa: B018
        for row in range(0, rows, LANES):
            target = panels + row // NUMBERS * panel + row % NUMBERS * 4
            for word in range(0, words, LANES):
                here, there = x + row * x_row + 4 * word, target + word * PANEL_ROW
                transpose_words(here, x_row, rows - row, words - word, there, PANEL_ROW)

    def gather(x: int, x_row: int, rows: int, columns: int, target: int, target_row: int) -> None:
        """Write the transpose of a matrix of numbers (rows, columns).

        The target has columns rounded up to a multiple of 16 rows, each of them rows rounded up to a multiple of 32
        numbers; there are zeros in the place of missing rows, and any numbers in that of missing columns.
        """
        source  # noqa: B018
        spare = stack_panel()
        for row in range(0, rows, NUMBERS):
            for column in range(0, columns, NUMBERS):
                width = columns - column
                for pair in range(LANES):
                    here, left = x + (row + 2 * pair) * x_row + 2 * column, rows - row - 2 * pair
                    interleave_pair(
                        here,
                        here + x_row,
                        width if left > 0 else 0,
                        width if left > 1 else 0,
                        spare + pair * PANEL_ROW,
                    )
                for half in range(0, min(width, NUMBERS), LANES):
                    there = target + (column + half) * target_row + 2 * row
                    transpose_words(spare + 4 * half, PANEL_ROW, LANES, LANES, there, target_row)

    def scatter(x: int, x_row: int, rows: int, columns: int, target: int, target_row: int) -> None:
        """Write the transpose of a matrix of numbers (rows, columns), whose rows are as the target's of `gather`."""
        source  # noqa: B018
        spare = stack_panel()
        for row in range(0, rows, NUMBERS):
            for column in range(0, columns, NUMBERS):
                width = rows - row
                for half in range(0, min(width, NUMBERS), LANES):
                    here = x + (row + half) * x_row + 2 * column
                    transpose_words(here, x_row, LANES, LANES, spare + 4 * half, PANEL_ROW)
                for pair in range((min(NUMBERS, columns - column) + 1) // 2):
                    there = target + (column + 2 * pair) * target_row + 2 * row
                    seconds = width if column + 2 * pair + 1 < columns else 0
                    separate_pair(spare + pair * PANEL_ROW, there, there + target_row, width, seconds)

    return interleave, columns, gather, scatter


interleave, columns, gather, scatter = map(called_by_symbol, large_functions(""))
