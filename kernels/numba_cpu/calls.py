"""Criss-cross attention on the CPU, NumPy arrays in and out: kernels compiled by Numba, on threads of their own.

Arrays are (B, channels, *S) with one, two or three axes S, float32, float64, or float16, which is computed in float32
and rounded where results are written, once for each axis. Channels-last memory is used without a copy if its channels
fill whole vectors, NCHW memory and float16 are gathered by whole vectors, and memory in which neither channels nor
positions are contiguous is copied first. Temporaries are a few MB a thread.

Results do not depend on the number of threads, to the bit. The first call of a dtype compiles for some seconds; Numba
caches the machine code on disk (NUMBA_CACHE_DIR) for later processes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccgpu.kernels.dtypes import energy_dtype
from ccgpu.kernels.numba_cpu import launch
from ccgpu.kernels.numba_cpu.operands import Operand, operand_of

Array = NDArray[Any]


class _Arrays:
    """The operands of a call of arrays, in one dtype in native byte order: the arrays, or copies."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype.newbyteorder("=")
        self._alive: list[Array] = []
        self._results: list[tuple[Array, Array]] = []

    def read(self, x: Array) -> Operand:
        """Return the operand of an array that is read."""
        return self._operand(x.astype(self._dtype, copy=False))

    def write(self, x: Array) -> Operand:
        """Return the operand of an array that `finish` completes."""
        if x.dtype == self._dtype:
            return self._operand(x)
        self._results.append((x, np.empty_like(x, dtype=self._dtype)))
        return self._operand(self._results[-1][1])

    def finish(self) -> None:
        """Fill the arrays that are written from their copies."""
        with np.errstate(over="ignore", invalid="ignore"):
            for x, computed in self._results:
                x[...] = computed

    def _operand(self, x: Array) -> Operand:
        self._alive.append(x)
        return operand_of(x)


def forward(
    q: Array,
    k: Array,
    v: Array,
    scale: float = 1.0,
    *,
    threads: int | None = None,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """Return criss-cross attention and the log-sum-exp of its energies; see `kernels.reference.forward`.

    Args:
        q, k: (B, D, *S), any strides.
        v: (B, C, *S), of the same dtype.
        scale: factor of the energies.
        threads: number of threads that share the work; None: NUMBA_NUM_THREADS, or all cores if that is not set.
        out: array of v's shape and dtype for the result; None: a new array in v's memory order.

    Returns:
        out (B, C, *S); lse (B, *S), float32 (float64 for float64), C-contiguous.
    """
    lse = np.empty((q.shape[0], *q.shape[2:]), energy_dtype(q.dtype))
    target = np.empty_like(v, subok=False) if out is None else out
    arrays = _Arrays(q.dtype)
    maps = [*(arrays.read(x) for x in (q, k, v)), arrays.write(target)]
    launch.forward(*maps, lse=lse.ctypes.data, scale=float(scale), threads=threads)
    arrays.finish()
    return target, lse


def backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    dlse: Array,
    scale: float = 1.0,
    *,
    threads: int | None = None,
    gradients: tuple[Array, Array, Array] | None = None,
) -> tuple[Array, Array, Array]:
    """Return the gradients of q, k and v; see `kernels.reference.backward`.

    Args:
        dout, dlse: the gradients of out and lse.
        q, k, v, scale, threads: as in `forward`.
        out, lse: the results of `forward`.
        gradients: arrays of the shapes and dtype of q, k, v for the results; None: new arrays in their memory orders.

    Returns:
        dq, dk, dv.
    """
    if gradients is None:
        gradients = np.empty_like(q, subok=False), np.empty_like(k, subok=False), np.empty_like(v, subok=False)
    arrays, dtype = _Arrays(q.dtype), energy_dtype(q.dtype)
    maps = [arrays.read(x) for x in (dout, q, k, v, out)]
    maps += [arrays.write(x) for x in gradients]
    saved, given = np.ascontiguousarray(lse, dtype), np.ascontiguousarray(dlse, dtype)
    launch.backward(*maps, lse=saved.ctypes.data, dlse=given.ctypes.data, scale=float(scale), threads=threads)
    arrays.finish()
    return gradients


def affinity(q: Array, k: Array, *, threads: int | None = None, out: Array | None = None) -> Array:
    """Return the energies q_u . k_i (B, K, *S); see `kernels.reference.affinity`.

    Args:
        q, k: (B, D, *S), any strides.
        threads: as in `forward`.
        out: array (B, *S, K) for the energies, C-contiguous, in their dtype; None: a new array.

    Returns:
        Energies, float32 (float64 for float64), in channels-last memory: the K energies of a position are contiguous.
    """
    sizes, arrays = q.shape[2:], _Arrays(q.dtype)
    shape = (q.shape[0], *sizes, sum(sizes) - len(sizes) + 1)
    energies = np.empty(shape, energy_dtype(q.dtype)) if out is None else out
    launch.affinity(arrays.read(q), arrays.read(k), energies.ctypes.data, threads)
    return np.moveaxis(energies, -1, 1)


def aggregate(weights: Array, v: Array, *, threads: int | None = None, out: Array | None = None) -> Array:
    """Return each position's weighted sum of v over its neighbours (B, C, *S); see `kernels.reference.aggregate`.

    Args:
        weights: (B, K, *S), any strides.
        v: (B, C, *S), any strides.
        threads, out: as in `forward`.
    """
    return _weighted_sum(weights, v, threads, out, transposed=False)


def aggregate_transposed(weights: Array, x: Array, *, threads: int | None = None, out: Array | None = None) -> Array:
    """Return the transpose of `aggregate` applied to x (B, C, *S); see `kernels.reference.aggregate_transposed`.

    Args:
        weights, threads, out: as in `aggregate`.
        x: (B, C, *S), any strides.
    """
    return _weighted_sum(weights, x, threads, out, transposed=True)


def _weighted_sum(weights: Array, v: Array, threads: int | None, out: Array | None, *, transposed: bool) -> Array:
    target = np.empty_like(v, subok=False) if out is None else out
    dtype = energy_dtype(v.dtype)  # also of the sums, which are rounded once, and not once for each axis
    wide, arrays = np.ascontiguousarray(np.moveaxis(weights, 1, -1), dtype), _Arrays(dtype)
    values, result = arrays.read(v), arrays.write(target)
    launch.aggregate(wide.ctypes.data, values, result, threads, transposed=transposed)
    arrays.finish()
    return target
