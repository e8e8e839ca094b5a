"""The instructions of AVX-512 BF16, as LLVM IR: dot products of pairs, conversions, memory read and written in part.

A *word* is 32 bits, two bfloat16 numbers: a pair. `vdpbf16ps` adds the dot product of two pairs to a float32, for 16 of
them at once. It rounds to nearest even, takes subnormal numbers for zero and writes zero for them, and raises no
exceptions, whatever the CPU's control register says; so do the conversions from float32. What is lost is below the
smallest normal number, 1.2e-38, for each term of a sum.

Importing this module is safe everywhere; what it emits compiles only where `dot_products.AVAILABLE` is true.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from ccgpu.kernels.numba_cpu.vectors import I32, Vectors, integer

LANES = 16  # words in a vector
NUMBERS = 2 * LANES  # bfloat16 numbers in a vector
I16 = ir.IntType(16)
FLOATS, WORDS, HALVES = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(I32, LANES), ir.VectorType(I16, NUMBERS)
_SUFFIX = {FLOATS: "v16f32", HALVES: "v32i16"}  # what LLVM calls them in the names of intrinsics


class Pairs(Vectors):
    """Emits operations on vectors of float32 and of pairs of bfloat16 into a function's LLVM IR."""

    def __init__(self, builder: Any) -> None:
        super().__init__(builder, types.float32)

    def read(self, kind: ir.Type, address: Any, offset: int = 0) -> Any:
        """Return a value of a type at address + offset, which need not be aligned."""
        return self.builder.load(self._pointer(kind, address, offset), align=1)

    def write(self, value: Any, address: Any, offset: int = 0) -> None:
        """Write a value to address + offset, which need not be aligned."""
        self.builder.store(value, self._pointer(value.type, address, offset), align=1)

    def _pointer(self, kind: ir.Type, address: Any, offset: int) -> Any:
        return self.builder.inttoptr(self.at(address, offset), kind.as_pointer())

    def _call(self, name: str, result: ir.Type, arguments: list[Any]) -> Any:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), arguments)

    # Newer releases of LLVM have vectors of `bfloat` in these signatures and still read the older ones, of integers.

    def add_dot(self, sums: Any, a: Any, b: Any) -> Any:
        """Return sums + a . b for each lane: sums in float32, a and b words."""
        return self._call("llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, [sums, a, b])

    def rounded(self, low: Any, high: Any) -> Any:
        """Return 32 bfloat16 numbers: those of a float32 vector, then those of another one, rounded to nearest even."""
        return self._call("llvm.x86.avx512bf16.cvtne2ps2bf16.512", HALVES, [high, low])

    def rounded_half(self, x: Any) -> Any:
        """Return the 16 bfloat16 numbers of a float32 vector, rounded to nearest even."""
        return self._call("llvm.x86.avx512bf16.cvtneps2bf16.512", ir.VectorType(I16, LANES), [x])

    def widened(self, numbers: Any) -> tuple[Any, Any]:
        """Return 32 bfloat16 numbers as two vectors of float32."""
        parts = (self.shuffle(numbers, numbers, list(range(i, i + LANES))) for i in (0, LANES))
        low, high = (self.float32(part) for part in parts)
        return low, high

    def float32(self, numbers: Any) -> Any:
        """Return 16 bfloat16 numbers as float32."""
        words = self.builder.shl(self.builder.zext(numbers, WORDS), ir.Constant(WORDS, [16] * LANES))
        return self.builder.bitcast(words, FLOATS)

    def to_whole(self, x: Any) -> Any:
        """Return the whole numbers that are nearest to those of a float32 vector."""
        return self._call("llvm.rint.v16f32", FLOATS, [x])

    def scaled(self, x: Any, exponents: Any) -> Any:
        """Return x 2^n for vectors of float32 x and whole n; what is too small for a float32 becomes zero."""
        everywhere, rounding = ir.Constant(I16, -1), ir.Constant(I32, 4)  # 4: as the control register says
        arguments = [x, exponents, self.constant(0.0), everywhere, rounding]
        return self._call("llvm.x86.avx512.mask.scalef.ps.512", FLOATS, arguments)

    def first(self, kind: ir.VectorType, count: Any) -> Any:
        """Return a mask of a vector's first `count` lanes; a negative number counts as 0, a larger one as all."""
        builder, lanes = self.builder, integer(kind.count)
        count = builder.select(builder.icmp_signed("<", count, lanes), count, lanes)
        count = builder.select(builder.icmp_signed(">", count, integer(0)), count, integer(0))
        bits = builder.sub(builder.shl(integer(1), count), integer(1))
        return builder.bitcast(builder.trunc(bits, ir.IntType(kind.count)), ir.VectorType(ir.IntType(1), kind.count))

    def read_first(self, kind: ir.VectorType, address: Any, count: Any) -> Any:
        """Return a vector at an address of which only the first `count` lanes are read; the others are zero."""
        pointer, nothing = self._pointer(kind, address, 0), ir.Constant(kind, [0] * kind.count)
        arguments = [pointer, ir.Constant(I32, 1), self.first(kind, count), nothing]
        return self._call(f"llvm.masked.load.{_SUFFIX[kind]}.p0", kind, arguments)

    def write_first(self, value: Any, address: Any, count: Any) -> None:
        """Write the first `count` lanes of a vector to an address."""
        pointer, mask = self._pointer(value.type, address, 0), self.first(value.type, count)
        name = f"llvm.masked.store.{_SUFFIX[value.type]}.p0"
        self._call(name, ir.VoidType(), [value, pointer, ir.Constant(I32, 1), mask])

    def spread_word(self, address: Any) -> Any:
        """Return a vector with the word at an address in every lane."""
        word = self.read(I32, address)
        undefined = ir.Constant(WORDS, ir.Undefined)
        return self.shuffle(self.builder.insert_element(undefined, word, ir.Constant(I32, 0)), undefined, [0] * LANES)
