"""cvt: conversions between types (PTX ISA, "Data Movement and Conversion Instructions: cvt").

cvt.rn.bf16x2.f32 d, a, b puts a into the upper half and b into the lower one. Float to integer saturates, NaN gives 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx import floats
from tests.ptx.arithmetic import Operation
from tests.ptx.parse import PtxError
from tests.ptx.registers import DTYPES

ROUND_TO_INTEGER: dict[str, Callable[[Any], Any]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
FLOATS = ("f16", "bf16", "f32", "f64")
HALVES = {"bf16x2": floats.to_bf16, "f16x2": floats.to_f16}


def _unknown(parts: tuple[str, ...]) -> PtxError:
    return PtxError(f"conversions: {'.'.join(parts)} must be a conversion that the machine knows; add it")


def _to_integer(x: Any, to: str) -> Any:
    """Saturate integers held by a float64 or an integer array."""
    dtype = DTYPES[to]
    least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
    if x.dtype.kind == "f":
        inside = np.where(np.isnan(x), 0.0, x)
        big, small = inside >= float(most), inside <= float(least)
        return np.where(big, most, np.where(small, least, np.where(big | small, 0.0, inside).astype(dtype)))
    return np.clip(x, max(least, np.iinfo(x.dtype).min), min(most, np.iinfo(x.dtype).max)).astype(dtype)


def _saturate(x: Any) -> Any:
    """.sat of a float: [0, 1], NaN is 0."""
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))


def _float_to_float(parts: tuple[str, ...], words: set[str], to: str, source: str) -> Callable[[Any], Any]:
    """Return the conversion of floats: widened exactly, rounded in place to integers, or narrowed to nearest even."""
    if (to, source) not in (("f32", "f32"), ("f64", "f64")) and words & set(ROUND_TO_INTEGER):
        raise _unknown(parts)
    rounding = next((ROUND_TO_INTEGER[word] for word in words if word in ROUND_TO_INTEGER), None)

    def convert(x: Any) -> Any:
        x = floats.from_bf16(x) if source == "bf16" else np.asarray(x)
        if "ftz" in words and source == "f32":
            x = floats.flush(x)
        if rounding is not None:
            x = rounding(x)
        if to == "bf16":
            return floats.to_bf16(x)
        if to == "f16":
            return floats.to_f16(x.astype(np.float32)).view(np.float16) if source != "f64" else x.astype(np.float16)
        x = x.astype(DTYPES[to])
        if "ftz" in words and to == "f32":
            x = floats.flush(x)
        return _saturate(x) if "sat" in words else x

    return convert


def _convert(parts: tuple[str, ...]) -> Operation:
    to, source, words = parts[-2], parts[-1], set(parts[1:-2])
    if to in HALVES and source == "f32" and words == {"rn"}:
        half = HALVES[to]
        return Operation(
            lambda a, b: half(a).astype(np.uint32) << np.uint32(16) | half(b).astype(np.uint32), ("f32", "f32"), to
        )
    if (to, source) == ("tf32", "f32") and words == {"rna"}:
        return Operation(floats.to_tf32, ("f32",), "b32")
    if words - {*ROUND_TO_INTEGER, "rn", "ftz", "sat"}:
        raise _unknown(parts)
    if to in FLOATS and source in FLOATS:
        return Operation(_float_to_float(parts, words, to, source), (source,), to)
    if source in FLOATS:
        rounding = next((ROUND_TO_INTEGER[word] for word in words if word in ROUND_TO_INTEGER), None)
        if rounding is None or source == "bf16":
            raise _unknown(parts)
        flushed = "ftz" in words and source == "f32"

        def to_integer(x: Any) -> Any:
            return _to_integer(rounding(np.asarray(floats.flush(x) if flushed else x, np.float64)), to)

        return Operation(to_integer, (source,), to)
    if to in FLOATS:
        if words != {"rn"} or to in ("bf16", "f16"):
            raise _unknown(parts)
        return Operation(lambda x: np.asarray(x).astype(DTYPES[to]), (source,), to)
    if "sat" in words:
        return Operation(lambda x: _to_integer(np.asarray(x), to), (source,), to)
    return Operation(lambda x: np.asarray(x).astype(DTYPES[to]), (source,), to)


def conversion(parts: tuple[str, ...]) -> Operation:
    """Return what a cvt computes.

    Raises:
        PtxError: the machine does not know it.
    """
    return _convert(parts)
