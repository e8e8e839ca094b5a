"""Products of matrices of pairs of bfloat16, with sums in float32: a tile in registers, loops over tiles.

Computes C = alpha A B + beta C. A (rows, depth) and B (depth, columns) are of bfloat16, two neighbours along the depth
to a word; an odd depth is filled up with a zero on both sides.

B lies in *panels* of 32 columns, two vectors of words: a panel has a row for every pair of the depth, one after the
other. C is either float32, or bfloat16, rounded once when a tile leaves the registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ccgpu.kernels.numba_cpu.dot_products.instructions import FLOATS, HALVES, LANES, NUMBERS, WORDS, Pairs
from ccgpu.kernels.numba_cpu.matrices import Factors, Matrix, called_by_symbol, compiled
from ccgpu.kernels.numba_cpu.vectors import I64, VECTOR_BYTES, integer

PANEL_VECTORS = 2
PANEL_ROW = PANEL_VECTORS * VECTOR_BYTES  # bytes of a row of a panel of B
# As in tiles.py: 6 x 4 vectors of sums; the other registers hold a row of two panels of B and a word of A.
TILE_ROWS, TILE_VECTORS = 6, 2 * PANEL_VECTORS


def _sums_of_tile(vectors: Pairs, rows: int, columns: int, arguments: list[Any]) -> list[Any]:
    """Emit the loop over the depth for a tile of `rows` rows and `columns` vectors; return its sums."""
    builder = vectors.builder
    a, a_row, a_step, b, b_panel, depth = arguments
    entry = builder.block
    loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
    # One base address for three rows (base, base + a_row, base + 2 a_row): a register for each row would be too many.
    bases = [a]
    while 3 * len(bases) < rows:
        bases.append(builder.add(bases[-1], builder.mul(a_row, integer(3))))
    panels = [b, builder.add(b, b_panel)][: (columns + 1) // PANEL_VECTORS]
    builder.branch(loop)

    builder.position_at_end(loop)
    starts = [
        (integer(0), integer(1)),
        *((panel, integer(PANEL_ROW)) for panel in panels),
        *((base, a_step) for base in bases),
    ]
    moving = [builder.phi(I64) for _ in starts]
    sums = [builder.phi(FLOATS) for _ in range(rows * columns)]
    for variable, (start, step) in zip(moving, starts, strict=True):
        variable.add_incoming(start, entry)
        variable.add_incoming(builder.add(variable, step), loop)
    for variable in sums:
        variable.add_incoming(ir.Constant(FLOATS, [0.0] * LANES), entry)
    count, b_here, a_here = moving[0], moving[1 : 1 + len(panels)], moving[1 + len(panels) :]
    right = [vectors.read(WORDS, b_here[j // 2], j % 2 * VECTOR_BYTES) for j in range(columns)]
    results = []
    for i in range(rows):
        offset = builder.mul(a_row, integer(i % 3))
        left = vectors.spread_word(builder.add(a_here[i // 3], offset) if i % 3 else a_here[i // 3])
        results += [vectors.add_dot(sums[i * columns + j], left, right[j]) for j in range(columns)]
    for variable, result in zip(sums, results, strict=True):
        variable.add_incoming(result, loop)
    builder.cbranch(builder.icmp_signed("<", builder.add(count, integer(1)), depth), loop, done)
    builder.position_at_end(done)
    return results


def _write_tile(
    vectors: Pairs, results: list[Any], rows: int, columns: int, rounds: bool, arguments: list[Any]
) -> None:
    """Emit alpha times a tile's sums, plus beta C, into C: in bfloat16 if it `rounds`, else in float32."""
    builder = vectors.builder
    c, c_row, alpha, alpha_step, beta, beta_step = arguments
    with builder.if_else(builder.icmp_signed("!=", beta, integer(0))) as branches:
        for branch, adds in zip(branches, (True, False), strict=True):
            with branch:
                for i in range(rows):
                    row = builder.add(c, builder.mul(c_row, integer(i)))
                    factor = vectors.spread_from(builder.add(alpha, builder.mul(alpha_step, integer(i))))
                    values = [builder.fmul(factor, value) for value in results[i * columns : (i + 1) * columns]]
                    if adds:
                        factor = vectors.spread_from(builder.add(beta, builder.mul(beta_step, integer(i))))
                        before: list[Any] = []
                        if rounds:
                            for j in range(columns // 2):
                                before += vectors.widened(vectors.read(HALVES, row, j * VECTOR_BYTES))
                        else:
                            before = [vectors.load(row, j * VECTOR_BYTES) for j in range(columns)]
                        values = [vectors.multiply_add(factor, x, y) for x, y in zip(before, values, strict=True)]
                    if rounds:
                        for j in range(columns // 2):
                            vectors.write(vectors.rounded(*values[2 * j : 2 * j + 2]), row, j * VECTOR_BYTES)
                    else:
                        for j in range(columns):
                            vectors.store(values[j], row, j * VECTOR_BYTES)


@intrinsic
def multiply_tile(
    typingctx: Any,
    rows: Any,
    columns: Any,
    rounds: Any,
    a: Any,
    a_row: Any,
    a_step: Any,
    b: Any,
    b_panel: Any,
    c: Any,
    c_row: Any,
    depth: Any,
    alpha: Any,
    alpha_step: Any,
    beta: Any,
    beta_step: Any,
    following: Any,
    following_row: Any,
) -> Any:
    """Compute a tile of C = alpha A B + beta C in registers.

    Args:
        rows: rows of the tile, 1 ... TILE_ROWS.
        columns: columns of the tile, in vectors of words, 1 ... TILE_VECTORS; whole panels if it rounds.
        rounds: 1 if C is bfloat16, 0 if it is float32.
        a, a_row, a_step: A (rows, depth), word (i, k) at a + i a_row + k a_step.
        b, b_panel: panels of B (depth, columns), row k of panel j at b + j b_panel + k PANEL_ROW.
        c, c_row: C (rows, columns), row i at c + i c_row, its elements side by side.
        depth: in words, at least 1.
        alpha, alpha_step: a float32 factor for each row of the product; step 0: one factor for all rows.
        beta, beta_step: factors of C's old values in the same form; address 0: C is only written, not read.
        following, following_row: memory that is needed next, a matrix like C; its part in C's place is prefetched.
    """
    signature = types.void(*[types.int64] * 17)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, columns, rounds, a, a_row, a_step, b, b_panel, c, c_row, depth, *rest = arguments
        *factors, following, following_row = rest
        end = builder.append_basic_block("end")
        number = builder.add(builder.mul(rows, integer(TILE_VECTORS)), columns)
        switch = builder.switch(number, end)
        for i in range(1, TILE_ROWS + 1):
            for j in range(1, TILE_VECTORS + 1):
                block = builder.append_basic_block(f"tile{i}x{j}")
                switch.add_case(integer(i * TILE_VECTORS + j), block)
                builder.position_at_end(block)
                vectors = Pairs(builder)
                moving = [a, a_row, a_step, b, b_panel, depth]
                # These lines come from memory while the sums are computed, instead of keeping their end waiting.
                for start, step in ((c, c_row), (following, following_row)):
                    for row in range(i):
                        place = builder.add(start, builder.mul(step, integer(row)))
                        for line in range((j + 1) // 2):
                            vectors.prefetch(place, line * VECTOR_BYTES)
                results = _sums_of_tile(vectors, i, j, moving)
                target = [c, c_row, *factors]
                if j % PANEL_VECTORS:
                    _write_tile(vectors, results, i, j, False, target)
                else:
                    with builder.if_else(builder.icmp_signed("!=", rounds, integer(0))) as (narrow, wide):
                        with narrow:
                            _write_tile(vectors, results, i, j, True, target)
                        with wide:
                            _write_tile(vectors, results, i, j, False, target)
                builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return signature, codegen


def large_functions(source: str) -> tuple[Callable[..., None], ...]:
    """Return `multiply_pairs` as a plain function to compile; see `matrices.large_functions`."""

    def multiply_pairs(
        rows: int,
        columns: int,
        rounds: int,
        depth: int,
        a: int,
        a_row: int,
        a_step: int,
        b: int,
        b_panel: int,
        c: int,
        c_row: int,
        alpha: int,
        alpha_step: int,
        beta: int,
        beta_step: int,
        following: int,
        following_row: int,
    ) -> None:
        """Compute C = alpha A B + beta C: `multiply_tile` for any number of rows, and of columns in vectors of words.

        `b_panel` is the number of bytes from a panel of B to the next one.
        """
        source  # noqa: B018
        tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
        width = LANES * (2 if rounds else 4)  # bytes of C for a vector of words
        row = 0
        for tile in range(tiles):  # all of nearly the same height: 25 rows are 5 x 5, not 4 x 6 + 1
            end = rows * (tile + 1) // tiles
            for vector in range(0, columns, TILE_VECTORS):
                multiply_tile(
                    end - row,
                    min(TILE_VECTORS, columns - vector),
                    rounds,
                    a + row * a_row,
                    a_row,
                    a_step,
                    b + vector // PANEL_VECTORS * b_panel,
                    b_panel,
                    c + row * c_row + vector * width,
                    c_row,
                    depth,
                    alpha + row * alpha_step,
                    alpha_step,
                    beta + row * beta_step if beta != 0 else 0,
                    beta_step,
                    following + row * following_row + vector * width,
                    following_row,
                )
            row = end

    return (multiply_pairs,)


(multiply_pairs,) = map(called_by_symbol, large_functions(""))


@compiled
def add_product(
    rows: int,
    columns: int,
    depth: int,
    a: Matrix,
    b: int,
    panel: int,
    c: int,
    c_row: int,
    alpha: Factors,
    beta: Factors,
    rounds: int,
    following: int,
    following_row: int,
) -> None:
    """Compute C = alpha A B + beta C with A (rows, depth) and B (depth, columns); without beta, C is only written.

    Args:
        rows, columns, depth: numbers of numbers. C's columns are padded: to whole panels if it is bfloat16, else to
            whole vectors.
        a: A's words.
        b, panel: address of B's panels, bytes from one to the next.
        c, c_row: address of C, bytes from row to row.
        alpha, beta: float32 factors.
        rounds: 1 if C is bfloat16, 0 if it is float32.
    """
    vectors = (columns + NUMBERS - 1) // NUMBERS * PANEL_VECTORS if rounds else (columns + LANES - 1) // LANES
    multiply_pairs(
        rows,
        vectors,
        rounds,
        (depth + 1) // 2,
        a.address,
        a.row,
        a.step,
        b,
        panel,
        c,
        c_row,
        alpha.address,
        alpha.step,
        beta.address,
        beta.step,
        following,
        following_row,
    )
