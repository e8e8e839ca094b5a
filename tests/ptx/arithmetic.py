"""What each instruction without memory or other threads computes: a NumPy function of its sources.

PTX ISA, chapter "Instructions": "Integer Arithmetic Instructions", "Floating Point Instructions", "Comparison and
Selection Instructions", "Logic and Shift Instructions". Moves and conversions are in conversions.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tests.ptx import floats
from tests.ptx.parse import PtxError
from tests.ptx.registers import DTYPES

FLOATS = ("f16", "f32", "f64")
WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


class Operation(NamedTuple):
    """A function of arrays, the types of its sources, and the type of its result."""

    function: Callable[..., Any]
    sources: tuple[str, ...]
    result: str


def _kind(parts: tuple[str, ...]) -> str:
    return parts[-1]


def _unknown(parts: tuple[str, ...]) -> PtxError:
    return PtxError(f"arithmetic: {'.'.join(parts)} must be an instruction that the machine knows; add it")


def _rounded(parts: tuple[str, ...], *known: str) -> None:
    """Raise for words between the opcode and the type that change the result in a way that is not modelled."""
    if set(parts[1:-1]) - {"ftz", *known}:
        raise _unknown(parts)


def _plain(parts: tuple[str, ...], integer: Any, real: Any, flushed: Any, count: int = 2) -> Operation:
    kind = _kind(parts)
    _rounded(parts, "rn")
    function = integer if kind not in FLOATS else flushed if "ftz" in parts else real
    if function is None or kind == "f16":
        raise _unknown(parts)
    return Operation(function, (kind,) * count, kind)


def _high(a: Any, b: Any) -> Any:
    """The high half of a product of 64-bit numbers, by halves."""
    wide = [[int(x) * int(y)] for x, y in np.broadcast(a, b)]
    bits = np.array([(product[0] >> 64) & (2**64 - 1) for product in wide], np.uint64)
    return bits.view(np.asarray(a).dtype)


def _multiply(parts: tuple[str, ...]) -> Operation:
    kind = _kind(parts)
    if kind in FLOATS:
        return _plain(parts, None, np.multiply, floats.multiply_ftz)
    mode = parts[1]
    if mode == "lo":
        return Operation(np.multiply, (kind, kind), kind)
    if mode == "wide":
        wide = DTYPES[WIDE[kind]].type
        return Operation(lambda a, b: np.multiply(a, b, dtype=wide), (kind, kind), WIDE[kind])
    if mode == "hi" and kind in WIDE:
        wide, narrow, bits = DTYPES[WIDE[kind]].type, DTYPES[kind].type, 8 * DTYPES[kind].itemsize
        return Operation(lambda a, b: (np.multiply(a, b, dtype=wide) >> wide(bits)).astype(narrow), (kind, kind), kind)
    if mode == "hi":
        return Operation(_high, (kind, kind), kind)
    raise _unknown(parts)


def _multiply_add(parts: tuple[str, ...]) -> Operation:
    product = _multiply(("mul", *parts[1:]))
    return Operation(lambda a, b, c: product.function(a, b) + c, (*product.sources, product.result), product.result)


def _fma(parts: tuple[str, ...]) -> Operation:
    kind = _kind(parts)
    if "rm" in parts and kind == "f32" and len(parts) == 3:
        return Operation(floats.fma_down, (kind,) * 3, kind)
    _rounded(parts, "rn")
    return Operation(floats.fma_ftz if "ftz" in parts else floats.fma, (kind,) * 3, kind)


def _quotient(a: Any, b: Any) -> Any:
    return (a - np.fmod(a, b)) // b


def _divide(parts: tuple[str, ...]) -> Operation:
    kind = _kind(parts)
    if kind not in FLOATS:
        return Operation(_quotient, (kind, kind), kind)
    _rounded(parts, "rn", "approx", "full")  # approx and full: at most 2 units in the last place, here none
    if "ftz" in parts:
        return Operation(lambda a, b: floats.flush(np.divide(floats.flush(a), floats.flush(b))), (kind, kind), kind)
    return Operation(np.divide, (kind, kind), kind)


def _unary(parts: tuple[str, ...], function: Any) -> Operation:
    kind = _kind(parts)
    _rounded(parts, "approx", "rn")
    if "ftz" in parts and kind == "f32":
        return Operation(lambda a: floats.flush(function(floats.flush(a))), (kind,), kind)
    return Operation(function, (kind,), kind)


def _approximate(function: Any) -> Any:
    """A function of float32 computed in float64 and rounded once, within the error that the ISA allows."""
    return lambda a: function(np.asarray(a, np.float64)).astype(np.float32)


def _reciprocal(parts: tuple[str, ...]) -> Operation:
    if parts == ("rcp", "approx", "ftz", "f64"):
        return Operation(floats.reciprocal_high, ("f64",), "f64")
    return _unary(parts, lambda a: np.divide(np.asarray(a).dtype.type(1), a))


def _amount(b: Any, bits: int) -> Any:
    return np.minimum(b, np.uint32(bits))


def _shift_left(parts: tuple[str, ...]) -> Operation:
    kind = _kind(parts)
    dtype, bits = DTYPES[kind], 8 * DTYPES[kind].itemsize
    return Operation(lambda a, b: np.left_shift(a, _amount(b, bits).astype(dtype)), (kind, "u32"), kind)


def _shift_right(parts: tuple[str, ...]) -> Operation:
    """Shifts by the width and more give zeros, or copies of the sign."""
    kind = _kind(parts)
    dtype, bits = DTYPES[kind], 8 * DTYPES[kind].itemsize
    return Operation(lambda a, b: np.right_shift(a, _amount(b, bits).astype(dtype)), (kind, "u32"), kind)


def _funnel(parts: tuple[str, ...]) -> Operation:
    """shf: 32 bits of the shifted concatenation [b, a]."""
    direction, mode = parts[1], parts[2]

    def shift(a: Any, b: Any, c: Any) -> Any:
        n = (np.minimum(c, np.uint32(32)) if mode == "clamp" else c & np.uint32(31)).astype(np.uint64)
        both = np.asarray(b).astype(np.uint64) << np.uint64(32) | np.asarray(a).astype(np.uint64)
        wide = (both << n) >> np.uint64(32) if direction == "l" else both >> n
        return wide.astype(np.uint32)

    return Operation(shift, ("u32",) * 3, "b32")


def _extract(parts: tuple[str, ...]) -> Operation:
    kind = _kind(parts)
    dtype = DTYPES[kind]
    top = np.uint64(8 * dtype.itemsize - 1)

    def extract(a: Any, b: Any, c: Any) -> Any:
        position, length = (np.asarray(x).astype(np.uint64) & np.uint64(255) for x in (b, c))
        unsigned = np.asarray(a).view(f"u{dtype.itemsize}").astype(np.uint64)
        ones = np.where(length > top, ~np.uint64(0), (np.uint64(1) << np.minimum(length, top)) - np.uint64(1))
        field = np.where(position > top, np.uint64(0), unsigned >> np.minimum(position, top)) & ones
        if dtype.kind == "i":
            last = np.minimum(position + np.maximum(length, np.uint64(1)) - np.uint64(1), top)
            sign = (unsigned >> last & np.uint64(1)).astype(bool) & (length > 0)
            held = np.minimum(length, np.where(position > top, np.uint64(0), top + np.uint64(1) - position))
            filled = np.where(held > np.uint64(63), np.uint64(0), ~np.uint64(0) << np.minimum(held, np.uint64(63)))
            field = np.where(sign, field | filled, field)
        return field.astype(f"u{dtype.itemsize}").view(dtype)

    return Operation(extract, (kind, "u32", "u32"), kind)


def _insert(parts: tuple[str, ...]) -> Operation:
    kind = _kind(parts)
    dtype = DTYPES[kind]
    top = np.uint64(8 * dtype.itemsize - 1)

    def insert(a: Any, b: Any, c: Any, d: Any) -> Any:
        position, length = (np.asarray(x).astype(np.uint64) & np.uint64(255) for x in (c, d))
        ones = np.where(length > top, ~np.uint64(0), (np.uint64(1) << np.minimum(length, top)) - np.uint64(1))
        place = np.where(position > top, np.uint64(0), ones << np.minimum(position, top))
        field = np.asarray(a).astype(np.uint64) << np.minimum(position, top)
        return ((np.asarray(b).astype(np.uint64) & ~place) | (field & place)).astype(dtype)

    return Operation(insert, (kind, kind, "u32", "u32"), kind)


def _permute(parts: tuple[str, ...]) -> Operation:
    """prmt without a mode: each nibble of c picks a byte of {b, a}, or with its top bit copies of that byte's sign."""
    if parts != ("prmt", "b32"):
        raise _unknown(parts)

    def permute(a: Any, b: Any, c: Any) -> Any:
        both = np.asarray(b).astype(np.uint64) << np.uint64(32) | np.asarray(a).astype(np.uint64)
        result = np.uint64(0)
        for i in range(4):
            nibble = np.asarray(c).astype(np.uint64) >> np.uint64(4 * i) & np.uint64(15)
            byte = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            byte = np.where(nibble > 7, np.where(byte > 127, np.uint64(255), np.uint64(0)), byte)
            result = result | byte << np.uint64(8 * i)
        return result.astype(np.uint32)

    return Operation(permute, ("b32",) * 3, "b32")


def _look_up(parts: tuple[str, ...]) -> Operation:
    """lop3: bit of the table at the number that the bits of a, b, c form, a highest."""
    if parts != ("lop3", "b32"):
        raise _unknown(parts)

    def look_up(a: Any, b: Any, c: Any, table: Any) -> Any:
        result = np.zeros_like(np.asarray(a))
        for number in range(8):
            if int(table) >> number & 1:
                bits = [x if number & weight else ~x for x, weight in ((a, 4), (b, 2), (c, 1))]
                result |= bits[0] & bits[1] & bits[2]
        return result

    return Operation(look_up, ("b32",) * 4, "b32")


def _logic(parts: tuple[str, ...], function: Any, count: int = 2) -> Operation:
    return Operation(function, (_kind(parts),) * count, _kind(parts))


def compare(parts: tuple[str, ...]) -> tuple[Callable[[Any, Any], Any], str]:
    """Return setp's comparison and the type that it compares; parts are the opcode's words."""
    name, kind, ftz = parts[1], _kind(parts), "ftz" in parts
    ordered = {"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
    unsigned = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}

    def unordered(a: Any, b: Any) -> Any:
        return np.isnan(a) | np.isnan(b)

    if kind not in FLOATS:
        function = {**ordered, "ne": np.not_equal}.get(unsigned.get(name, name))
        kind = kind.replace("b", "u")
    elif name == "ne":  # false if an operand is NaN, unlike NumPy's
        function = lambda a, b: np.less(a, b) | np.greater(a, b)  # noqa: E731
    elif name in ("num", "nan"):
        function = unordered if name == "nan" else lambda a, b: ~unordered(a, b)
    elif name == "neu":
        function = np.not_equal
    elif name.endswith("u"):
        function = lambda a, b: ordered[name[:-1]](a, b) | unordered(a, b)  # noqa: E731
    else:
        function = ordered.get(name)
    if function is None:
        raise _unknown(parts)
    if ftz:
        return lambda a, b: function(floats.flush(a), floats.flush(b)), kind
    return function, kind


def _select(parts: tuple[str, ...]) -> Operation:
    return Operation(lambda a, b, c: np.where(c, a, b), (_kind(parts), _kind(parts), "pred"), _kind(parts))


def _select_by_sign(parts: tuple[str, ...]) -> Operation:
    kind = parts[-2]
    return Operation(lambda a, b, c: np.where(c >= 0, a, b), (kind, kind, parts[-1]), kind)


def _count_leading(a: Any) -> Any:
    bits = 8 * np.asarray(a).itemsize
    return np.array([bits - int(x).bit_length() for x in np.atleast_1d(a)], np.uint32)


def _count_ones(a: Any) -> Any:
    return np.array([int(x).bit_count() for x in np.atleast_1d(a)], np.uint32)


def _reverse(parts: tuple[str, ...]) -> Operation:
    bits = 8 * DTYPES[_kind(parts)].itemsize
    dtype = DTYPES[_kind(parts)]
    return Operation(
        lambda a: np.array([int(f"{int(x):0{bits}b}"[::-1], 2) for x in np.atleast_1d(a)], dtype),
        *((_kind(parts),), _kind(parts)),
    )


def _extreme(parts: tuple[str, ...], integer: Any, real: Any) -> Operation:
    """min and max; with .NaN the result is NaN if an operand is."""
    kind = _kind(parts)
    _rounded(parts, "NaN")
    if kind not in FLOATS:
        return Operation(integer, (kind, kind), kind)

    def extreme(a: Any, b: Any) -> Any:
        if "ftz" in parts:
            a, b = floats.flush(a), floats.flush(b)
        result = real(a, b)
        return np.where(np.isnan(a) | np.isnan(b), np.float32(np.nan), result) if "NaN" in parts else result

    return Operation(extreme, (kind, kind), kind)


OPERATIONS: dict[str, Callable[[tuple[str, ...]], Operation]] = {
    "add": lambda p: _plain(p, np.add, np.add, floats.add_ftz),
    "sub": lambda p: _plain(p, np.subtract, np.subtract, floats.subtract_ftz),
    "mul": _multiply,
    "mad": _multiply_add,
    "fma": _fma,
    "div": _divide,
    "rem": lambda p: Operation(np.fmod, (_kind(p),) * 2, _kind(p)),
    "min": lambda p: _extreme(p, np.minimum, floats.minimum),
    "max": lambda p: _extreme(p, np.maximum, floats.maximum),
    "abs": lambda p: _unary(p, np.abs),
    "neg": lambda p: _unary(p, np.negative),
    "rcp": _reciprocal,
    "sqrt": lambda p: _unary(p, np.sqrt),
    "rsqrt": lambda p: _unary(p, _approximate(lambda x: 1.0 / np.sqrt(x))),
    "ex2": lambda p: _unary(p, _approximate(np.exp2)),
    "lg2": lambda p: _unary(p, _approximate(np.log2)),
    "copysign": lambda p: Operation(lambda a, b: np.copysign(b, a), (_kind(p),) * 2, _kind(p)),
    "and": lambda p: _logic(p, np.bitwise_and),
    "or": lambda p: _logic(p, np.bitwise_or),
    "xor": lambda p: _logic(p, np.bitwise_xor),
    "not": lambda p: _logic(p, np.invert, 1),
    "shl": _shift_left,
    "shr": _shift_right,
    "shf": _funnel,
    "bfe": _extract,
    "bfi": _insert,
    "prmt": _permute,
    "lop3": _look_up,
    "brev": _reverse,
    "clz": lambda p: Operation(_count_leading, (_kind(p).replace("b", "u"),), "u32"),
    "popc": lambda p: Operation(_count_ones, (_kind(p).replace("b", "u"),), "u32"),
    "selp": _select,
    "slct": _select_by_sign,
}


def operation(parts: tuple[str, ...]) -> Operation:
    """Return what an opcode, given by its words, computes.

    Raises:
        PtxError: the machine does not know it.
    """
    try:
        return OPERATIONS[parts[0]](parts)
    except KeyError:
        raise _unknown(parts) from None
