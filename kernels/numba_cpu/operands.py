"""What a call of the CPU kernels knows of its arguments: addresses, shapes, strides and dtypes, not whose memory it is.

An `Operand` describes the memory of a tensor or of an array; bfloat16, which NumPy does not have, is one like the
others. The kernels work on a `Map`, an operand whose positions are evenly spaced. Others are copied first, once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ccgpu.kernels.numba_cpu.lines import Map
from ccgpu.kernels.numba_cpu.pages import prefer_large_pages

Array = NDArray[Any]

_WORDS = {"float64": np.uint64, "float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16}


class Operand(NamedTuple):
    """The memory of a tensor or an array; the caller keeps that alive and in place."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes
    dtype: str  # its name in `kernels.dtypes`


class Arithmetic(NamedTuple):
    """How a dtype is computed. Both are NumPy types; any number of them tells the kernels the dtype."""

    like: Any  # of all sums and of the energies: np.float32 or np.float64
    kept: Any  # of the maps in memory: `like`, np.int16 in the place of bfloat16 or np.uint16 in that of float16
    memory: str  # the name of the dtype of the maps in memory; maps of another dtype are converted, as a whole, before


ARITHMETIC = {
    "float32": Arithmetic(np.float32, np.float32, "float32"),
    "float64": Arithmetic(np.float64, np.float64, "float64"),
    "bfloat16": Arithmetic(np.float32, np.int16, "bfloat16"),
    "float16": Arithmetic(np.float32, np.uint16, "float16"),
}
"""For each dtype of q, k and v, how this CPU computes it."""


def operand_of(x: Array) -> Operand:
    """Return the operand that an array is."""
    return Operand(x.ctypes.data, x.shape, x.strides, x.dtype.name)


def itemsize(x: Operand) -> int:
    """Return the bytes of an element."""
    return int(np.dtype(_WORDS[x.dtype]).itemsize)


class _Described:
    """Memory as NumPy's array interface describes it."""

    def __init__(self, **interface: Any) -> None:
        self.__array_interface__ = {"version": 3, **interface}


def words_of(x: Operand) -> Array:
    """Return an array of the bits of an operand, as unsigned integers, on the same memory."""
    words = np.dtype(_WORDS[x.dtype]).str
    return np.asarray(_Described(data=(x.address, False), shape=x.shape, strides=x.strides, typestr=words))


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


def _extent(x: Operand) -> int:
    """Return the bytes from the first element to the end of the last one, for strides that are not negative."""
    return itemsize(x) + sum((length - 1) * stride for length, stride in zip(x.shape, x.strides, strict=True))


class Input:
    """An operand that is read: its map, on its own memory or on that of a copy."""

    def __init__(self, x: Operand) -> None:
        layout = flat(x)
        if layout is None:
            self._copy = channels_last(words_of(x))
            layout = _map_of_copy(self._copy, x)
        self.map = layout


class Output:
    """An operand that is written: the map that the kernels write, on its own memory or on memory to copy from."""

    def __init__(self, x: Operand) -> None:
        self._target, self._computed, layout = x, None, flat(x)
        if layout is None:
            self._computed = channels_last(np.empty(x.shape, _WORDS[x.dtype]))
            layout = _map_of_copy(self._computed, x)
        elif min(x.strides) >= 0:  # the memory of a new result is often new to this process, too
            prefer_large_pages(x.address, _extent(x))
        self.map = layout

    def finish(self) -> None:
        """Fill the operand from the memory that the kernels have written, if that is another."""
        if self._computed is not None:
            words_of(self._target)[...] = self._computed


def channels_last(x: Array) -> Array:
    """Return a copy of x (B, channels, *S) whose memory is (B, *S, channels), aligned."""
    return np.moveaxis(np.array(np.moveaxis(x, 1, -1), order="C"), -1, 1)


def _map_of_copy(words: Array, x: Operand) -> Map:
    layout = flat(Operand(words.ctypes.data, x.shape, words.strides, x.dtype))
    assert layout is not None
    return layout
