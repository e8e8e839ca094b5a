"""Every instruction without memory against a table by hand: rows of operands and the result that the PTX ISA gives."""

import math
import struct

import numpy as np
import pytest

from tests.ptx.parse import PtxError
from tests.ptx.registers import DTYPES
from tests.ptx.single import execute

pytestmark = pytest.mark.nvrtc

NAN, INF = math.nan, math.inf
TINY = 2.0**-126  # the least normal number of .f32
SMALL = 2.0**-140  # subnormal
A, B, C = 0x80000001, 0x7FFFFFFF, 0x12345678


def f32(bits):
    return struct.unpack("f", struct.pack("I", bits))[0]


def f64(bits):
    return struct.unpack("d", struct.pack("Q", bits))[0]


# instruction, types of a, b, c ... and of the result, rows of values of these
TABLE = [
    ("add.s32 %d0, %a, %b", "s32 s32 s32", [(B, 1, -(2**31)), (-5, 3, -2)]),
    ("add.s64 %d0, %a, -1", "s64 s64", [(0, -1), (2**40, 2**40 - 1)]),
    ("sub.u32 %d0, %a, %b", "u32 u32 u32", [(0, 1, 2**32 - 1)]),
    ("mul.lo.s32 %d0, %a, %b", "s32 s32 s32", [(-3, 5, -15), (65536, 65536, 0)]),
    ("mul.hi.u32 %d0, %a, %b", "u32 u32 u32", [(2**32 - 1, 2**32 - 1, 2**32 - 2), (65536, 65536, 1)]),
    ("mul.hi.s32 %d0, %a, %b", "s32 s32 s32", [(-1, 1, -1), (2**30, 8, 2), (-(2**31), -(2**31), 2**30)]),
    ("mul.hi.u64 %d0, %a, %b", "u64 u64 u64", [(2**64 - 1, 2**64 - 1, 2**64 - 2), (2**40, 2**30, 64)]),
    ("mul.hi.s64 %d0, %a, %b", "s64 s64 s64", [(-1, 1, -1), (2**62, 8, 2)]),
    ("mul.wide.s32 %d0, %a, %b", "s32 s32 s64", [(-(2**31), 2, -(2**32)), (-1, -1, 1)]),
    ("mul.wide.u32 %d0, %a, %b", "u32 u32 u64", [(2**32 - 1, 2**32 - 1, (2**32 - 1) ** 2)]),
    ("mul.wide.u16 %d0, %a, %b", "u16 u16 u32", [(65535, 65535, 65535**2)]),
    ("mad.lo.s32 %d0, %a, %b, %c", "s32 s32 s32 s32", [(3, -4, 5, -7), (65536, 65536, 9, 9)]),
    ("mad.wide.s32 %d0, %a, %b, %c", "s32 s32 s64 s64", [(-(2**31), 2, 1, 1 - 2**32)]),
    ("mad.hi.u32 %d0, %a, %b, %c", "u32 u32 u32 u32", [(2**31, 6, 10, 13)]),
    ("div.s32 %d0, %a, %b", "s32 s32 s32", [(7, 2, 3), (-7, 2, -3), (7, -2, -3), (-7, -2, 3)]),
    ("div.u32 %d0, %a, %b", "u32 u32 u32", [(2**32 - 1, 2, 2**31 - 1)]),
    ("div.s64 %d0, %a, %b", "s64 s64 s64", [(-(2**40) - 1, 2**20, -(2**20))]),
    ("rem.s32 %d0, %a, %b", "s32 s32 s32", [(7, 2, 1), (-7, 2, -1), (7, -2, 1), (-7, -2, -1)]),
    ("rem.u32 %d0, %a, %b", "u32 u32 u32", [(2**32 - 1, 16, 15)]),
    ("min.s32 %d0, %a, %b", "s32 s32 s32", [(-1, 1, -1), (1, -1, -1)]),
    ("min.u32 %d0, %a, %b", "u32 u32 u32", [(2**32 - 1, 1, 1)]),
    ("max.s64 %d0, %a, %b", "s64 s64 s64", [(-(2**40), 1, 1)]),
    ("abs.s32 %d0, %a", "s32 s32", [(-5, 5), (5, 5)]),
    ("neg.s32 %d0, %a", "s32 s32", [(-5, 5), (5, -5)]),
    ("and.b32 %d0, %a, %b", "u32 u32 u32", [(0xFF00FF, 0x0FF00F, 0x0F000F)]),
    ("or.b64 %d0, %a, %b", "u64 u64 u64", [(2**63, 1, 2**63 + 1)]),
    ("xor.b32 %d0, %a, %b", "u32 u32 u32", [(0xFF00, 0x0FF0, 0xF0F0)]),
    ("not.b32 %d0, %a", "u32 u32", [(0xFF00FF00, 0x00FF00FF)]),
    ("shl.b32 %d0, %a, %b", "u32 u32 u32", [(1, 31, 2**31), (1, 32, 0), (3, 100, 0), (5, 0, 5)]),
    ("shr.u32 %d0, %a, %b", "u32 u32 u32", [(2**31, 31, 1), (2**31, 32, 0)]),
    ("shr.s32 %d0, %a, %b", "s32 u32 s32", [(-8, 1, -4), (-8, 40, -1), (8, 40, 0)]),
    ("shl.b64 %d0, %a, 40", "u64 u64", [(3, 3 << 40)]),
    ("shr.s64 %d0, %a, 63", "s64 s64", [(-(2**63), -1), (5, 0)]),
    ("shf.l.wrap.b32 %d0, %a, %b, %c", "u32 u32 u32 u32", [(A, C, 4, 0x23456788), (A, C, 36, 0x23456788)]),
    ("shf.l.clamp.b32 %d0, %a, %b, %c", "u32 u32 u32 u32", [(A, C, 0, C), (A, C, 32, A), (A, C, 99, A)]),
    ("shf.r.wrap.b32 %d0, %a, %b, %c", "u32 u32 u32 u32", [(A, C, 4, 0x88000000), (A, C, 32, A)]),
    ("shf.r.clamp.b32 %d0, %a, %b, %c", "u32 u32 u32 u32", [(A, C, 32, C), (A, C, 8, 0x78800000)]),
    (
        "bfe.u32 %d0, %a, %b, %c",
        "u32 u32 u32 u32",
        [(C, 4, 8, 0x67), (C, 28, 8, 1), (C, 40, 8, 0), (C, 0, 0, 0), (A, 0, 32, A), (A, 0, 255, A)],
    ),
    (
        "bfe.s32 %d0, %a, %b, %c",
        "s32 u32 u32 s32",
        [(0xF0, 4, 4, -1), (0x70, 4, 4, 7), (A, 31, 4, -1), (A, 50, 4, -1), (A, 50, 0, 0), (A, 0, 32, A - 2**32)],
    ),
    ("bfe.u64 %d0, %a, 40, 8", "u64 u64", [(0xAB << 40, 0xAB)]),
    (
        "bfi.b32 %d0, %a, %b, %c, %e",
        "u32 u32 u32 u32 u32",
        [(0xAB, 0, 8, 8, 0xAB00), (0, 2**32 - 1, 28, 8, 0x0FFFFFFF), (1, 7, 40, 4, 7), (9, 7, 0, 0, 7)],
    ),
    ("bfi.b32 %d0, %a, %b, %c, %e", "u32 u32 u32 u32 u32", [(A, 7, 0, 32, A), (A, 7, 1, 255, 3)]),
    ("bfi.b64 %d0, %a, %b, 32, 32", "u64 u64 u64", [(5, 3, 5 << 32 | 3)]),
    (
        "prmt.b32 %d0, %a, %b, %c",
        "u32 u32 u32 u32",
        [
            (0x33221100, 0x77665544, 0x3210, 0x33221100),
            (0x33221100, 0x77665544, 0x7654, 0x77665544),
            (0x33221100, 0x77665544, 0x5410, 0x55441100),
            (0x332211F0, 0x77665544, 0x8888, 0xFFFFFFFF),
            (0x332211F0, 0x77665544, 0x09, 0xF0F0F000),
        ],
    ),
    ("lop3.b32 %d0, %a, %b, %c, 0x80", "u32 u32 u32 u32", [(A, B, C, A & B & C), (7, 6, 5, 4)]),
    ("lop3.b32 %d0, %a, %b, %c, 0x40", "u32 u32 u32 u32", [(7, 6, 5, 2)]),
    ("lop3.b32 %d0, %a, %b, %c, 0x1A", "u32 u32 u32 u32", [(A, B, C, (A & B | C) ^ A)]),
    ("lop3.b32 %d0, %a, %b, %c, 0x96", "u32 u32 u32 u32", [(A, B, C, A ^ B ^ C)]),
    ("brev.b32 %d0, %a", "u32 u32", [(1, 2**31), (0x12345678, 0x1E6A2C48)]),
    ("clz.b32 %d0, %a", "u32 u32", [(1, 31), (0, 32), (2**31, 0)]),
    ("popc.b32 %d0, %a", "u32 u32", [(0xFF01, 9)]),
    # Floats
    ("add.f32 %d0, %a, %b", "f32 f32 f32", [(1.5, 2.25, 3.75), (SMALL, SMALL, 2 * SMALL), (INF, -INF, NAN)]),
    ("add.ftz.f32 %d0, %a, %b", "f32 f32 f32", [(SMALL, SMALL, 0.0), (1.5 * TINY, -TINY, 0.0), (1.0, SMALL, 1.0)]),
    ("sub.ftz.f32 %d0, %a, %b", "f32 f32 f32", [(1.0, 2.0, -1.0), (TINY, 1.5 * TINY, -0.0)]),
    ("mul.ftz.f32 %d0, %a, %b", "f32 f32 f32", [(3.0, 0.5, 1.5), (-TINY, 0.5, -0.0), (SMALL, 2.0**100, 0.0)]),
    ("mul.f32 %d0, %a, %b", "f32 f32 f32", [(TINY, 0.5, TINY / 2)]),
    ("fma.rn.f32 %d0, %a, %b, %c", "f32 f32 f32 f32", [(1 + 2.0**-12, 1 + 2.0**-12, -1 - 2.0**-11, 2.0**-24)]),
    (
        # The exact sum lies 2^-60 below a tie: rounded to float64 first, it would be the tie, and 1 + 2^-22 the result.
        "fma.rn.f32 %d0, %a, %b, %c",
        "f32 f32 f32 f32",
        [(2.0**-24 * (1 + 2.0**-18), 1 - 2.0**-18, 1 + 2.0**-23, 1 + 2.0**-23)],
    ),
    ("fma.rn.ftz.f32 %d0, %a, %b, %c", "f32 f32 f32 f32", [(2.0, 3.0, SMALL, 6.0), (TINY, 0.5, 0.0, 0.0)]),
    ("fma.rm.f32 %d0, %a, %b, %c", "f32 f32 f32 f32", [(1.0, 2.0**-30, 1.0, 1.0), (1.0, -SMALL, 1.0, 1 - 2.0**-24)]),
    ("fma.rn.f64 %d0, %a, %b, %c", "f64 f64 f64 f64", [(1 + 2.0**-30, 1 + 2.0**-30, -1 - 2.0**-29, 2.0**-60)]),
    ("div.rn.f32 %d0, %a, %b", "f32 f32 f32", [(1.0, 3.0, f32(0x3EAAAAAB)), (1.0, 0.0, INF), (0.0, 0.0, NAN)]),
    ("div.rn.ftz.f32 %d0, %a, %b", "f32 f32 f32", [(TINY, 2.0, 0.0), (SMALL, 1.0, 0.0)]),
    ("div.rn.f64 %d0, %a, %b", "f64 f64 f64", [(1.0, 3.0, 1 / 3)]),
    ("min.f32 %d0, %a, %b", "f32 f32 f32", [(NAN, 1.0, 1.0), (1.0, NAN, 1.0), (NAN, NAN, NAN), (0.0, -0.0, -0.0)]),
    ("max.f32 %d0, %a, %b", "f32 f32 f32", [(NAN, -1.0, -1.0), (-0.0, 0.0, 0.0), (0.0, -0.0, 0.0), (-INF, 1.0, 1.0)]),
    ("min.NaN.f32 %d0, %a, %b", "f32 f32 f32", [(NAN, 1.0, NAN), (1.0, NAN, NAN), (2.0, 1.0, 1.0)]),
    ("max.ftz.f32 %d0, %a, %b", "f32 f32 f32", [(SMALL, -1.0, 0.0), (2.0, 3.0, 3.0)]),
    ("max.f64 %d0, %a, %b", "f64 f64 f64", [(NAN, -1.0, -1.0), (2.0, 3.0, 3.0)]),
    ("abs.f32 %d0, %a", "f32 f32", [(-1.5, 1.5), (-0.0, 0.0)]),
    ("neg.f32 %d0, %a", "f32 f32", [(1.5, -1.5), (0.0, -0.0)]),
    ("ex2.approx.ftz.f32 %d0, %a", "f32 f32", [(3.0, 8.0), (-INF, 0.0), (-130.0, 0.0), (0.5, 2**0.5), (INF, INF)]),
    ("lg2.approx.f32 %d0, %a", "f32 f32", [(8.0, 3.0), (0.0, -INF), (-1.0, NAN), (SMALL, -140.0)]),
    ("lg2.approx.ftz.f32 %d0, %a", "f32 f32", [(8.0, 3.0), (SMALL, -INF)]),
    ("rcp.rn.f32 %d0, %a", "f32 f32", [(3.0, f32(0x3EAAAAAB))]),
    ("rcp.approx.ftz.f64 %d0, %a", "f64 f64", [(2.0, 0.5), (3.0, f64(0x3FD5555500000000)), (0.0, INF)]),
    ("sqrt.rn.f32 %d0, %a", "f32 f32", [(2.0, f32(0x3FB504F3))]),
    ("rsqrt.approx.f32 %d0, %a", "f32 f32", [(4.0, 0.5)]),
    ("copysign.f32 %d0, %a, %b", "f32 f32 f32", [(-1.0, 3.0, -3.0), (1.0, -3.0, 3.0)]),
    # Selection
    ("slct.f32.s32 %d0, %a, %b, %c", "f32 f32 s32 f32", [(1.0, 2.0, 0, 1.0), (1.0, 2.0, -1, 2.0)]),
    ("slct.u32.f32 %d0, %a, %b, %c", "u32 u32 f32 u32", [(1, 2, 0.0, 1), (1, 2, -0.5, 2), (1, 2, NAN, 2)]),
    # Moves
    ("mov.b64 {%t0, %t1}, %a; mov.b32 %d0, %t1", "u64 u32", [(5 << 32 | 7, 5)]),
    ("mov.b64 %d0, {%a, %b}", "u32 u32 u64", [(7, 5, 5 << 32 | 7)]),
    ("{ .reg .b16 l, h; mov.b32 {l, h}, %a; mov.b32 %d0, {h, l}; }", "u32 u32", [(0x12345678, 0x56781234)]),
    ("mov.f32 %d0, 0f3FC00000", "f32 f32", [(0.0, 1.5)]),
    ("mov.f64 %d0, 0d3FF8000000000000", "f64 f64", [(0.0, 1.5)]),
    # Conversions
    ("cvt.s64.s32 %d0, %a", "s32 s64", [(-5, -5)]),
    ("cvt.u64.u32 %d0, %a", "u32 u64", [(2**32 - 5, 2**32 - 5)]),
    ("cvt.u32.u64 %d0, %a", "u64 u32", [(5 << 32 | 7, 7)]),
    ("cvt.u16.u32 %d0, %a", "u32 u16", [(0x12345678, 0x5678)]),
    ("cvt.s32.s16 %d0, %a", "s16 s32", [(-5, -5)]),
    ("cvt.u32.u16 %d0, %a", "u16 u32", [(0xFFFB, 0xFFFB)]),
    ("cvt.sat.s16.s32 %d0, %a", "s32 s16", [(100000, 32767), (-100000, -32768), (-5, -5)]),
    ("cvt.s32.s8 %d0, %a", "s32 s32", [(0x1FB, -5)]),
    ("cvt.rn.f32.s32 %d0, %a", "s32 f32", [(16777217, 16777216.0), (16777219, 16777220.0), (-3, -3.0)]),
    ("cvt.rn.f64.s64 %d0, %a", "s64 f64", [(-3, -3.0)]),
    ("cvt.rzi.s32.f32 %d0, %a", "f32 s32", [(-1.75, -1), (3e9, 2**31 - 1), (-INF, -(2**31)), (NAN, 0)]),
    ("cvt.rni.s32.f32 %d0, %a", "f32 s32", [(2.5, 2), (3.5, 4), (-2.5, -2)]),
    ("cvt.rmi.s32.f32 %d0, %a", "f32 s32", [(-1.25, -2)]),
    ("cvt.rpi.s32.f32 %d0, %a", "f32 s32", [(1.25, 2)]),
    ("cvt.rzi.u32.f32 %d0, %a", "f32 u32", [(-5.0, 0), (5e9, 2**32 - 1)]),
    ("cvt.rni.f32.f32 %d0, %a", "f32 f32", [(2.5, 2.0), (-0.25, -0.0)]),
    ("cvt.sat.f32.f32 %d0, %a", "f32 f32", [(2.5, 1.0), (-1.0, 0.0), (NAN, 0.0), (0.25, 0.25)]),
    ("cvt.f64.f32 %d0, %a", "f32 f64", [(0.1, float(np.float32(0.1)))]),
    ("cvt.rn.f32.f64 %d0, %a", "f64 f32", [(1 + 2.0**-24, 1.0), (1 + 2.0**-24 + 2.0**-40, 1 + 2.0**-23)]),
    ("cvt.rn.ftz.f32.f64 %d0, %a", "f64 f32", [(SMALL, 0.0)]),
    ("cvt.f32.f16 %d0, %a", "f16 f32", [(0.5, 0.5), (2.0**-24, 2.0**-24)]),
    ("cvt.rn.f16.f32 %d0, %a", "f32 f16", [(1 + 2.0**-11, 1.0), (1 + 3 * 2.0**-11, 1 + 2.0**-9), (65520.0, INF)]),
    ("cvt.rn.bf16.f32 %d0, %a", "f32 u16", [(1 + 2.0**-8, 0x3F80), (1 + 3 * 2.0**-8, 0x3F82), (NAN, 0x7FFF)]),
    (
        "cvt.rn.bf16x2.f32 %d0, %a, %b",  # a is the upper half
        "f32 f32 u32",
        [(1.0, 2.0, 0x3F804000), (1 + 2.0**-8, 1 + 3 * 2.0**-8, 0x3F803F82), (INF, 3.4e38, 0x7F807F80)],
    ),
    ("cvt.rn.f16x2.f32 %d0, %a, %b", "f32 f32 u32", [(1.0, 2.0, 0x3C004000)]),
    (
        "cvt.rna.tf32.f32 %d0, %a",  # ties away from zero
        "f32 u32",
        [(1 + 2.0**-11, 0x3F802000), (-1 - 2.0**-11, 0xBF802000), (1.000488, 0x3F800000), (INF, 0x7F800000)],
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("instruction", "types", "rows"), TABLE, ids=[f"{i}-{row[0].split(' %')[0]}" for i, row in enumerate(TABLE)]
)
def test_instructions_by_hand(instruction, types, rows):
    *kinds, result = types.split()
    inputs = list(zip(kinds, zip(*[row[:-1] for row in rows], strict=True), strict=True))
    body = instruction if instruction.startswith("{") else f"{instruction};"
    (found,) = execute(body, inputs, [result])
    wanted = [row[-1] for row in rows]
    dtype = DTYPES[result]
    if dtype.kind == "f":
        expected = np.array(wanted, dtype)
        assert np.array_equal(found[: len(rows)], expected, equal_nan=True)
        numbers = ~np.isnan(expected)
        assert np.array_equal(np.signbit(found[: len(rows)])[numbers], np.signbit(expected)[numbers])
    else:
        assert [int(x) for x in found[: len(rows)]] == wanted


ORDERED = {"eq": "0010", "ne": "1101", "lt": "1000", "le": "1010", "gt": "0100", "ge": "0110"}  # for <, >, =, and NaN


@pytest.mark.parametrize("name", [*ORDERED, *(f"{n}u" for n in ORDERED), "num", "nan"])
@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_comparisons_of_floats(name, kind):
    """Ordered comparisons are false where an operand is NaN, those with u are true."""
    expected = {"num": [1, 1, 1, 0, 0, 0], "nan": [0, 0, 0, 1, 1, 1]}.get(name)
    if expected is None:
        less, greater, equal, _ = (int(bit) for bit in ORDERED[name.removesuffix("u") if len(name) == 3 else name])
        expected = [less, greater, equal, *[int(len(name) == 3)] * 3]
    a, b = [1.0, 2.0, 1.0, NAN, 1.0, NAN], [2.0, 1.0, 1.0, 1.0, NAN, NAN]
    body = f"setp.{name}.{kind} %p0, %a, %b; selp.u32 %d0, 1, 0, %p0;"
    assert execute(body, [(kind, a), (kind, b)], ["u32"])[0][:6].tolist() == expected


def test_comparisons_of_integers():
    values = [("s32", [-1, 1, 2]), ("s32", [1, -1, 2])]
    expected = {"lt.s32": [1, 0, 0], "lt.u32": [0, 1, 0], "lo.u32": [0, 1, 0], "hs.u32": [1, 0, 1], "eq.b32": [0, 0, 1]}
    for name, wanted in expected.items():
        body = f"setp.{name} %p0, %a, %b; selp.u32 %d0, 1, 0, %p0;"
        assert execute(body, values, ["u32"])[0][:3].tolist() == wanted, name


def test_comparisons_flush_subnormals_with_ftz():
    for ftz, wanted in (("", 0), (".ftz", 1)):
        body = f"setp.eq{ftz}.f32 %p0, %a, 0f00000000; selp.u32 %d0, 1, 0, %p0;"
        assert execute(body, [("f32", [SMALL])], ["u32"])[0][0] == wanted


def test_comparison_combined_with_a_predicate_and_its_complement():
    body = """setp.ne.s32 %p2, %b, 0;
    setp.lt.and.s32 %p0|%p1, %a, 5, !%p2;
    selp.u32 %d0, 1, 0, %p0;
    selp.u32 %d1, 1, 0, %p1;"""
    p, q = execute(body, [("s32", [1, 1, 9, 9]), ("s32", [0, 1, 0, 1])], ["u32", "u32"])
    assert p[:4].tolist() == [1, 0, 0, 0]
    assert q[:4].tolist() == [0, 0, 1, 0]


def test_guards_and_predicates():
    body = """setp.gt.s32 %p0, %a, 1;
    mov.u32 %d0, 7;
    @%p0 mov.u32 %d0, 8;
    @!%p0 add.s32 %d0, %d0, 2;
    not.pred %p1, %p0;
    or.pred %p2, %p0, %p1;
    @%p2 add.s32 %d0, %d0, 100;"""
    assert execute(body, [("s32", [0, 1, 2, 3])], ["u32"])[0][:4].tolist() == [109, 109, 108, 108]


def test_special_registers():
    body = """mov.u32 %d0, %laneid; mov.u32 %d1, %warpid; mov.u32 %d2, %ntid.x; cvt.u64.u32 %d3, %tid.x;"""
    lane, warp, size, thread = execute(body, [], ["u32", "u32", "u32", "u64"], threads=64)
    assert lane.tolist() == [*range(32)] * 2
    assert warp.tolist() == [0] * 32 + [1] * 32
    assert set(size.tolist()) == {64}
    assert thread.tolist() == [*range(64)]


def test_threads_that_diverge_meet_again():
    """Each thread runs a loop of its own length."""
    body = """mov.u32 %d0, 0;
    mov.u32 %t0, %thread;
    LOOP:
    setp.eq.s32 %p0, %t0, 0;
    @%p0 bra END;
    add.s32 %d0, %d0, %t0;
    add.s32 %t0, %t0, -1;
    bra.uni LOOP;
    END:
    add.s32 %d0, %d0, 1000;"""
    assert execute(body, [], ["u32"])[0].tolist() == [1000 + n * (n + 1) // 2 for n in range(32)]


@pytest.mark.parametrize(
    "body",
    [
        "add.rz.f32 %d0, %a, %b;",
        "sin.approx.f32 %d0, %a;",
        "cvt.rn.relu.f16.f32 %d0, %a;",
        "min.xorsign.f32 %d0, %a, %b;",
    ],
)
def test_an_unknown_instruction_is_an_error(body):
    with pytest.raises(PtxError, match="the machine knows"):
        execute(body, [("f32", [1.0]), ("f32", [2.0])], ["f32"])
