"""Criss-cross attention on CUDA devices in Numba: device arrays of any layout in and out.

`forward` and `backward` take arrays (B, channels, *S) with `__cuda_array_interface__`, of any strides. Arrays that are
not channels-last in memory are copied on the device by a kernel of this file; launch.py launches the kernels of the op.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numba import cuda

from ccgpu.kernels.dtypes import energy_dtype
from ccgpu.kernels.numba_cuda import launch

if launch.SIMULATED:
    from ccgpu.kernels.numba_cuda.simulator import FakeCUDAArray  # stands for a device array there

COPY_THREADS = 2 if launch.SIMULATED else 64


class _View:
    """The memory of a device array under another shape and other strides, as `__cuda_array_interface__`."""

    def __init__(self, array: Any, shape: tuple[int, ...], strides: tuple[int, ...] | None) -> None:
        self.owner = array
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, "shape": shape, "strides": strides}


def _contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple(itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _view(x: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    """Return a device array on x's memory with another shape and other strides."""
    if launch.SIMULATED:
        return FakeCUDAArray(np.lib.stride_tricks.as_strided(x._ary, shape, strides))
    contiguous = strides == _contiguous_strides(shape, x.dtype.itemsize)
    return cuda.as_cuda_array(_View(x, shape, None if contiguous else strides), sync=False)


@lru_cache
def copy_kernel() -> Any:
    """Return the kernel that copies an array (B, S0, S1, S2, channels) of any strides and dtype, a block a position."""

    @cuda.jit
    def copy_elements(source: Any, target: Any, sizes: Any, channels: Any) -> None:
        position = cuda.blockIdx.x
        position, c = position // sizes[2], position % sizes[2]
        position, b = position // sizes[1], position % sizes[1]
        image, a = position // sizes[0], position % sizes[0]
        for channel in range(cuda.threadIdx.x, channels, cuda.blockDim.x):
            target[image, a, b, c, channel] = source[image, a, b, c, channel]

    return copy_elements


def _with_five_axes(x: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return shape and strides of x (B, channels, *S) as (B, S0, S1, S2, channels), axes of length 1 in front."""
    missing = 5 - len(x.shape)
    shape = (x.shape[0], *(1,) * missing, *x.shape[2:], x.shape[1])
    return shape, (x.strides[0], *(0,) * missing, *x.strides[2:], x.strides[1])


def _copy(source: Any, target: Any, stream: Any) -> None:
    """Enqueue a copy between arrays (B, channels, *S)."""
    (shape, strides), (_, target_strides) = _with_five_axes(source), _with_five_axes(target)
    if math.prod(shape):
        enqueue = copy_kernel()[math.prod(shape[:-1]), COPY_THREADS, stream]
        enqueue(_view(source, shape, strides), _view(target, shape, target_strides), shape[1:4], shape[4])


def _allocate(shape: tuple[int, ...], dtype: Any, stream: Any) -> Any:
    """Return an uninitialised array (B, channels, *S) in channels-last memory."""
    itemsize, channels = np.dtype(dtype).itemsize, shape[1]
    memory = cuda.device_array((shape[0], *shape[2:], channels), dtype, stream=stream)
    if not math.prod(shape):
        return cuda.device_array(shape, dtype, stream=stream)
    strides = _contiguous_strides((shape[0], *shape[2:], channels), itemsize)
    return _view(memory, shape, (strides[0], strides[-1], *strides[1:-1]))


def _is_channels_last(x: Any) -> bool:
    """Tell whether x (B, channels, *S) is channels-last in memory; the strides of axes of length 1 do not matter."""
    shape, strides = _with_five_axes(x)
    wanted = _contiguous_strides(shape, x.dtype.itemsize)
    return all(n == 1 or a == b for n, a, b in zip(shape, strides, wanted, strict=True))


def _lines(x: Any, stream: Any) -> Any:
    """Return x (B, channels, *S) as a C-contiguous (B, P, channels), on its own memory or on a copy."""
    if not _is_channels_last(x):
        copy = _allocate(x.shape, x.dtype, stream)
        _copy(x, copy, stream)
        x = copy
    shape = (x.shape[0], math.prod(x.shape[2:]), x.shape[1])
    return _view(x, shape, _contiguous_strides(shape, x.dtype.itemsize))


def _numbers(x: Any, stream: Any) -> Any:
    """Return x (B, *S) as a C-contiguous (B, P), on its own memory or on a copy."""
    one = _view(x, (x.shape[0], 1, *x.shape[1:]), (x.strides[0], x.dtype.itemsize, *x.strides[1:]))
    shape = (x.shape[0], math.prod(x.shape[1:]))
    return _view(_lines(one, stream), shape, _contiguous_strides(shape, x.dtype.itemsize))


def _rounded(x: Any, dtype: Any, stream: Any) -> Any:
    """Return x (B, channels, *S) in `dtype`: itself, or a copy."""
    if x.dtype == dtype:
        return x
    result = _allocate(x.shape, dtype, stream)
    _copy(x, result, stream)
    return result


def forward(q: Any, k: Any, v: Any, scale: float = 1.0, *, stream: Any = 0) -> tuple[Any, Any]:
    """Return criss-cross attention and the log-sum-exp of its energies.

    For every position u, over the positions i of its lines along every axis (u counted once):

        E_ui = scale q_u . k_i,   lse_u = log sum_i exp E_ui,   out_u = sum_i exp(E_ui - lse_u) v_i

    Args:
        q, k: (B, D, *S) with one, two or three axes S; v: (B, C, *S). float16, float32 or float64, all of one dtype,
            with `__cuda_array_interface__`, on Numba's current device. Any strides: channels-last memory is used as it
            is, another layout is copied on the device. B may be 0. Nothing is checked here.
        scale: factor of the energies.
        stream: stream of all launches and copies, a Numba stream or a stream's address; 0 is the default stream. The
            host does not wait for it, but it waits, before the launches, for an array that names another stream.

    Returns:
        out (B, C, *S), channels-last in memory, in v's dtype, and lse (B, *S), float32 (float64 for float64): Numba
        device arrays. The same call gives the same bits every time. A query all of whose energies are -inf has lse
        -inf and out NaN; one with an energy of +inf or NaN has NaN in both.

    Source: Huang et al., CCNet, section 3.2 (TPAMI), with the centre counted once.
    """
    stream = launch.stream_of(stream)
    q, k, v = (launch.as_device_array(x, stream) for x in (q, k, v))
    real, images, sizes = energy_dtype(v.dtype).type, v.shape[0], tuple(v.shape[2:])
    out, lse = _allocate(tuple(v.shape), real, stream), cuda.device_array((images, *sizes), real, stream=stream)
    if images:
        query, key, value, result = (_lines(x, stream) for x in (q, k, v, out))
        launch.launch_forward(query, key, value, result, _numbers(lse, stream), sizes, scale, stream=stream)
    return _rounded(out, v.dtype, stream), lse


def backward(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dlse: Any = None, scale: float = 1.0, *, stream: Any = 0
) -> tuple[Any, Any, Any]:
    """Return the gradients of q, k and v, given those of out and lse.

    With the weights w_ui = exp(E_ui - lse_u) and delta_u = dout_u . out_u - dlse_u, for every u and its positions i:

        dE_ui = w_ui (dout_u . v_i - delta_u),  dv_i += w_ui dout_u,  dq_u += scale dE_ui k_i,  dk_i += scale dE_ui q_u

    Args:
        dout: (B, C, *S), the gradient of out, in v's dtype.
        q, k, v, scale, stream: as in `forward`.
        out, lse: the results of `forward`.
        dlse: (B, *S), the gradient of lse, in lse's dtype. None: zeros, copied from the host, which may wait for the
            stream.

    Returns:
        dq, dk (B, D, *S) and dv (B, C, *S), channels-last in memory, in the dtype of v: Numba device arrays.
    """
    stream = launch.stream_of(stream)
    dout, q, k, v, out, lse = (launch.as_device_array(x, stream) for x in (dout, q, k, v, out, lse))
    real, sizes = energy_dtype(v.dtype).type, tuple(v.shape[2:])
    gradients = [_allocate(tuple(x.shape), real, stream) for x in (q, k, v)]
    if v.shape[0]:
        if dlse is None:
            dlse = cuda.to_device(np.zeros(lse.shape, real), stream=stream)
        else:
            dlse = launch.as_device_array(dlse, stream)
        delta = cuda.device_array(lse.shape, real, stream=stream)
        query, key, value, result, gradient = (_lines(x, stream) for x in (q, k, v, out, dout))
        numbers = [_numbers(x, stream) for x in (lse, dlse, delta)]
        dq, dk, dv = (_lines(x, stream) for x in gradients)
        launch.launch_backward(
            query, key, value, result, numbers[0], gradient, numbers[1], numbers[2], dq, dk, dv,
            sizes, scale, stream=stream,
        )  # fmt: skip
    dq, dk, dv = (_rounded(x, v.dtype, stream) for x in gradients)
    return dq, dk, dv
