"""Tiles of products and of transposes, in registers: LLVM IR as Numba intrinsics.

LLVM vectorises simple loops of Numba by itself, but neither a matrix product that keeps a tile of results in registers
nor a transposition between registers. Everything works on addresses and strides in bytes. `like` is any number of the
wanted dtype, float32 or float64.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ccgpu.kernels.numba_cpu.conversions import load, narrowed, store, wide, widened
from ccgpu.kernels.numba_cpu.vectors import BYTES, I32, I64, REGISTERS, VECTOR_BYTES, Vectors, integer

# Rows and vectors of the tile of results that a product keeps in registers; the other registers hold a row of the right
# matrix and one element of the left one. 6 x 4 vectors of 16 reach an AVX-512 core's peak in its first cache. 12 x 2 do
# so, too, but their 12 rows do not fit into a set of that cache (8 ways), which they share where rows are a multiple of
# 4 kB apart, as along a column of 32, 64 or 128 positions with 512 channels.
TILE_ROWS, TILE_VECTORS = (6, 4) if REGISTERS == 32 else (6, 2)


def _tile_product(vectors: Vectors, rows: int, columns: int, arguments: list[Any]) -> None:
    """Emit the product for a tile of `rows` rows and `columns` vectors; see `multiply_tile`."""
    builder = vectors.builder
    a, a_row, a_step, b, b_step, c, c_row, depth, alpha, alpha_step, beta, beta_step = arguments
    entry = builder.block
    loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
    # One base address for three rows (base, base + a_row, base + 2 a_row): a register for each row would be too many.
    bases = [a]
    while 3 * len(bases) < rows:
        bases.append(builder.add(bases[-1], builder.mul(a_row, integer(3))))
    # C's lines come from memory while the product is computed. Without these, the end of a tile waits for all of them.
    for i in range(rows):
        row = builder.add(c, builder.mul(c_row, integer(i)))
        for j in range(columns):
            vectors.prefetch(row, j * VECTOR_BYTES, writes=True)
    builder.branch(loop)

    builder.position_at_end(loop)
    starts = [(integer(0), integer(1)), (b, b_step), *((base, a_step) for base in bases)]
    moving = [builder.phi(I64) for _ in starts]
    sums = [builder.phi(vectors.type) for _ in range(rows * columns)]
    for variable, (start, step) in zip(moving, starts, strict=True):
        variable.add_incoming(start, entry)
        variable.add_incoming(builder.add(variable, step), loop)
    for variable in sums:
        variable.add_incoming(ir.Constant(vectors.type, [0.0] * vectors.lanes), entry)
    count, b_here, *a_here = moving
    right = [vectors.load(b_here, j * VECTOR_BYTES) for j in range(columns)]
    for j in range(columns):  # the next tile of the product will read the columns after these
        vectors.prefetch(b_here, (columns + j) * VECTOR_BYTES)
    results = []
    for i in range(rows):
        offset = builder.mul(a_row, integer(i % 3))
        left = vectors.spread_from(builder.add(a_here[i // 3], offset) if i % 3 else a_here[i // 3])
        results += [vectors.multiply_add(left, right[j], sums[i * columns + j]) for j in range(columns)]
    for variable, result in zip(sums, results, strict=True):
        variable.add_incoming(result, loop)
    builder.cbranch(builder.icmp_signed("<", builder.add(count, integer(1)), depth), loop, done)

    builder.position_at_end(done)
    for i in range(rows):
        factor = vectors.spread_from(builder.add(alpha, builder.mul(alpha_step, integer(i))))
        for j in range(columns):
            results[i * columns + j] = builder.fmul(factor, results[i * columns + j])
    with builder.if_else(builder.icmp_signed("!=", beta, integer(0))) as branches:
        for branch, adds in zip(branches, (True, False), strict=True):
            with branch:
                for i in range(rows):
                    row = builder.add(c, builder.mul(c_row, integer(i)))
                    if adds:
                        factor = vectors.spread_from(builder.add(beta, builder.mul(beta_step, integer(i))))
                    for j in range(columns):
                        value = results[i * columns + j]
                        if adds:
                            value = vectors.multiply_add(factor, vectors.load(row, j * VECTOR_BYTES), value)
                        vectors.store(value, row, j * VECTOR_BYTES)


@intrinsic
def multiply_tile(
    typingctx: Any,
    like: Any,
    rows: Any,
    columns: Any,
    a: Any,
    a_row: Any,
    a_step: Any,
    b: Any,
    b_step: Any,
    c: Any,
    c_row: Any,
    depth: Any,
    alpha: Any,
    alpha_step: Any,
    beta: Any,
    beta_step: Any,
) -> Any:
    """Compute a tile of C = alpha A B + beta C in registers.

    Args:
        like: a number of the dtype.
        rows: rows of the tile, 1 ... TILE_ROWS.
        columns: columns of the tile, in vectors, 1 ... TILE_VECTORS.
        a, a_row, a_step: A (rows, depth), element (i, k) at a + i a_row + k a_step.
        b, b_step: B (depth, columns), row k at b + k b_step, its elements side by side.
        c, c_row: C (rows, columns), row i at c + i c_row, its elements side by side.
        depth: at least 1.
        alpha, alpha_step: a factor for each row of the product; step 0: one factor for all rows.
        beta, beta_step: factors of C's old values in the same form; address 0: C is only written, not read.
    """
    signature = types.void(like, *[types.int64] * 14)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, rows, columns, *rest = arguments
        end = builder.append_basic_block("end")
        number = builder.add(builder.mul(rows, integer(TILE_VECTORS)), columns)
        switch = builder.switch(number, end)
        for i in range(1, TILE_ROWS + 1):
            for j in range(1, TILE_VECTORS + 1):
                block = builder.append_basic_block(f"tile{i}x{j}")
                switch.add_case(integer(i * TILE_VECTORS + j), block)
                builder.position_at_end(block)
                _tile_product(Vectors(builder, like), i, j, rest)
                builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return signature, codegen


def _joined(builder: Any, parts: list[Any]) -> Any:
    """Return the lanes of vectors of the same type, one after the other; the number of vectors is a power of two."""
    while len(parts) > 1:
        lanes = ir.Constant(ir.VectorType(I32, 2 * parts[0].type.count), list(range(2 * parts[0].type.count)))
        parts = [builder.shuffle_vector(a, b, lanes) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def transposed(vectors: Vectors, rows: list[Any]) -> list[Any]:
    """Return the rows of a matrix's transpose: a square one, if there are as many rows as a vector has lanes.

    Of fewer rows (a power of two), each square of as many lanes is transposed.
    """
    rows, n, half = list(rows), vectors.lanes, len(rows) // 2
    while half:  # exchange the off-diagonal quarters of every square of 2 * half rows
        low = [lane if lane & half == 0 else n + (lane ^ half) for lane in range(n)]
        high = [lane ^ half if lane & half == 0 else n + lane for lane in range(n)]
        for i in range(len(rows)):
            if i & half == 0:
                a, b = rows[i], rows[i + half]
                rows[i], rows[i + half] = vectors.shuffle(a, b, low), vectors.shuffle(a, b, high)
        half //= 2
    return rows


def _tile_transpose(builder: Any, reads: Any, writes: Any, height: int, width: int, places: list[Any]) -> None:
    """Emit the transpose of a tile of these sides, one of which is a vector long; see `transpose_tile`."""
    source, source_row, target, target_row = places
    vectors = Vectors(builder, wide(reads))
    n, side = vectors.lanes, min(height, width)
    parts = []  # rows of the tile, in memory's dtype
    for _ in range(height):
        parts.append(load(builder, reads, source, width))
        source = builder.add(source, source_row)
    # Where rows are short, a vector holds several of them: row i and those that follow in steps of `side`.
    rows = [widened(builder, reads, _joined(builder, parts[i::side])) for i in range(side)]
    columns = [narrowed(builder, writes, x) for x in transposed(vectors, rows)]
    for j in range(width):
        column = columns[j % side]
        if height < n:  # columns are short, and a vector holds column i and those that follow in steps of `side`
            first = j // side * side
            column = vectors.shuffle(column, column, list(range(first, first + side)))
        store(builder, writes, target, column)
        target = builder.add(target, target_row)


@intrinsic
def transpose_tile(
    typingctx: Any,
    reads: Any,
    writes: Any,
    height: Any,
    width: Any,
    source: Any,
    source_row: Any,
    target: Any,
    target_row: Any,
) -> Any:
    """Write the transpose of the tile (height, width) at `source` to `target`.

    One side is a vector of the wider dtype long, the other as long or a half, a quarter ... of it, but at least 2. The
    source's memory keeps `reads`, the target's `writes`; one of them is the other's dtype in registers.
    """
    signature = types.void(reads, writes, *[types.int64] * 6)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, height, width, *places = arguments
        lanes = VECTOR_BYTES // BYTES[wide(reads)]
        sides = [side for side in (2, 4, 8, 16) if side < lanes]
        end = builder.append_basic_block("end")
        number = builder.add(builder.mul(height, integer(lanes + 1)), width)
        switch = builder.switch(number, end)
        for i, j in [(lanes, lanes), *((lanes, side) for side in sides), *((side, lanes) for side in sides)]:
            block = builder.append_basic_block(f"tile{i}x{j}")
            switch.add_case(integer(i * (lanes + 1) + j), block)
            builder.position_at_end(block)
            _tile_transpose(builder, reads, writes, i, j, places)
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return signature, codegen
