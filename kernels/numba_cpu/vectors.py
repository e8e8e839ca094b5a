"""Vector instructions for the CPU kernels, as LLVM IR: what Numba intrinsics are written with, exponentials, sums.

Vectors are as wide as the registers that Numba compiles for. All works on addresses and strides in bytes. `like` is any
number of the wanted dtype, float32 or float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ccgpu.kernels.numba_cpu.features import FEATURES


def _machine(features: frozenset[str]) -> tuple[int, int]:
    """Return the size of a vector register in bytes and the number of such registers, for a CPU with these features."""
    if "avx512f" in features:
        return 64, 32
    if "avx" in features:
        return 32, 16
    if "neon" in features:
        return 16, 32
    return 16, 16


VECTOR_BYTES, REGISTERS = _machine(FEATURES)

I32, I64 = ir.IntType(32), ir.IntType(64)
KINDS = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
# The integers stand for dtypes of 16 bits in memory; see conversions.py.
BYTES = {types.float32: 4, types.float64: 8, types.int16: 2, types.uint16: 2}


def integer(n: int) -> ir.Constant:
    """Return an integer constant of 64 bits."""
    return ir.Constant(I64, n)


class Vectors:
    """Emits operations on vectors of one dtype into a function's LLVM IR."""

    def __init__(self, builder: Any, like: Any) -> None:
        self.builder, self.size = builder, BYTES[like]
        self.element, self.lanes = KINDS[like], VECTOR_BYTES // self.size
        self.type = ir.VectorType(self.element, self.lanes)

    def at(self, address: Any, offset: int = 0) -> Any:
        """Return address + offset."""
        return self.builder.add(address, integer(offset)) if offset else address

    def load(self, address: Any, offset: int = 0) -> Any:
        """Return the vector at address + offset, aligned like a single number."""
        pointer = self.builder.inttoptr(self.at(address, offset), self.type.as_pointer())
        return self.builder.load(pointer, align=self.size)

    def store(self, value: Any, address: Any, offset: int = 0) -> None:
        """Write a vector to address + offset."""
        pointer = self.builder.inttoptr(self.at(address, offset), self.type.as_pointer())
        self.builder.store(value, pointer, align=self.size)

    def prefetch(self, address: Any, offset: int, writes: bool = False) -> None:
        """Emit a prefetch of the memory at address + offset, which need not be valid, to read it or to write it."""
        pointer = ir.IntType(8).as_pointer()
        signature = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
        function = self.builder.module.declare_intrinsic("llvm.prefetch", [pointer], signature)
        use, close, data = (ir.Constant(I32, n) for n in (int(writes), 3, 1))
        self.builder.call(function, [self.builder.inttoptr(self.at(address, offset), pointer), use, close, data])

    def constant(self, value: float) -> ir.Constant:
        """Return a vector with `value` in every lane."""
        return ir.Constant(self.type, [value] * self.lanes)

    def spread(self, number: Any) -> Any:
        """Return a vector with `number` in every lane."""
        undefined = ir.Constant(self.type, ir.Undefined)
        first = self.builder.insert_element(undefined, number, ir.Constant(I32, 0))
        return self.shuffle(first, undefined, [0] * self.lanes)

    def spread_from(self, address: Any) -> Any:
        """Return a vector with the number at an address in every lane."""
        pointer = self.builder.inttoptr(address, self.element.as_pointer())
        return self.spread(self.builder.load(pointer, align=self.size))

    def shuffle(self, a: Any, b: Any, lanes: list[int]) -> Any:
        """Return a vector of these lanes, counted through a and then b."""
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))

    def multiply_add(self, x: Any, y: Any, z: Any) -> Any:
        """Return x y + z, rounded once where the machine can."""
        product = self.builder.fmul(x, y, flags=("contract",))
        return self.builder.fadd(product, z, flags=("contract",))


@intrinsic
def size_of(typingctx: Any, like: Any) -> Any:
    """Return the size of like's dtype in bytes."""
    return types.int64(like), lambda context, builder, signature, arguments: integer(BYTES[like])


@intrinsic
def load(typingctx: Any, like: Any, address: Any) -> Any:
    """Return the number at an address."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[1], KINDS[like].as_pointer())
        return builder.load(pointer, align=BYTES[like])

    return like(like, types.int64), codegen


@intrinsic
def store(typingctx: Any, address: Any, value: Any) -> Any:
    """Write a number to an address."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], KINDS[value].as_pointer())
        builder.store(arguments[1], pointer, align=BYTES[value])
        return context.get_dummy_value()

    return types.void(types.int64, value), codegen


@intrinsic
def address_of_one(typingctx: Any, like: Any) -> Any:
    """Return the address of the number 1."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one = cgutils.global_constant(builder.module, "one", ir.Constant(KINDS[like], 1.0))
        return builder.ptrtoint(one, I64)

    return types.int64(like), codegen


def loop(vectors: Vectors, size: Any, starts: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
    """Emit a loop over the vectors of `size` bytes; return the loop-carried values after it.

    body(offset, values) emits one iteration and returns the new values; `starts` are the first ones.
    """
    builder = vectors.builder
    entry = builder.block
    loop, done = builder.append_basic_block("vectors"), builder.append_basic_block("after")
    builder.branch(loop)
    builder.position_at_end(loop)
    offset = builder.phi(I64)
    values = [builder.phi(start.type) for start in starts]
    following = body(offset, list(values))
    after = builder.add(offset, integer(VECTOR_BYTES))
    for variable, start, value in zip([offset, *values], [integer(0), *starts], [after, *following], strict=True):
        variable.add_incoming(start, entry)
        variable.add_incoming(value, builder.block)
    builder.cbranch(builder.icmp_signed("<", after, size), loop, done)
    builder.position_at_end(done)
    return following


def reduced(vectors: Vectors, value: Any, operation: Callable[[Any, Any], Any]) -> Any:
    """Return one number: the lanes of a vector, reduced by `operation`."""
    half = vectors.lanes // 2
    while half:
        value = operation(value, vectors.shuffle(value, value, [lane ^ half for lane in range(vectors.lanes)]))
        half //= 2
    return vectors.builder.extract_element(value, ir.Constant(I32, 0))


@intrinsic
def fill_padding(typingctx: Any, like: Any, address: Any, count: Any, value: Any) -> Any:
    """Write `value` after the `count` numbers at an address, up to a whole vector. count must be at least 1.

    One vector is read and written: a vector cannot be read soon after its numbers have been written one by one.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, address, count, value = arguments
        vectors = Vectors(builder, like)
        before = builder.and_(builder.sub(count, integer(1)), integer(-vectors.lanes))
        last = builder.add(address, builder.mul(before, integer(vectors.size)))
        words = ir.VectorType(I32, vectors.lanes)
        filled = builder.insert_element(
            ir.Constant(words, ir.Undefined), builder.trunc(builder.sub(count, before), I32), ir.Constant(I32, 0)
        )
        filled = vectors.shuffle(filled, ir.Constant(words, ir.Undefined), [0] * vectors.lanes)
        is_number = builder.icmp_signed("<", ir.Constant(words, list(range(vectors.lanes))), filled)
        vectors.store(builder.select(is_number, vectors.load(last), vectors.spread(value)), last)
        return context.get_dummy_value()

    return types.void(like, types.int64, types.int64, like), codegen


@intrinsic
def maximum(typingctx: Any, like: Any, address: Any, size: Any) -> Any:
    """Return the maximum of the numbers in `size` bytes, whole vectors; a NaN may be ignored."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, address, size = arguments
        vectors = Vectors(builder, like)

        def larger_of(a: Any, b: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        def body(offset: Any, values: list[Any]) -> list[Any]:
            return [larger_of(vectors.load(builder.add(address, offset)), values[0])]

        (result,) = loop(vectors, size, [vectors.constant(-math.inf)], body)
        return reduced(vectors, result, larger_of)

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
        vectors = Vectors(builder, like)
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

        (sums,) = loop(vectors, size, [vectors.constant(0.0)], body)
        return reduced(vectors, sums, builder.fadd)

    return like(like, types.int64, types.int64, like), codegen


def _exponential(vectors: Vectors, x: Any, error: Any) -> Any:
    """Return exp(x + error) for an error below half a unit in x's last place."""
    builder, constant = vectors.builder, vectors.constant
    mantissa, bias, word, terms = (23, 127, I32, 8) if vectors.size == 4 else (52, 1023, I64, 14)
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
        vectors = Vectors(builder, like)
        offset = vectors.spread(offset)

        def body(place: Any, _: list[Any]) -> list[Any]:
            here = builder.add(x, place)
            difference = builder.fsub(vectors.load(here), offset)
            vectors.store(builder.fmul(vectors.load(builder.add(factors, place)), difference), here)
            return []

        loop(vectors, size, [], body)
        return context.get_dummy_value()

    return types.void(like, types.int64, types.int64, types.int64, like), codegen


@intrinsic
def dot(typingctx: Any, like: Any, a: Any, b: Any, size: Any) -> Any:
    """Return the dot product of the numbers at a and at b, `size` bytes of each, whole vectors."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, a, b, size = arguments
        vectors = Vectors(builder, like)

        def body(place: Any, sums: list[Any]) -> list[Any]:
            left, right = vectors.load(builder.add(a, place)), vectors.load(builder.add(b, place))
            return [vectors.multiply_add(left, right, sums[0])]

        (sums,) = loop(vectors, size, [vectors.constant(0.0)], body)
        return reduced(vectors, sums, builder.fadd)

    return like(like, types.int64, types.int64, types.int64), codegen
