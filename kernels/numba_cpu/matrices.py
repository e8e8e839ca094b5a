"""Products and transposes of matrices of any size, in memory: loops over the tiles of tiles.py."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite.binding
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from ccgpu.kernels.numba_cpu.conversions import copy_vector, number_at, put_number
from ccgpu.kernels.numba_cpu.tiles import TILE_ROWS, TILE_VECTORS, multiply_tile, transpose_tile
from ccgpu.kernels.numba_cpu.vectors import VECTOR_BYTES, address_of_one, size_of

compiled = njit(nogil=True, error_model="numpy")

# Most bytes of B that stay in a core's second cache (1 MB, half of it where cores are smaller) beside A and C. Tiles
# then go along the rows of C, which are read and written in long pieces, and B is read again for each row of tiles. A
# larger B is read once, and tiles go down the columns.
NEAR = 2**18
# Most terms that are added up in a register. The rounding error of one long chain grows with its length: for 4000 equal
# terms it was many times that of torch's products, which add parts of sums as well.
CHAIN = 128


class Matrix(NamedTuple):
    """A matrix in memory: its address, and the bytes from row to row and, within a row, from element to element."""

    address: int
    row: int
    step: int


class Factors(NamedTuple):
    """One factor for each row, `step` bytes apart. Step 0: one factor for all rows; address 0: no factors."""

    address: Any  # both are integers; compiled code has several types of them
    step: Any


@register_jitable
def filled_up(size: int) -> int:
    """Return `size` bytes rounded up to whole vectors."""
    return (size + VECTOR_BYTES - 1) // VECTOR_BYTES * VECTOR_BYTES


@compiled
def copy(reads: Any, writes: Any, source: int, count: int, target: int) -> None:
    """Copy `count` numbers that stand side by side from memory that keeps `reads` to memory that keeps `writes`."""
    read, written = size_of(reads), size_of(writes)
    lanes = VECTOR_BYTES // max(read, written)
    if count < lanes:
        for n in range(count):
            put_number(writes, target + n * written, number_at(reads, source + n * read))
        return
    for first in range(0, count, lanes):
        n = min(first, count - lanes)  # the last vector may write numbers once more
        copy_vector(reads, writes, source + n * read, target + n * written)


@register_jitable
def tile_side(left: int, length: int, lanes: int) -> int:
    """Return the side of the smallest tile that has room for `left` numbers, or of the largest one within `length`."""
    side = lanes
    while side > length or (side > 2 and side // 2 >= left):
        side //= 2
    return side


# Large functions, called by symbol ------------------------------------------------------------------------------------
#
# They are compiled once, by `cache.prepare`, and the kernels call them by their symbols: inlined, they would add a
# second to the compilation of each caller.


def large_functions(source: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return `transpose` and `multiply` as plain functions to compile; `source` only stands in their closure.

    Numba's cache compares closures, so another `source` compiles them anew; see cache.py.
    """

    def transpose(
        reads: Any, writes: Any, source: int, source_row: int, rows: int, columns: int, target: int, target_row: int
    ) -> None:
        """Write the transpose of a matrix (rows, columns); memory between the target's rows stays as it is.

        The source's memory keeps `reads`, the target's `writes`. At the ends, where a tile would reach beyond the
        matrix, it begins earlier and writes numbers once more, or is narrower.
        """
        source  # noqa: B018
        read, written = size_of(reads), size_of(writes)
        lanes = VECTOR_BYTES // max(read, written)
        if min(rows, columns) < 2 or max(rows, columns) < lanes:
            for i in range(rows):
                for j in range(columns):
                    number = number_at(reads, source + i * source_row + j * read)
                    put_number(writes, target + j * target_row + i * written, number)
            return
        i = 0
        while i < rows:
            height = tile_side(rows - i, rows, lanes) if columns >= lanes else lanes
            top, j = min(i, rows - height), 0
            while j < columns:
                width = tile_side(columns - j, columns, lanes) if height == lanes else lanes
                left = min(j, columns - width)
                here, there = source + top * source_row + left * read, target + left * target_row + top * written
                transpose_tile(reads, writes, height, width, here, source_row, there, target_row)
                j += width
            i += height

    def multiply(
        like: Any,
        rows: int,
        columns: int,
        depth: int,
        a: int,
        a_row: int,
        a_step: int,
        b: int,
        b_step: int,
        c: int,
        c_row: int,
        alpha: int,
        alpha_step: int,
        beta: int,
        beta_step: int,
    ) -> None:
        """Compute C = alpha A B + beta C: `multiply_tile` for any number of rows and of columns, these in bytes."""
        source  # noqa: B018
        width = TILE_VECTORS * VECTOR_BYTES
        tiles, strips = (rows + TILE_ROWS - 1) // TILE_ROWS, (columns + width - 1) // width
        by_rows = depth * columns <= NEAR
        for number in range(tiles * strips):
            if by_rows:
                tile, strip = number // strips, number % strips
            else:
                tile, strip = number % tiles, number // tiles
            # Tiles are all of nearly the same height: 97 rows are 12 x 6 + 5 x 5, not 16 x 6 + 1.
            row, column = rows * tile // tiles, strip * width
            before, before_step = beta + row * beta_step if beta != 0 else 0, beta_step
            for term in range(0, depth, CHAIN):
                multiply_tile(
                    like,
                    rows * (tile + 1) // tiles - row,
                    min(TILE_VECTORS, (columns - column) // VECTOR_BYTES),
                    a + row * a_row + term * a_step,
                    a_row,
                    a_step,
                    b + column + term * b_step,
                    b_step,
                    c + row * c_row + column,
                    c_row,
                    min(CHAIN, depth - term),
                    alpha + row * alpha_step,
                    alpha_step,
                    before,
                    before_step,
                )
                before, before_step = address_of_one(like), 0  # what follows is added to it

    return transpose, multiply


def kinds_of(function: Callable[..., None], like: Any, kept: Any) -> list[tuple[Any, ...]]:
    """Return the types of a large function's first arguments, numbers of dtypes, that the kernels call it with.

    Args:
        function: one of `large_functions`.
        like: Numba's type of the arithmetic.
        kept: of the maps in memory.
    """
    if function.__name__ == "multiply":
        return [(like,)]
    return [(like, like)] if kept == like else [(like, like), (kept, like), (like, kept)]


def signature_of(function: Callable[..., None], kinds: tuple[Any, ...]) -> Any:
    """Return the Numba signature of a large function: numbers of these types, then integers only."""
    integers = len(inspect.signature(function).parameters) - len(kinds)
    return types.void(*kinds, *[types.int64] * integers)


def symbol_of(function: Callable[..., None], kinds: tuple[Any, ...]) -> str:
    """Return the name by which compiled code finds a large function for these types."""
    return "_".join(["ccgpu", function.__name__, *map(str, kinds)])


def add_symbol(function: Callable[..., None], kinds: tuple[Any, ...], compiled_function: Any) -> None:
    """Let the kernels find a large function, compiled for these types, by its symbol; the caller must keep it alive."""
    llvmlite.binding.add_symbol(symbol_of(function, kinds), compiled_function.address)


def called_by_symbol(function: Callable[..., None]) -> Any:
    """Return an intrinsic with the name, arguments and docstring of a large function, which calls it by its symbol."""

    dtypes = sum(parameter.annotation == "Any" for parameter in inspect.signature(function).parameters.values())

    def call(typingctx: Any, *parameters: Any) -> Any:
        kinds = parameters[:dtypes]

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, symbol_of(function, kinds)), arguments)
            return context.get_dummy_value()

        return signature_of(function, kinds), codegen

    call.__name__, call.__doc__ = function.__name__, function.__doc__
    signature = inspect.signature(function)
    context = inspect.Parameter("typingctx", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    # Numba reads the names and the number of the arguments here.
    call.__signature__ = signature.replace(parameters=[context, *signature.parameters.values()])  # type: ignore[attr-defined]
    return intrinsic(call)


transpose, multiply = map(called_by_symbol, large_functions(""))


@compiled
def add_product(
    like: Any, rows: int, columns: int, depth: int, a: Matrix, b: Matrix, c: Matrix, alpha: Factors, beta: Factors
) -> None:
    """Compute C = alpha A B + beta C with A (rows, depth) and B (depth, columns); without beta, C is only written.

    The elements of a row of B, and of C, stand side by side, and their columns are padded to whole vectors.
    """
    multiply(
        like,
        rows,
        filled_up(columns * size_of(like)),
        depth,
        a.address,
        a.row,
        a.step,
        b.address,
        b.row,
        c.address,
        c.row,
        alpha.address,
        alpha.step,
        beta.address,
        beta.step,
    )
