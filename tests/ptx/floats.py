"""Floating-point operations that NumPy lacks, as NumPy ufuncs compiled by Numba, and conversions of formats.

PTX ISA, "Floating Point Instructions": fma rounds once; `.ftz` flushes subnormal operands and results of .f32 to zeros
of the same sign; min and max return the operand that is not NaN, and -0 is less than +0.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import vectorize
from numba.core.extending import intrinsic

TINY = 2.0**-126  # the least normal number of .f32
F32, F64 = "float32(float32,float32)", "float64(float64,float64)"
F32_3, F64_3 = "float32(float32,float32,float32)", "float64(float64,float64,float64)"


@intrinsic
def _fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once: LLVM's fma."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return a(a, b, c), generate


@vectorize(["float32(float32)"])
def flush(x):
    return math.copysign(np.float32(0), x) if abs(x) < np.float32(TINY) else x


@vectorize([F32])
def add_ftz(a, b):
    return flush(flush(a) + flush(b))


@vectorize([F32])
def subtract_ftz(a, b):
    return flush(flush(a) - flush(b))


@vectorize([F32])
def multiply_ftz(a, b):
    return flush(flush(a) * flush(b))


@vectorize([F32_3, F64_3])
def fma(a, b, c):
    return _fma(a, b, c)


@vectorize([F32_3])
def fma_ftz(a, b, c):
    return flush(_fma(flush(a), flush(b), flush(c)))


@vectorize([F32_3])
def fma_down(a, b, c):
    """Rounded towards minus infinity: the sum and its error are exact in float64."""
    product, wide = np.float64(a) * np.float64(b), np.float64(c)
    total = product + wide
    back = total - product
    error = (product - (total - back)) + (wide - back)
    near = np.float32(total)
    if near > total or (near == total and error < 0):
        near = np.nextafter(near, np.float32(-np.inf))
    return near


@vectorize([F32, F64])
def maximum(a, b):
    if a != a:
        return b
    if b != b:
        return a
    if a == b:
        return b if math.copysign(1.0, a) < 0 else a
    return a if a > b else b


@vectorize([F32, F64])
def minimum(a, b):
    if a != a:
        return b
    if b != b:
        return a
    if a == b:
        return a if math.copysign(1.0, a) < 0 else b
    return a if a < b else b


def from_bf16(bits: Any) -> Any:
    """Return the float32 values of bfloat16 bits (uint16)."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: Any) -> Any:
    """Return the bits of float32 values rounded to bfloat16, nearest even; NaN is 0x7fff."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def to_tf32(x: Any) -> Any:
    """Return the bits of float32 values rounded to 10 bits of mantissa, ties away from zero (cvt.rna.tf32.f32)."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), rounded, np.where(np.isnan(x), np.uint32(0x7FFFE000), bits)).astype(np.uint32)


def to_f16(x: Any) -> Any:
    """Return the bits of float32 values rounded to float16, nearest even; NaN is 0x7fff."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), np.asarray(x).astype(np.float16).view(np.uint16))


def reciprocal_high(x: Any) -> Any:
    """rcp.approx.ftz.f64: the reciprocal of the high 32 bits of x, of which the high 32 bits are kept."""
    high = np.uint64(0xFFFFFFFF00000000)
    top = (np.ascontiguousarray(x, np.float64).view(np.uint64) & high).view(np.float64)
    tiny = np.finfo(np.float64).tiny
    result = 1.0 / np.where(np.abs(top) < tiny, np.copysign(0.0, top), top)
    result = np.where(np.abs(result) < tiny, np.copysign(0.0, result), result)
    return (result.view(np.uint64) & high).view(np.float64)
