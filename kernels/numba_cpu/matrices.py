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

from ccgpu.kernels.numba_cpu.tiles import TILE_ROWS, TILE_VECTORS, multiply_tile, stack_tiles, transpose_tile
from ccgpu.kernels.numba_cpu.vectors import VECTOR_BYTES, load, size_of, store

compiled = njit(nogil=True, error_model="numpy")


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
def copy(like: Any, source: int, source_step: int, count: int, target: int, target_step: int) -> None:
    """Copy `count` numbers, `source_step` bytes apart, to places that are `target_step` bytes apart."""
    for n in range(count):
        store(target + n * target_step, load(like, source + n * source_step))


# Large functions, called by symbol ------------------------------------------------------------------------------------
#
# They are compiled once, by `cache.prepare`, and the kernels call them by their symbols: inlined, they would add a
# second to the compilation of each caller.


def large_functions(source: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return `transpose` and `multiply` as plain functions to compile; `source` only stands in their closure.

    Numba's cache compares closures, so another `source` compiles them anew; see cache.py.
    """

    def transpose(
        like: Any, source: int, source_row: int, rows: int, columns: int, target: int, target_row: int
    ) -> None:
        """Write the transpose of a matrix (rows, columns); memory between the target's rows stays as it is."""
        source  # noqa: B018
        size = size_of(like)
        lanes = VECTOR_BYTES // size
        spare = stack_tiles()
        other = spare + lanes * VECTOR_BYTES
        for i in range(0, rows, lanes):
            for j in range(0, columns, lanes):
                here, there = source + i * source_row + j * size, target + j * target_row + i * size
                if i + lanes <= rows and j + lanes <= columns:
                    transpose_tile(like, here, source_row, there, target_row)
                    continue
                height, width = min(lanes, rows - i), min(lanes, columns - j)
                for m in range(height):
                    copy(like, here + m * source_row, size, width, spare + m * VECTOR_BYTES, size)
                transpose_tile(like, spare, VECTOR_BYTES, other, VECTOR_BYTES)
                for n in range(width):
                    copy(like, other + n * VECTOR_BYTES, size, height, there + n * target_row, size)

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
        tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
        for column in range(0, columns, TILE_VECTORS * VECTOR_BYTES):
            vectors = min(TILE_VECTORS, (columns - column) // VECTOR_BYTES)
            row = 0
            for tile in range(tiles):  # all of nearly the same height: 97 rows are 7 x 11 + 2 x 10, not 8 x 12 + 1
                end = rows * (tile + 1) // tiles
                multiply_tile(
                    like,
                    end - row,
                    vectors,
                    a + row * a_row,
                    a_row,
                    a_step,
                    b + column,
                    b_step,
                    c + row * c_row + column,
                    c_row,
                    depth,
                    alpha + row * alpha_step,
                    alpha_step,
                    beta + row * beta_step if beta != 0 else 0,
                    beta_step,
                )
                row = end

    return transpose, multiply


def signature_of(function: Callable[..., None], kind: Any) -> Any:
    """Return the Numba signature of a large function for a dtype: a number of that type, then integers only."""
    integers = len(inspect.signature(function).parameters) - 1
    return types.void(kind, *[types.int64] * integers)


def _symbol(function: Callable[..., None], kind: Any) -> str:
    return f"ccgpu_{function.__name__}_{kind}"


def add_symbol(function: Callable[..., None], kind: Any, compiled_function: Any) -> None:
    """Let the kernels find a large function, compiled for a dtype, by its symbol; the caller must keep it alive."""
    llvmlite.binding.add_symbol(_symbol(function, kind), compiled_function.address)


def called_by_symbol(function: Callable[..., None]) -> Any:
    """Return an intrinsic with the name, arguments and docstring of a large function, which calls it by its symbol."""

    def call(typingctx: Any, like: Any, *integers: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, _symbol(function, like)), arguments)
            return context.get_dummy_value()

        return signature_of(function, like), codegen

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
