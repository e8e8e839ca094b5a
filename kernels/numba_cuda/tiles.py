"""Device functions of the Numba CUDA kernels: rows of a line in shared memory, and products of tiles.

The twin of cuda/tiles.cuh and arithmetic.cuh, with the same names.

A block is a square of side x side threads. Thread (tx, ty) owns, of a product with `tile` rows and columns, the rows
ty, ty + side, ty + 2 side ... and the columns tx, tx + side ..., in registers: x[i, j] is row ty + i side, column
tx + j side. So neighbouring threads read and write neighbouring channels, and each element that a thread reads from
shared memory is used for several of its sums. The rows of a tile are chunk + 1 elements apart, so that the elements of
a column lie in different banks.

Sums are float32, or float64 for float64 arrays; float16 elements are converted when they are loaded. The device
functions of this file contain no barriers: the kernels have them, where one sees what they separate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

DeviceFunction = Callable[..., Any]


class Shape(NamedTuple):
    """The compile-time constants of a kernel: a block of side x side threads, and the sizes of its shared memory.

    `tile` and `chunk` are multiples of `side`. Shared memory: two tiles of tile x (chunk + 1) numbers and a sheet of
    tile x (tile + 1).
    """

    tile: int  # positions of a segment, as queries and as keys
    side: int  # threads of a block along each of its two axes
    chunk: int  # channels in shared memory at once
    real: type[np.floating[Any]] = np.float32  # type of energies, weights and sums

    @property
    def parts(self) -> int:
        """Rows, and columns, that a thread owns of a product of tile x tile."""
        return self.tile // self.side

    @property
    def columns(self) -> int:
        """Columns that a thread owns of a product of tile x chunk."""
        return self.chunk // self.side

    @property
    def square(self) -> tuple[int, int]:
        """A thread's part of a product of tile x tile."""
        return self.parts, self.parts

    @property
    def stripe(self) -> tuple[int, int]:
        """A thread's part of a product of tile x chunk."""
        return self.parts, self.columns

    @property
    def rows(self) -> tuple[int, int]:
        """A tile in shared memory: a chunk of channels of its positions."""
        return self.tile, self.chunk + 1

    @property
    def sheet(self) -> tuple[int, int]:
        """Weights in shared memory: a row for each query, a column for each key."""
        return self.tile, self.tile + 1

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block of the fused kernels: two tiles and a sheet."""
        return (2 * math.prod(self.rows) + math.prod(self.sheet)) * np.dtype(self.real).itemsize


@lru_cache
def load_rows_of(shape: Shape) -> DeviceFunction:
    """Return the function that copies rows of a line to a tile."""
    TILE, CHUNK, THREADS, zero = shape.tile, shape.chunk, shape.side**2, shape.real(0)
    TURNS, real = -(-TILE * CHUNK // THREADS), shape.real

    @cuda.jit(device=True)
    def load_rows(
        tile: Any, x: Any, image: Any, first: Any, inner: Any, rows: Any, channel: Any, channels: Any, thread: Any
    ) -> None:
        """Copy a chunk of channels of the positions first, first + inner ...; zeros beyond `rows` and the channels."""
        for turn in range(TURNS):
            index = turn * THREADS + thread
            row, column = index // CHUNK, index % CHUNK
            if row < TILE:
                value = zero
                if row < rows and channel + column < channels:
                    value = real(x[image, first + row * inner, channel + column])
                tile[row, column] = value

    return load_rows


@lru_cache
def load_numbers_of(shape: Shape) -> DeviceFunction:
    """Return the function that reads one number for each of a thread's rows into its registers."""
    SIDE, PARTS = shape.side, shape.parts

    @cuda.jit(device=True)
    def load_numbers(numbers: Any, x: Any, fill: Any, image: Any, first: Any, inner: Any, rows: Any, ty: Any) -> None:
        """Read x at the positions first, first + inner ...; `fill` beyond `rows`."""
        for i in range(PARTS):
            row, numbers[i] = ty + i * SIDE, fill
            if row < rows:
                numbers[i] = x[image, first + row * inner]

    return load_numbers


@lru_cache
def multiply_rows_of(shape: Shape) -> DeviceFunction:
    """Return the function that multiplies the rows of two tiles."""
    SIDE, PARTS = shape.side, shape.parts

    @cuda.jit(device=True)
    def multiply_rows(x: Any, a: Any, b: Any, channels: Any, tx: Any, ty: Any) -> None:
        """x += a b^T over the channels of two tiles: energies, and gradients of weights."""
        for d in range(channels):
            for i in range(PARTS):
                for j in range(PARTS):
                    x[i, j] += a[ty + i * SIDE, d] * b[tx + j * SIDE, d]

    return multiply_rows


@lru_cache
def multiply_weights_of(shape: Shape, transposed: bool) -> DeviceFunction:
    """Return the function that multiplies a sheet of weights, or its transpose, by rows of values."""
    SIDE, PARTS, COLUMNS, zero = shape.side, shape.parts, shape.columns, shape.real(0)

    @cuda.jit(device=True)
    def multiply_weights(x: Any, weights: Any, values: Any, count: Any, tx: Any, ty: Any) -> None:
        """x = weights . values, a chunk of channels: sums for queries; weights^T . values: sums for keys."""
        for i in range(PARTS):
            for j in range(COLUMNS):
                x[i, j] = zero
        for n in range(count):
            for i in range(PARTS):
                for j in range(COLUMNS):
                    weight = weights[n, ty + i * SIDE] if transposed else weights[ty + i * SIDE, n]
                    x[i, j] += weight * values[n, tx + j * SIDE]

    return multiply_weights


@lru_cache
def put_results_of(shape: Shape) -> DeviceFunction:
    """Return the function that writes a thread's sums to global memory, or adds them to what is there."""
    SIDE, PARTS, COLUMNS = shape.side, shape.parts, shape.columns

    @cuda.jit(device=True)
    def put_results(
        to: Any, x: Any, factor: Any, before: Any, adds: Any,
        image: Any, first: Any, inner: Any, rows: Any, channel: Any, channels: Any, tx: Any, ty: Any,
    ) -> None:  # fmt: skip
        """Write factor * x to the positions first, first + inner ...; with `adds`, plus before * (the old value).

        `factor` and `before` hold a number for each of the thread's rows.
        """
        for i in range(PARTS):
            row = ty + i * SIDE
            for j in range(COLUMNS):
                column = channel + tx + j * SIDE
                if row < rows and column < channels:
                    result = factor[i] * x[i, j]
                    if adds:
                        result += before[i] * to[image, first + row * inner, column]
                    to[image, first + row * inner, column] = result

    return put_results
