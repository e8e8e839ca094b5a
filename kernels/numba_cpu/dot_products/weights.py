"""Softmax of rows of energies, in float32, with the weights rounded to bfloat16 in the same pass.

A row of energies is padded to whole vectors of 16; `keys` of them count. Addresses are in bytes.

exp(x) = 2^n 2^r with t = x / ln 2, n = t rounded, r = t - n, and a polynomial for 2^r. Its error is below a unit in the
last place of a float32, and that of t at most |x| half units: a weight is rounded to 8 bits, and the larger |x| is, the
less exp(x) counts in the sum.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ccgpu.kernels.numba_cpu.dot_products.instructions import FLOATS, HALVES, LANES, WORDS, Pairs
from ccgpu.kernels.numba_cpu.vectors import I32, VECTOR_BYTES, integer, loop, reduced

SMALLEST = -200.0  # 2^SMALLEST is zero in float32


def _power_coefficients(degree: int) -> list[float]:
    """Return the coefficients of a polynomial for 2^r, |r| <= 1/2, that is exact at r = 0."""
    terms = np.polynomial.Chebyshev.interpolate(
        lambda r: np.expm1(r * math.log(2.0)) / np.where(r == 0, 1.0, r), degree - 1, domain=[-0.5, 0.5]
    )
    return [1.0, *terms.convert(kind=np.polynomial.Polynomial).coef]


COEFFICIENTS = _power_coefficients(6)  # six nodes, none of them 0


def _exponential(vectors: Pairs, x: Any) -> Any:
    """Return exp(x); below 2^-149 it is zero, and NaN stays NaN."""
    builder, constant = vectors.builder, vectors.constant
    t = builder.fmul(x, constant(1.0 / math.log(2.0)))
    t = builder.select(builder.fcmp_ordered("<", t, constant(SMALLEST)), constant(SMALLEST), t)
    n = vectors.to_whole(t)
    r = builder.fsub(t, n)
    value = constant(COEFFICIENTS[-1])
    for coefficient in reversed(COEFFICIENTS[:-1]):
        value = vectors.multiply_add(value, r, constant(coefficient))
    return vectors.scaled(value, n)


def _end_with(vectors: Pairs, row: Any, keys: Any, size: Any) -> None:
    """Emit -inf into the padding of a row of energies of `size` bytes."""
    builder = vectors.builder
    place = builder.add(row, builder.sub(size, integer(VECTOR_BYTES)))
    lanes = builder.add(keys, integer(LANES))
    mask = vectors.first(FLOATS, builder.sub(lanes, builder.sdiv(size, integer(4))))
    vectors.store(builder.select(mask, vectors.load(place), vectors.constant(-math.inf)), place)


def _size_of_row(builder: Any, keys: Any) -> Any:
    """Return the bytes of a row of energies."""
    vectors = builder.sdiv(builder.add(keys, integer(LANES - 1)), integer(LANES))
    return builder.mul(vectors, integer(VECTOR_BYTES))


@intrinsic
def weigh(typingctx: Any, row: Any, keys: Any, weights: Any) -> Any:
    """Write exp(E - row_max) of a row of energies to `weights`, in bfloat16; return row_max and the sum in float32.

    The padding of the weights becomes zero, that of the energies -inf.
    """
    result = types.UniTuple(types.float32, 2)
    signature = result(*[types.int64] * 3)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, keys, weights = arguments
        vectors = Pairs(builder)
        size = _size_of_row(builder, keys)
        _end_with(vectors, row, keys, size)

        def larger_of(a: Any, b: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        def larger(place: Any, values: list[Any]) -> list[Any]:
            return [larger_of(vectors.load(builder.add(row, place)), values[0])]

        (largest,) = loop(vectors, size, [vectors.constant(-math.inf)], larger)
        row_max = reduced(vectors, largest, larger_of)
        # Where all energies are -inf, an offset of 0 gives weights and a sum of 0; -inf - -inf would be NaN.
        zero, lowest = (ir.Constant(ir.FloatType(), x) for x in (0.0, -math.inf))
        offset = vectors.spread(builder.select(builder.fcmp_ordered(">", row_max, lowest), row_max, zero))

        def weigh_vector(place: Any, sums: list[Any]) -> list[Any]:
            value = _exponential(vectors, builder.fsub(vectors.load(builder.add(row, place)), offset))
            vectors.write(vectors.rounded_half(value), builder.add(weights, builder.lshr(place, integer(1))))
            return [builder.fadd(sums[0], value)]

        (sums,) = loop(vectors, size, [vectors.constant(0.0)], weigh_vector)
        return context.make_tuple(builder, result, [row_max, reduced(vectors, sums, builder.fadd)])

    return signature, codegen


@intrinsic
def weigh_gradients(
    typingctx: Any,
    energies: Any,
    energy_row: Any,
    keys: Any,
    both: Any,
    lse: Any,
    second_lse: Any,
    gradients: Any,
    delta: Any,
    second_delta: Any,
    rows: Any,
    weights_row: Any,
    words: Any,
) -> Any:
    """Compute the weights P = exp(E - lse) and dS = P (dP - delta) of two queries, in bfloat16.

    Args:
        energies, energy_row: address of the first query's energies, bytes to those of the second.
        keys: energies of a query.
        both: 1, or 0 if there is no second query: its place among the words is zero.
        lse, second_lse, delta, second_delta: float32 numbers of the two queries.
        gradients: address of their rows of dP, `energy_row` bytes apart; P, interleaved by pairs, replaces the first.
        rows, weights_row: address for the rows of dS, bytes between them.
        words: address for the words of dS, interleaved by pairs.
    """
    numbers, integers = types.float32, types.int64
    signature = types.void(
        integers, integers, integers, integers, numbers, numbers, integers, numbers, numbers, *[integers] * 3
    )

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        energies, energy_row, keys, both, lse, second_lse, gradients, delta, second_delta, *targets = arguments
        rows, weights_row, words = targets
        vectors = Pairs(builder)
        size = _size_of_row(builder, keys)
        seconds = builder.sext(builder.icmp_signed("!=", both, integer(0)), ir.IntType(16))
        undefined, everywhere = ir.Constant(HALVES, ir.Undefined), ir.Constant(seconds.type, -1)
        present = builder.insert_element(undefined, everywhere, ir.Constant(I32, 0))
        present = builder.insert_element(present, seconds, ir.Constant(I32, 1))
        present = vectors.shuffle(present, present, [0] * LANES + [1] * LANES)
        interleaved = [lane for i in range(LANES) for lane in (i, LANES + i)]
        queries = []
        for i, (number, less) in enumerate(((lse, delta), (second_lse, second_delta))):
            here = [builder.add(x, builder.mul(energy_row, integer(i))) for x in (energies, gradients)]
            _end_with(vectors, here[0], keys, size)
            queries.append((*here, vectors.spread(number), vectors.spread(less)))

        def weigh_vector(place: Any, _: list[Any]) -> list[Any]:
            weights, differences = [], []
            for energy, gradient, offset, less in queries:
                weight = _exponential(vectors, builder.fsub(vectors.load(builder.add(energy, place)), offset))
                weights.append(weight)
                difference = builder.fsub(vectors.load(builder.add(gradient, place)), less)
                differences.append(builder.fmul(weight, difference))
            weight_words, difference_words = (
                builder.and_(vectors.rounded(*x), present) for x in (weights, differences)
            )
            half = builder.lshr(place, integer(1))
            for i in range(2):
                part = vectors.shuffle(difference_words, difference_words, list(range(i * LANES, (i + 1) * LANES)))
                vectors.write(part, builder.add(builder.add(rows, builder.mul(weights_row, integer(i))), half))
            for value, target in ((weight_words, gradients), (difference_words, words)):
                vectors.write(vectors.shuffle(value, value, interleaved), builder.add(target, place))
            return []

        loop(vectors, size, [], weigh_vector)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def dot(typingctx: Any, a: Any, b: Any, channels: Any) -> Any:
    """Return the dot product, in float32, of two rows of `channels` bfloat16 numbers, at least one."""
    signature = types.float32(*[types.int64] * 3)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b, channels = arguments
        vectors = Pairs(builder)

        def add_vector(place: Any, sums: list[Any]) -> list[Any]:
            left = builder.sub(channels, builder.lshr(place, integer(1)))
            parts = (vectors.read_first(HALVES, builder.add(x, place), left) for x in (a, b))
            return [vectors.add_dot(sums[0], *(builder.bitcast(x, WORDS) for x in parts))]

        (sums,) = loop(vectors, builder.shl(channels, integer(1)), [vectors.constant(0.0)], add_vector)
        return reduced(vectors, sums, builder.fadd)

    return signature, codegen


@intrinsic
def add_rounded(typingctx: Any, sums: Any, channels: Any, adds: Any, row: Any) -> Any:
    """Round float32 sums to a row of bfloat16, all whole panels of 32; if `adds` is 1, add the row's old numbers."""
    signature = types.void(*[types.int64] * 4)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, channels, adds, row = arguments
        vectors = Pairs(builder)
        adds = builder.icmp_signed("!=", adds, integer(0))

        def add_vector(place: Any, _: list[Any]) -> list[Any]:
            here = builder.add(row, place)
            source = builder.add(sums, builder.shl(place, integer(1)))
            values = []
            for i, before in enumerate(vectors.widened(vectors.read(HALVES, here))):
                value = vectors.load(source, i * VECTOR_BYTES)
                values.append(builder.select(adds, builder.fadd(value, before), value))
            vectors.write(vectors.rounded(*values), here)
            return []

        loop(vectors, builder.shl(channels, integer(1)), [], add_vector)
        return context.get_dummy_value()

    return signature, codegen
