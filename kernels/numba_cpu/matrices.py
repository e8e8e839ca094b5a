"""Products and transposes of matrices of any size, in memory, for the CPU kernels: tiles of `numba_cpu_vectors`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite.binding
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from ccgpu.kernels.numba_cpu.vectors import (
    TILE_ROWS,
    TILE_VECTORS,
    VECTOR_BYTES,
    load,
    multiply_tile,
    size_of,
    stack_tiles,
    store,
    transpose_tile,
)

compiled = njit(nogil=True, error_model="numpy")


class Matrix(NamedTuple):
    """A matrix in memory: its address, and the bytes from row to row and, within a row, from number to number."""

    address: int
    row: int
    step: int


class Factors(NamedTuple):
    """A number for each row, so many bytes apart; step 0: one for all; address 0: none."""

    address: Any  # integers, of whichever type compiled code has them
    step: Any


@register_jitable
def filled_up(size: int) -> int:
    """Return the next whole number of vectors, all in bytes."""
    return (size + VECTOR_BYTES - 1) // VECTOR_BYTES * VECTOR_BYTES


@compiled
def copy(like: Any, source: int, source_step: int, count: int, target: int, target_step: int) -> None:
    """Copy numbers that stand so many bytes apart."""
    for n in range(count):
        store(target + n * target_step, load(like, source + n * source_step))


# The large functions are compiled once, by `numba_cpu_kept.prepare`, and called by their symbols: inlined, each caller
# would take a second longer to compile.


def _symbol(name: str, kind: Any) -> str:
    return f"ccgpu_{name}_{kind}"


def signature_of(name: str, kind: Any) -> Any:
    """Return the signature of a large function for a Numba type: a number of it, and integers."""
    return types.void(kind, *[types.int64] * {"transpose": 6, "multiply": 14}[name])


def _call(name: str, kind: Any) -> Any:
    """Return what an intrinsic does that calls a large function by its symbol."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
        builder.call(cgutils.get_or_insert_function(builder.module, function, _symbol(name, kind)), arguments)
        return context.get_dummy_value()

    return signature_of(name, kind), codegen


@intrinsic
def transpose(
    typingctx: Any, like: Any, source: Any, source_row: Any, rows: Any, columns: Any, target: Any, target_row: Any
) -> Any:
    """Write the transpose of a matrix (rows, columns), and nothing beside it."""
    return _call("transpose", like)


@intrinsic
def multiply(
    typingctx: Any,
    like: Any,
    rows: Any,
    columns: Any,
    depth: Any,
    a: Any,
    a_row: Any,
    a_step: Any,
    b: Any,
    b_step: Any,
    c: Any,
    c_row: Any,
    alpha: Any,
    alpha_step: Any,
    beta: Any,
    beta_step: Any,
) -> Any:
    """Compute C = alpha A B + beta C: `multiply_tile` for any number of rows, and of columns in bytes."""
    return _call("multiply", like)


@compiled
def add_product(
    like: Any, rows: int, columns: int, depth: int, a: Matrix, b: Matrix, c: Matrix, alpha: Factors, beta: Factors
) -> None:
    """Compute C = alpha A B + beta C, of so many rows, columns and terms; C is only written where beta is none.

    The numbers in rows of B and C stand side by side, and columns fill up whole vectors in both.
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


def large_functions(source: str) -> dict[str, Callable[..., None]]:
    """Return the functions behind `transpose` and `multiply`, with `source` in their closure; see `numba_cpu_kept`."""

    def transpose(
        like: Any, source: int, source_row: int, rows: int, columns: int, target: int, target_row: int
    ) -> None:
        """Write the transpose of a matrix (rows, columns), and nothing beside it."""
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
        """Compute C = alpha A B + beta C: `multiply_tile` for any number of rows, and of columns in bytes."""
        source  # noqa: B018
        tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
        for column in range(0, columns, TILE_VECTORS * VECTOR_BYTES):
            vectors = min(TILE_VECTORS, (columns - column) // VECTOR_BYTES)
            row = 0
            for tile in range(tiles):  # of about one height: 97 rows are 7 x 11 + 2 x 10, not 8 x 12 + 1
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

    return {"transpose": transpose, "multiply": multiply}


def make_known(name: str, kind: Any, function: Any) -> None:
    """Let a compiled function, which must be kept alive, be called by its symbol."""
    llvmlite.binding.add_symbol(_symbol(name, kind), function.address)
