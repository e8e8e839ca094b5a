"""Numbers of 16 bits in memory that are float32 in registers: bfloat16 and float16, which Numba does not have.

A number of a marker type says how a map's numbers are kept in memory: int16 stands for bfloat16 and uint16 for float16,
float32 and float64 for themselves. Registers hold float32 for the first three, float64 for the last.

A wider number is exact. A narrower one is rounded to the nearest, to even between two; NaN stays NaN, and what is too
large for the dtype becomes infinite. Subnormal numbers are kept, whether or not the processor flushes those of float32
to zero.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ccgpu.kernels.numba_cpu.features import FEATURES
from ccgpu.kernels.numba_cpu.vectors import BYTES, I32, KINDS, VECTOR_BYTES

BFLOAT16, FLOAT16 = types.int16, types.uint16

# Without these LLVM calls a function of a runtime library that a process need not have. What the processor has for
# bfloat16 flushes subnormal numbers to zero, and integers are fast enough.
CONVERTS_FLOAT16 = {"f16c", "avx"} <= FEATURES or "neon" in FEATURES

I16, FLOAT = ir.IntType(16), ir.FloatType()


def wide(kept: Any) -> Any:
    """Return the dtype in registers, as Numba's type, of numbers that memory keeps as `kept`."""
    return types.float32 if BYTES[kept] == 2 else kept


def load(builder: Any, kept: Any, address: Any, lanes: int) -> Any:
    """Return `lanes` numbers, as memory keeps them from an address on: in 16 bits as integers."""
    kind = ir.VectorType(I16 if BYTES[kept] == 2 else KINDS[kept], lanes)
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=BYTES[kept])


def store(builder: Any, kept: Any, address: Any, numbers: Any) -> None:
    """Write numbers, as memory keeps them, from an address on."""
    builder.store(numbers, builder.inttoptr(address, numbers.type.as_pointer()), align=BYTES[kept])


def widened(builder: Any, kept: Any, numbers: Any) -> Any:
    """Return a vector of `wide(kept)` of a vector that memory keeps."""
    if BYTES[kept] != 2:
        return numbers
    emit = _Words(builder, numbers.type.count)
    if kept == BFLOAT16:
        return emit.floats(builder.shl(builder.zext(numbers, emit.kind), emit.constant(16)))
    if CONVERTS_FLOAT16:
        return builder.fpext(builder.bitcast(numbers, ir.VectorType(ir.HalfType(), emit.lanes)), emit.float_kind)
    return _float16_widened(emit, builder.zext(numbers, emit.kind))


def narrowed(builder: Any, kept: Any, numbers: Any) -> Any:
    """Return a vector as memory keeps it of a vector of `wide(kept)`."""
    if BYTES[kept] != 2:
        return numbers
    emit = _Words(builder, numbers.type.count)
    if kept == FLOAT16 and CONVERTS_FLOAT16:
        halves = builder.fptrunc(numbers, ir.VectorType(ir.HalfType(), emit.lanes))
        return builder.bitcast(halves, ir.VectorType(I16, emit.lanes))
    words = (_bfloat16_narrowed if kept == BFLOAT16 else _float16_narrowed)(emit, emit.words(numbers))
    return builder.trunc(words, ir.VectorType(I16, emit.lanes))


class _Words:
    """Emits operations on vectors of 32-bit words, the bits of float32 numbers."""

    def __init__(self, builder: Any, lanes: int) -> None:
        self.builder, self.lanes = builder, lanes
        self.kind, self.float_kind = ir.VectorType(I32, lanes), ir.VectorType(FLOAT, lanes)

    def constant(self, word: int) -> ir.Constant:
        """Return a vector with `word` in every lane."""
        return ir.Constant(self.kind, [word] * self.lanes)

    def floats(self, words: Any) -> Any:
        """Return the numbers with these bits."""
        return self.builder.bitcast(words, self.float_kind)

    def words(self, numbers: Any) -> Any:
        """Return the bits of numbers."""
        return self.builder.bitcast(numbers, self.kind)

    def rounded(self, words: Any, bits: int) -> Any:
        """Return words that, shifted right by `bits`, are rounded to the nearest, to even between two."""
        builder, constant = self.builder, self.constant
        last = builder.and_(builder.lshr(words, constant(bits)), constant(1))
        return builder.add(words, builder.add(last, constant(2 ** (bits - 1) - 1)))


def _bfloat16_narrowed(emit: _Words, words: Any) -> Any:
    """Return the bits of the nearest bfloat16 in the low half of each word."""
    builder, constant = emit.builder, emit.constant
    numbers = emit.floats(words)
    quiet = builder.or_(words, constant(0x400000))  # rounding could turn the bits of a NaN into infinity
    chosen = builder.select(builder.fcmp_unordered("uno", numbers, numbers), quiet, emit.rounded(words, 16))
    return builder.lshr(chosen, constant(16))


# The exponent of float16 has 5 bits with a bias of 15, its mantissa 10 bits; that of float32 8, 127 and 23.
_BIAS, _SHIFT = (127 - 15) << 23, 23 - 10
_INFINITY = 0xFF << 23
_SMALLEST = (127 - 14) << 23  # float32's bits of the smallest normal float16


def _float16_widened(emit: _Words, halves: Any) -> Any:
    """Return the numbers whose bits, as float16, are in the low half of each word."""
    builder, constant = emit.builder, emit.constant
    sign = builder.shl(builder.and_(halves, constant(0x8000)), constant(16))
    magnitude = builder.shl(builder.and_(halves, constant(0x7FFF)), constant(_SHIFT))
    normal = builder.add(magnitude, constant(_BIAS))
    infinite = builder.or_(magnitude, constant(_INFINITY))
    # A subnormal number's bits, beside the exponent of the smallest normal one, are that number too large.
    smallest = constant(_SMALLEST)
    subnormal = emit.words(builder.fsub(emit.floats(builder.add(magnitude, smallest)), emit.floats(smallest)))
    words = builder.select(
        builder.icmp_unsigned("<", magnitude, constant(0x400 << _SHIFT)),
        subnormal,
        builder.select(builder.icmp_unsigned("<", magnitude, constant(0x7C00 << _SHIFT)), normal, infinite),
    )
    return emit.floats(builder.or_(words, sign))


def _float16_narrowed(emit: _Words, words: Any) -> Any:
    """Return the bits of the nearest float16 in the low half of each word."""
    builder, constant = emit.builder, emit.constant
    magnitude = builder.and_(words, constant(0x7FFFFFFF))
    sign = builder.lshr(builder.xor(words, magnitude), constant(16))
    normal = builder.lshr(emit.rounded(builder.sub(magnitude, constant(_BIAS)), _SHIFT), constant(_SHIFT))
    # The sum with 1/2 has one unit of a subnormal float16 in its last place, so adding rounds to such units.
    half = constant(126 << 23)
    subnormal = builder.sub(emit.words(builder.fadd(emit.floats(magnitude), emit.floats(half))), half)
    beyond = builder.select(
        builder.icmp_unsigned(">", magnitude, constant(_INFINITY)), constant(0x7E00), constant(0x7C00)
    )
    halves = builder.select(
        builder.icmp_unsigned("<", magnitude, constant(_SMALLEST)),
        subnormal,
        builder.select(builder.icmp_unsigned("<", magnitude, constant((127 + 16) << 23)), normal, beyond),
    )
    return builder.or_(halves, sign)


# In compiled functions ------------------------------------------------------------------------------------------------


@intrinsic
def number_at(typingctx: Any, kept: Any, address: Any) -> Any:
    """Return the number at an address, widened."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = widened(builder, kept, load(builder, kept, arguments[1], 1))
        return builder.extract_element(number, ir.Constant(I32, 0))

    return wide(kept)(kept, types.int64), codegen


@intrinsic
def put_number(typingctx: Any, kept: Any, address: Any, number: Any) -> Any:
    """Write a number to an address, narrowed."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, address, number = arguments
        vector = builder.insert_element(
            ir.Constant(ir.VectorType(number.type, 1), ir.Undefined), number, ir.Constant(I32, 0)
        )
        store(builder, kept, address, narrowed(builder, kept, vector))
        return context.get_dummy_value()

    return types.void(kept, types.int64, wide(kept)), codegen


@intrinsic
def copy_vector(typingctx: Any, reads: Any, writes: Any, source: Any, target: Any) -> Any:
    """Copy as many numbers as a vector holds of the wider dtype, from memory that keeps `reads` to one of `writes`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, source, target = arguments
        numbers = load(builder, reads, source, VECTOR_BYTES // BYTES[wide(reads)])
        if reads != writes:
            numbers = narrowed(builder, writes, widened(builder, reads, numbers))
        store(builder, writes, target, numbers)
        return context.get_dummy_value()

    return types.void(reads, writes, types.int64, types.int64), codegen
