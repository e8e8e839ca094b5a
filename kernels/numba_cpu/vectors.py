"""Vector code for the CPU kernels: tiles of products and transposes, exponentials, sums; LLVM IR as Numba intrinsics.

LLVM vectorises simple loops of Numba by itself, but neither a matrix product that keeps a tile of results in registers
nor a transposition between registers, so these are written out here, in vectors as wide as this CPU's registers.
Everything works on addresses and strides in bytes. `like` is any number of the wanted dtype, float32 or float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def _machine(features: dict[str, bool]) -> tuple[int, int]:
    """Return the size of a vector register in bytes and the number of such registers, for a CPU with these features."""
    if features.get("avx512f"):
        return 64, 32
    if features.get("avx"):
        return 32, 16
    if features.get("neon"):
        return 16, 32
    return 16, 16


VECTOR_BYTES, _REGISTERS = _machine(llvmlite.binding.get_host_cpu_features())
# Rows and vectors of the tile of results that a product keeps in registers; the other registers hold a row of the right
# matrix and one element of the left one. 12 x 2 vectors of 16 reach 0.9 of an AVX-512 core's peak, 97 rows at a time.
TILE_ROWS, TILE_VECTORS = (12, 2) if _REGISTERS == 32 else (6, 2)

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_KINDS = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
_BYTES = {types.float32: 4, types.float64: 8}


def _number(n: int) -> ir.Constant:
    return ir.Constant(_I64, n)


class _Vectors:
    """Emits operations on vectors of one dtype into a function's LLVM IR."""

    def __init__(self, builder: Any, like: Any) -> None:
        self.builder, self.size = builder, _BYTES[like]
        self.element, self.lanes = _KINDS[like], VECTOR_BYTES // self.size
        self.type = ir.VectorType(self.element, self.lanes)

    def at(self, address: Any, offset: int = 0) -> Any:
        """Return address + offset."""
        return self.builder.add(address, _number(offset)) if offset else address

    def load(self, address: Any, offset: int = 0) -> Any:
        pointer = self.builder.inttoptr(self.at(address, offset), self.type.as_pointer())
        return self.builder.load(pointer, align=self.size)

    def store(self, value: Any, address: Any, offset: int = 0) -> None:
        pointer = self.builder.inttoptr(self.at(address, offset), self.type.as_pointer())
        self.builder.store(value, pointer, align=self.size)

    def prefetch(self, address: Any, offset: int) -> None:
        """Emit a prefetch of the memory at an address, which need not be valid."""
        pointer = ir.IntType(8).as_pointer()
        signature = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
        function = self.builder.module.declare_intrinsic("llvm.prefetch", [pointer], signature)
        read, close, data = (ir.Constant(_I32, n) for n in (0, 3, 1))
        self.builder.call(function, [self.builder.inttoptr(self.at(address, offset), pointer), read, close, data])

    def constant(self, value: float) -> ir.Constant:
        return ir.Constant(self.type, [value] * self.lanes)

    def spread(self, number: Any) -> Any:
        """Return a vector with `number` in every lane."""
        undefined = ir.Constant(self.type, ir.Undefined)
        first = self.builder.insert_element(undefined, number, ir.Constant(_I32, 0))
        return self.shuffle(first, undefined, [0] * self.lanes)

    def spread_from(self, address: Any) -> Any:
        """Return a vector with the number at an address in every lane."""
        pointer = self.builder.inttoptr(address, self.element.as_pointer())
        return self.spread(self.builder.load(pointer, align=self.size))

    def shuffle(self, a: Any, b: Any, lanes: list[int]) -> Any:
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))

    def multiply_add(self, x: Any, y: Any, z: Any) -> Any:
        product = self.builder.fmul(x, y, flags=("contract",))
        return self.builder.fadd(product, z, flags=("contract",))


def _tile_product(vectors: _Vectors, rows: int, columns: int, arguments: list[Any]) -> None:
    """Emit the product for a tile of `rows` rows and `columns` vectors; see `multiply_tile`."""
    builder = vectors.builder
    a, a_row, a_step, b, b_step, c, c_row, depth, alpha, alpha_step, beta, beta_step = arguments
    entry = builder.block
    loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
    # One base address for three rows (base, base + a_row, base + 2 a_row): a register for each row would be too many.
    bases = [a]
    while 3 * len(bases) < rows:
        bases.append(builder.add(bases[-1], builder.mul(a_row, _number(3))))
    builder.branch(loop)

    builder.position_at_end(loop)
    starts = [(_number(0), _number(1)), (b, b_step), *((base, a_step) for base in bases)]
    moving = [builder.phi(_I64) for _ in starts]
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
        offset = builder.mul(a_row, _number(i % 3))
        left = vectors.spread_from(builder.add(a_here[i // 3], offset) if i % 3 else a_here[i // 3])
        results += [vectors.multiply_add(left, right[j], sums[i * columns + j]) for j in range(columns)]
    for variable, result in zip(sums, results, strict=True):
        variable.add_incoming(result, loop)
    builder.cbranch(builder.icmp_signed("<", builder.add(count, _number(1)), depth), loop, done)

    builder.position_at_end(done)
    for i in range(rows):
        factor = vectors.spread_from(builder.add(alpha, builder.mul(alpha_step, _number(i))))
        for j in range(columns):
            results[i * columns + j] = builder.fmul(factor, results[i * columns + j])
    with builder.if_else(builder.icmp_signed("!=", beta, _number(0))) as branches:
        for branch, adds in zip(branches, (True, False), strict=True):
            with branch:
                for i in range(rows):
                    row = builder.add(c, builder.mul(c_row, _number(i)))
                    if adds:
                        factor = vectors.spread_from(builder.add(beta, builder.mul(beta_step, _number(i))))
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
        number = builder.add(builder.mul(rows, _number(TILE_VECTORS)), columns)
        switch = builder.switch(number, end)
        for i in range(1, TILE_ROWS + 1):
            for j in range(1, TILE_VECTORS + 1):
                block = builder.append_basic_block(f"tile{i}x{j}")
                switch.add_case(_number(i * TILE_VECTORS + j), block)
                builder.position_at_end(block)
                _tile_product(_Vectors(builder, like), i, j, rest)
                builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def transpose_tile(typingctx: Any, like: Any, source: Any, source_row: Any, target: Any, target_row: Any) -> Any:
    """Write the transpose of the square tile at `source`, a vector wide and as many rows high, to `target`."""
    signature = types.void(like, *[types.int64] * 4)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, source, source_row, target, target_row = arguments
        vectors = _Vectors(builder, like)
        n = vectors.lanes
        rows = []
        for _ in range(n):
            rows.append(vectors.load(source))
            source = builder.add(source, source_row)
        half = n // 2
        while half:  # exchange the off-diagonal quarters of every square of 2 * half rows
            low = [lane if lane & half == 0 else n + (lane ^ half) for lane in range(n)]
            high = [lane ^ half if lane & half == 0 else n + lane for lane in range(n)]
            for i in range(n):
                if i & half == 0:
                    a, b = rows[i], rows[i + half]
                    rows[i], rows[i + half] = vectors.shuffle(a, b, low), vectors.shuffle(a, b, high)
            half //= 2
        for row in rows:
            vectors.store(row, target)
            target = builder.add(target, target_row)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def stack_tiles(typingctx: Any) -> Any:
    """Return the address of room for two tiles of any dtype on the stack of the calling function."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        memory = cgutils.alloca_once(builder, ir.ArrayType(ir.IntType(8), 2 * VECTOR_BYTES * VECTOR_BYTES // 4))
        return builder.ptrtoint(memory, _I64)

    return types.int64(), codegen


@intrinsic
def size_of(typingctx: Any, like: Any) -> Any:
    """Return the size of like's dtype in bytes."""
    return types.int64(like), lambda context, builder, signature, arguments: _number(_BYTES[like])


@intrinsic
def load(typingctx: Any, like: Any, address: Any) -> Any:
    """Return the number at an address."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[1], _KINDS[like].as_pointer())
        return builder.load(pointer, align=_BYTES[like])

    return like(like, types.int64), codegen


@intrinsic
def store(typingctx: Any, address: Any, value: Any) -> Any:
    """Write a number to an address."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _KINDS[value].as_pointer())
        builder.store(arguments[1], pointer, align=_BYTES[value])
        return context.get_dummy_value()

    return types.void(types.int64, value), codegen


def _loop(vectors: _Vectors, size: Any, starts: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
    """Emit a loop over the vectors of `size` bytes; return the loop-carried values after it.

    body(offset, values) emits one iteration and returns the new values; `starts` are the first ones.
    """
    builder = vectors.builder
    entry = builder.block
    loop, done = builder.append_basic_block("vectors"), builder.append_basic_block("after")
    builder.branch(loop)
    builder.position_at_end(loop)
    offset = builder.phi(_I64)
    values = [builder.phi(start.type) for start in starts]
    following = body(offset, list(values))
    after = builder.add(offset, _number(VECTOR_BYTES))
    for variable, start, value in zip([offset, *values], [_number(0), *starts], [after, *following], strict=True):
        variable.add_incoming(start, entry)
        variable.add_incoming(value, builder.block)
    builder.cbranch(builder.icmp_signed("<", after, size), loop, done)
    builder.position_at_end(done)
    return following


def _reduced(vectors: _Vectors, value: Any, operation: Callable[[Any, Any], Any]) -> Any:
    """Return one number: the lanes of a vector, reduced by `operation`."""
    half = vectors.lanes // 2
    while half:
        value = operation(value, vectors.shuffle(value, value, [lane ^ half for lane in range(vectors.lanes)]))
        half //= 2
    return vectors.builder.extract_element(value, ir.Constant(_I32, 0))


@intrinsic
def maximum(typingctx: Any, like: Any, address: Any, size: Any) -> Any:
    """Return the maximum of the numbers in `size` bytes, whole vectors; a NaN may be ignored."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, address, size = arguments
        vectors = _Vectors(builder, like)

        def larger_of(a: Any, b: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        def body(offset: Any, values: list[Any]) -> list[Any]:
            return [larger_of(vectors.load(builder.add(address, offset)), values[0])]

        (result,) = _loop(vectors, size, [vectors.constant(-math.inf)], body)
        return _reduced(vectors, result, larger_of)

    return like(like, types.int64, types.int64), codegen


@intrinsic
def exponentials(typingctx: Any, like: Any, address: Any, size: Any, offset: Any) -> Any:
    """Replace every x in `size` bytes, whole vectors, by exp(x - offset); return the sum of the exponentials.

    x - offset must be at most 80. The error is below a unit in the last place; subnormal results become 0, and NaN
    stays NaN.

    exp(x) = 2^n exp(r) with n = round(x / ln 2) and r = x - n ln 2 in two steps, by Taylor's series.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, address, size, offset = arguments
        vectors = _Vectors(builder, like)
        offset = vectors.spread(offset)

        def body(place: Any, sums: list[Any]) -> list[Any]:
            here = builder.add(address, place)
            x = vectors.load(here)
            difference = builder.fsub(x, offset)
            # The exact rounding error of the difference (Knuth's two-sum); NaN, and unused, where that is infinite.
            other = builder.fsub(x, difference)
            error = builder.fadd(builder.fsub(x, builder.fadd(difference, other)), builder.fsub(other, offset))
            value = _exponential(vectors, difference, error)
            vectors.store(value, here)
            return [builder.fadd(sums[0], value)]

        (sums,) = _loop(vectors, size, [vectors.constant(0.0)], body)
        return _reduced(vectors, sums, builder.fadd)

    return like(like, types.int64, types.int64, like), codegen


def _exponential(vectors: _Vectors, x: Any, error: Any) -> Any:
    """Return exp(x + error) for an error below half a unit in x's last place."""
    builder, constant = vectors.builder, vectors.constant
    mantissa, bias, word, terms = (23, 127, _I32, 8) if vectors.size == 4 else (52, 1023, _I64, 14)
    # Adding 1.5 * 2^mantissa rounds to an integer, which stands in the last bits; subtracting it leaves the integer.
    shifter = constant(1.5 * 2.0**mantissa)
    shifted = vectors.multiply_add(x, constant(1.0 / math.log(2.0)), shifter)
    n = builder.fsub(shifted, shifter)
    # ln 2 = high + low, where high has so few bits that n * high is exact.
    high, low = (
        (0.693359375, -2.12194440054690583e-4)
        if vectors.size == 4
        else (6.93147180369123816490e-01, 1.90821492927058770002e-10)
    )
    r = vectors.multiply_add(n, constant(-high), x)
    r = builder.fadd(vectors.multiply_add(n, constant(-low), r), error)
    # As |r| <= ln(2) / 2, the first omitted term of the series is below half a unit in the last place.
    coefficients = [1.0 / math.factorial(i) for i in range(terms)]
    value = constant(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = vectors.multiply_add(value, r, constant(coefficient))
    words = ir.VectorType(word, vectors.lanes)
    exponent = builder.add(builder.bitcast(shifted, words), ir.Constant(words, [bias] * vectors.lanes))
    power = builder.shl(exponent, ir.Constant(words, [mantissa] * vectors.lanes))
    value = builder.fmul(value, builder.bitcast(power, vectors.type))
    return builder.select(builder.fcmp_ordered("<", x, constant((1 - bias) * math.log(2.0))), constant(0.0), value)


@intrinsic
def subtract_and_multiply(typingctx: Any, like: Any, x: Any, factors: Any, size: Any, offset: Any) -> Any:
    """Replace every x in `size` bytes, whole vectors, by factor * (x - offset), with a factor for each x."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, x, factors, size, offset = arguments
        vectors = _Vectors(builder, like)
        offset = vectors.spread(offset)

        def body(place: Any, _: list[Any]) -> list[Any]:
            here = builder.add(x, place)
            difference = builder.fsub(vectors.load(here), offset)
            vectors.store(builder.fmul(vectors.load(builder.add(factors, place)), difference), here)
            return []

        _loop(vectors, size, [], body)
        return context.get_dummy_value()

    return types.void(like, types.int64, types.int64, types.int64, like), codegen


@intrinsic
def dot(typingctx: Any, like: Any, a: Any, b: Any, size: Any) -> Any:
    """Return the dot product of the numbers at a and at b, `size` bytes of each, whole vectors."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, a, b, size = arguments
        vectors = _Vectors(builder, like)

        def body(place: Any, sums: list[Any]) -> list[Any]:
            left, right = vectors.load(builder.add(a, place)), vectors.load(builder.add(b, place))
            return [vectors.multiply_add(left, right, sums[0])]

        (sums,) = _loop(vectors, size, [vectors.constant(0.0)], body)
        return _reduced(vectors, sums, builder.fadd)

    return like(like, types.int64, types.int64, types.int64), codegen
