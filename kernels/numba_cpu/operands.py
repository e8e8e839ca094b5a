"""What a call of the CPU kernels knows of its arguments: addresses, shapes, strides and dtypes, not whose memory it is.

An `Operand` describes the memory of a tensor or of an array; bfloat16, which NumPy does not have, is one like the
others. The kernels work on a `Map`, an operand whose positions are evenly spaced. Others are copied first, once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ccgpu.kernels.numba_cpu import dot_products
from ccgpu.kernels.numba_cpu.lines import Map

Array = NDArray[Any]

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_WORDS = {name: np.dtype(f"u{size}") for name, size in _BYTES.items()}


class Layout(NamedTuple):
    """An operand without its address."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes
    dtype: str  # its name in `kernels.dtypes`


class Operand(NamedTuple):
    """The memory of a tensor or an array; the caller keeps that alive and in place."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes
    dtype: str  # its name in `kernels.dtypes`

    @property
    def layout(self) -> Layout:
        """Return all but the address."""
        return Layout(*self[1:])


class Arithmetic(NamedTuple):
    """How a dtype is computed. Both are NumPy types; any number of them tells the kernels the dtype."""

    like: Any  # of all sums and of the energies: np.float32 or np.float64
    kept: Any  # of the maps in memory: `like`, np.int16 in the place of bfloat16 or np.uint16 in that of float16


ARITHMETIC = {
    "float32": Arithmetic(np.float32, np.float32),
    "float64": Arithmetic(np.float64, np.float64),
    "bfloat16": Arithmetic(np.float32, np.int16),
    "float16": Arithmetic(np.float32, np.uint16),
}
"""For each dtype of q, k and v, how this CPU computes it."""


def arithmetic_of(dtype: str) -> str:
    """Say how the kernels compute a dtype on this CPU, for example "float16 converted to float32 in registers"."""
    arithmetic = ARITHMETIC[dtype]
    if dot_products.used_for(arithmetic.kept):
        return f"{dtype} by dot-product instructions"
    return dtype if arithmetic.kept is arithmetic.like else f"{dtype} converted to float32 in registers"


def operand_of(x: Array) -> Operand:
    """Return the operand that an array is."""
    return Operand(x.ctypes.data, x.shape, x.strides, x.dtype.name)


def word(x: Operand | Layout) -> np.dtype[Any]:
    """Return the dtype of the bits of an element as an unsigned integer."""
    return _WORDS[x.dtype]


def itemsize(x: Operand | Layout) -> int:
    """Return the bytes of an element."""
    return int(word(x).itemsize)


class _Described:
    """Memory as NumPy's array interface describes it."""

    def __init__(self, **interface: Any) -> None:
        self.__array_interface__ = {"version": 3, **interface}


def words_of(x: Operand) -> Array:
    """Return an array of the bits of an operand, as unsigned integers, on the same memory."""
    described = _Described(data=(x.address, False), shape=x.shape, strides=x.strides, typestr=word(x).str)
    return np.asarray(described)


def flat(x: Operand) -> Map | None:
    """Return x (B, channels, *S) as a map (images, positions, channels), or None if x must be copied for that.

    The positions must be evenly spaced in memory, and either they or the channels contiguous.
    """
    size = itemsize(x)
    strides = [(stride, length) for stride, length in zip(x.strides[2:], x.shape[2:], strict=True) if length > 1]
    step, count = (strides[-1][0] if strides else size), 1
    for stride, length in reversed(strides):
        if stride != step * count:
            return None
        count *= length
    channel = x.strides[1] if x.shape[1] > 1 else size
    image = x.strides[0] if x.shape[0] > 1 else 0
    if size not in (step, channel) or any(number % size for number in (x.address, image, step, channel)):
        return None
    return Map(x.address, image, step, channel)


def extent(x: Operand | Layout) -> int:
    """Return the bytes from the first element to the end of the last one, for strides that are not negative."""
    return itemsize(x) + sum((length - 1) * stride for length, stride in zip(x.shape, x.strides, strict=True))


def channels_last(x: Array) -> Array:
    """Return a copy of x (B, channels, *S) whose memory is (B, *S, channels), aligned."""
    return np.moveaxis(np.array(np.moveaxis(x, 1, -1), order="C"), -1, 1)
