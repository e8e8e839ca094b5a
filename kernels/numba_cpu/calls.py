"""Criss-cross attention on the CPU, NumPy arrays in and out: kernels compiled by Numba, on threads of their own.

Arrays are (B, channels, *S) with one, two or three axes S, float32, float64, or float16, which is computed in float32.
Channels-last memory is used without a copy if its channels fill whole vectors, NCHW memory is gathered by whole
vectors, and memory in which neither channels nor positions are contiguous is copied first. Temporaries are a few MB a
thread.

Results do not depend on the number of threads, to the bit. The first call of a dtype compiles for some seconds; Numba
caches the machine code on disk (NUMBA_CACHE_DIR) for later processes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccgpu.kernels.dtypes import energy_dtype
from ccgpu.kernels.numba_cpu.cache import AFFINITY, AGGREGATE, BACKWARD, FORWARD
from ccgpu.kernels.numba_cpu.schedule import Input, Output, Problem, thread_count

Array = NDArray[Any]


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
    dtype = energy_dtype(q.dtype).type
    lse = np.empty((q.shape[0], *q.shape[2:]), dtype)
    target = np.empty_like(v, subok=False) if out is None else out
    if lse.size == 0:
        return target, lse
    inputs, result = [Input(x, dtype) for x in (q, k, v)], Output(target, dtype)
    row_max, row_sum = np.empty_like(lse), np.empty_like(lse)
    operands: list[Input | Output] = [*inputs, result]
    maps = [x.map for x in operands]
    Problem(q.shape[0], q.shape[2:], dtype, thread_count(threads)).run(
        FORWARD,
        operands,
        depth=q.shape[1],
        channels=v.shape[1],
        scale=float(scale),
        products=q.shape[1] + v.shape[1],
        arguments=(*maps, lse.ctypes.data, row_max.ctypes.data, row_sum.ctypes.data),
    )
    return result.finish(), lse


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
    dtype = energy_dtype(q.dtype).type
    if gradients is None:
        gradients = np.empty_like(q, subok=False), np.empty_like(k, subok=False), np.empty_like(v, subok=False)
    if lse.size == 0:
        return gradients
    inputs, results = [Input(x, dtype) for x in (dout, q, k, v, out)], [Output(x, dtype) for x in gradients]
    saved, delta = np.ascontiguousarray(lse, dtype), np.ascontiguousarray(-dlse, dtype)
    Problem(q.shape[0], q.shape[2:], dtype, thread_count(threads), backward=True).run(
        BACKWARD,
        [*inputs, *results],
        depth=q.shape[1],
        channels=v.shape[1],
        scale=float(scale),
        products=3 * q.shape[1] + 2 * v.shape[1],
        arguments=(*(x.map for x in inputs), saved.ctypes.data, delta.ctypes.data, *(x.map for x in results)),
    )
    dq, dk, dv = (x.finish() for x in results)
    return dq, dk, dv


def affinity(q: Array, k: Array, *, threads: int | None = None, out: Array | None = None) -> Array:
    """Return the energies q_u . k_i (B, K, *S); see `kernels.reference.affinity`.

    Args:
        q, k: (B, D, *S), any strides.
        threads: as in `forward`.
        out: array (B, *S, K) for the energies, C-contiguous, in their dtype; None: a new array.

    Returns:
        Energies, float32 (float64 for float64), in channels-last memory: the K energies of a position are contiguous.
    """
    dtype, sizes = energy_dtype(q.dtype).type, q.shape[2:]
    energies = np.empty((q.shape[0], *sizes, sum(sizes) - len(sizes) + 1), dtype) if out is None else out
    if energies.size:
        inputs: list[Input | Output] = [Input(x, dtype) for x in (q, k)]
        Problem(q.shape[0], sizes, dtype, thread_count(threads)).run(
            AFFINITY,
            inputs,
            depth=q.shape[1],
            channels=1,
            scale=1.0,
            products=q.shape[1],
            arguments=(*(x.map for x in inputs), energies.ctypes.data),
        )
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
    dtype = energy_dtype(v.dtype).type
    target = np.empty_like(v, subok=False) if out is None else out
    if v.size == 0:
        return target
    wide = np.ascontiguousarray(np.moveaxis(weights, 1, -1), dtype)
    values, result = Input(v, dtype), Output(target, dtype)
    Problem(v.shape[0], v.shape[2:], dtype, thread_count(threads)).run(
        AGGREGATE,
        [values, result],
        depth=1,
        channels=v.shape[1],
        scale=1.0,
        products=v.shape[1],
        arguments=(wide.ctypes.data, values.map, result.map, transposed),
    )
    return result.finish()
