"""Criss-cross attention on CUDA devices in Numba: arrays in, arrays out.

`forward` and `backward` take arrays (B, channels, *S) with `__cuda_array_interface__`, of any strides. Below them,
`launch_forward` and the like run the phases of a call on channels-last arrays (B, P, channels), P all positions, with
results given: what a bridge needs that owns its memory. The kernels are in numba_cuda_fused and numba_cuda_stages.

float32 and float16 arrays are computed in float32, float64 ones in float64. The kernels write float32 results also for
float16 inputs, and they are rounded once, at the end: every phase adds to what earlier ones have left, and a map of
300 x 300, five segments a line, would be rounded ten times. The price is a float32 array for each result.

In Numba's simulator (NUMBA_ENABLE_CUDASIM=1) NumPy arrays and the simulator's own take the place of device arrays.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numba import config, cuda

from ccgpu.kernels.dtypes import energy_dtype
from ccgpu.kernels.numba_cuda.fused import backward_kernel, forward_kernel
from ccgpu.kernels.numba_cuda.schedule import Phase, phases
from ccgpu.kernels.numba_cuda.stages import affinity_kernel, aggregate_kernel
from ccgpu.kernels.numba_cuda.tiles import Shape

SIMULATED = bool(config.ENABLE_CUDASIM)
if SIMULATED:
    from ccgpu.kernels.numba_cuda.simulator import FakeCUDAArray  # stands for a device array there

# 256 threads with 16 energies each, in 33,536 bytes of shared memory; in float64 25,344 bytes: 64 positions would take
# more than the 48 KB that a block gets without asking.
DEVICE_SHAPES = {np.float32: Shape(64, 16, 32, np.float32), np.float64: Shape(32, 16, 32, np.float64)}
# Each thread of the simulator is one of Python's, and switching between them costs more than what they compute.
SIMULATOR_SHAPES = {real: Shape(8, 1, 8, real) for real in (np.float32, np.float64)}
COPY_THREADS = 2 if SIMULATED else 64


def shape_for(dtype: Any) -> Shape:
    """Return the shape of the kernels for arrays of `dtype`."""
    return (SIMULATOR_SHAPES if SIMULATED else DEVICE_SHAPES)[energy_dtype(dtype).type]


def stream_of(handle: Any) -> Any:
    """Return a stream for launches: of its address (0: the default stream), or the Numba stream that it is already."""
    if isinstance(handle, int) and handle and not SIMULATED:
        return cuda.external_stream(handle)
    return handle


def _share(steps: tuple[Phase, ...]) -> float:
    """Return the part that each of the lines through a position has in the position itself."""
    return 1.0 / sum(phase.shift == 0 for phase in steps)


def _run(
    kernel: Any, shape: Shape, steps: tuple[Phase, ...], images: int, stream: Any, arguments: Any, numbers: Any = ()
) -> None:
    """Launch a kernel for each phase: kernel(*arguments, phase, *numbers)."""
    for phase in steps:
        kernel[phase.blocks(images), (shape.side, shape.side), stream](*arguments, phase, *numbers)


def launch_forward(
    q: Any, k: Any, v: Any, out: Any, lse: Any, sizes: tuple[int, ...], scale: float, *, stream: Any = 0,
    shape: Shape | None = None,
) -> None:  # fmt: skip
    """Enqueue forward; see `forward` for the formula.

    Args:
        q, k: (B, P, D), v: (B, P, C), of one dtype; device arrays, C-contiguous, as all here.
        out: (B, P, C), lse: (B, P), written; float32, float64 for float64.
        sizes: of the map, one to three; their product is P.
        scale: factor of the energies.
        stream: where the launches go, a Numba stream or 0.
        shape: of the kernels; by default `shape_for` the arrays.
    """
    shape = shape_for(q.dtype) if shape is None else shape
    steps, real = phases(sizes, shape.tile), shape.real
    if q.shape[0]:
        arguments, numbers = (q, k, v, out, lse, q.shape[2], v.shape[2]), (real(scale), real(math.log(_share(steps))))
        _run(forward_kernel(shape), shape, steps, q.shape[0], stream, arguments, numbers)


def launch_backward(
    q: Any, k: Any, v: Any, out: Any, lse: Any, dout: Any, dlse: Any, delta: Any, dq: Any, dk: Any, dv: Any,
    sizes: tuple[int, ...], scale: float, *, stream: Any = 0, shape: Shape | None = None,
) -> None:  # fmt: skip
    """Enqueue backward; see `backward` for the formula.

    Args:
        q, k, v, sizes, scale, stream, shape: as in `launch_forward`.
        out, dout: (B, P, C) in v's dtype; lse, dlse: (B, P), float32, float64 for float64.
        delta: (B, P), written and read; dq, dk (B, P, D), dv (B, P, C), written; of lse's dtype.
    """
    shape = shape_for(q.dtype) if shape is None else shape
    steps, real = phases(sizes, shape.tile), shape.real
    if q.shape[0]:
        arguments = (q, k, v, out, lse, dout, dlse, delta, dq, dk, dv, q.shape[2], v.shape[2])
        numbers = (real(scale), real(math.log(_share(steps))))
        _run(backward_kernel(shape), shape, steps, q.shape[0], stream, arguments, numbers)


def launch_affinity(
    q: Any, k: Any, energies: Any, sizes: tuple[int, ...], *, stream: Any = 0, shape: Shape | None = None
) -> None:
    """Enqueue affinity: q, k (B, P, D) -> energies (B, P, K), float32 (float64 for float64); K = sum(S) - len(S) + 1.

    Energies stand in the order of `kernels.reference.neighbours`.
    """
    shape = shape_for(q.dtype) if shape is None else shape
    if q.shape[0]:
        steps = phases(sizes, shape.tile, True)
        _run(affinity_kernel(shape), shape, steps, q.shape[0], stream, (q, k, energies, q.shape[2]))


def launch_aggregate(
    weights: Any, v: Any, out: Any, sizes: tuple[int, ...], *, transposed: bool = False, stream: Any = 0,
    shape: Shape | None = None,
) -> None:  # fmt: skip
    """Enqueue aggregate, or its transpose: v (B, P, C) by weights (B, P, K) -> out (B, P, C).

    weights and out are float32 (float64 for float64); see `kernels.reference` for the formulas.
    """
    shape = shape_for(v.dtype) if shape is None else shape
    if v.shape[0]:
        steps = phases(sizes, shape.tile)
        arguments, numbers = (weights, v, out, v.shape[2]), (shape.real(_share(steps)),)
        _run(aggregate_kernel(shape, transposed), shape, steps, v.shape[0], stream, arguments, numbers)


# Arrays of any layout -------------------------------------------------------------------------------------------------


class _View:
    """Other shape and strides for a device array's memory, by the protocol that all libraries of arrays share."""

    def __init__(self, array: Any, shape: tuple[int, ...], strides: tuple[int, ...] | None) -> None:
        self.owner = array
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, "shape": shape, "strides": strides}


def as_device_array(x: Any, stream: Any = 0) -> Any:
    """Return an array with `__cuda_array_interface__` as one of Numba's, on the same memory, for use on a stream.

    Where x names another stream than that (a Numba stream, or 0), the host waits for what is enqueued there. In the
    simulator a NumPy array takes the place of x.
    """
    if SIMULATED:
        return x if isinstance(x, FakeCUDAArray) else FakeCUDAArray(np.asarray(x))
    named = x.__cuda_array_interface__.get("stream")
    return cuda.as_cuda_array(x, sync=named is not None and named != int(stream))


def _contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple(itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _view(x: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    """Return a device array on x's memory."""
    if SIMULATED:
        return FakeCUDAArray(np.lib.stride_tricks.as_strided(x._ary, shape, strides))
    contiguous = strides == _contiguous_strides(shape, x.dtype.itemsize)
    return cuda.as_cuda_array(_View(x, shape, None if contiguous else strides), sync=False)


@lru_cache
def copy_kernel() -> Any:
    """Return the kernel that copies arrays (B, S0, S1, S2, channels) of any strides and dtypes: a block a position."""

    @cuda.jit
    def copy_elements(source: Any, target: Any, sizes: Any, channels: Any) -> None:
        position = cuda.blockIdx.x
        position, c = position // sizes[2], position % sizes[2]
        position, b = position // sizes[1], position % sizes[1]
        image, a = position // sizes[0], position % sizes[0]
        for channel in range(cuda.threadIdx.x, channels, cuda.blockDim.x):
            target[image, a, b, c, channel] = source[image, a, b, c, channel]

    return copy_elements


def _five(x: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return shape and strides of x (B, channels, *S) as (B, S0, S1, S2, channels), axes of length 1 in front."""
    missing = 5 - len(x.shape)
    shape = (x.shape[0], *(1,) * missing, *x.shape[2:], x.shape[1])
    return shape, (x.strides[0], *(0,) * missing, *x.strides[2:], x.strides[1])


def _copy(source: Any, target: Any, stream: Any) -> None:
    """Enqueue a copy between arrays (B, channels, *S)."""
    (shape, strides), (_, target_strides) = _five(source), _five(target)
    if math.prod(shape):
        launch = copy_kernel()[math.prod(shape[:-1]), COPY_THREADS, stream]
        launch(_view(source, shape, strides), _view(target, shape, target_strides), shape[1:4], shape[4])


def _allocate(shape: tuple[int, ...], dtype: Any, stream: Any) -> Any:
    """Return an uninitialised array (B, channels, *S) in channels-last memory."""
    itemsize, channels = np.dtype(dtype).itemsize, shape[1]
    memory = cuda.device_array((shape[0], *shape[2:], channels), dtype, stream=stream)
    if not math.prod(shape):
        return cuda.device_array(shape, dtype, stream=stream)
    strides = _contiguous_strides((shape[0], *shape[2:], channels), itemsize)
    return _view(memory, shape, (strides[0], strides[-1], *strides[1:-1]))


def _is_native(x: Any) -> bool:
    """Tell whether x (B, channels, *S) is channels-last in memory; what stride an axis of length 1 has is no matter."""
    shape, strides = _five(x)
    wanted = _contiguous_strides(shape, x.dtype.itemsize)
    return all(n == 1 or a == b for n, a, b in zip(shape, strides, wanted, strict=True))


def _lines(x: Any, stream: Any) -> Any:
    """Return x (B, channels, *S) as (B, P, channels), C-contiguous: its own memory, or a copy of it."""
    if not _is_native(x):
        copy = _allocate(x.shape, x.dtype, stream)
        _copy(x, copy, stream)
        x = copy
    shape = (x.shape[0], math.prod(x.shape[2:]), x.shape[1])
    return _view(x, shape, _contiguous_strides(shape, x.dtype.itemsize))


def _numbers(x: Any, stream: Any) -> Any:
    """Return x (B, *S) as (B, P), C-contiguous."""
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
        stream: where all is enqueued, a Numba stream or a stream's address; 0 is the default stream. Nothing waits for
            it. An array that names another stream in its interface is waited for before the launches.

    Returns:
        out (B, C, *S), channels-last in memory, in v's dtype, and lse (B, *S), float32 (float64 for float64): Numba
        device arrays. The same call gives the same bits every time. A query all of whose energies are -inf has lse
        -inf and out NaN; one with an energy of +inf or NaN has NaN in both.

    Source: Huang et al., CCNet, section 3.2 (TPAMI), with the centre counted once.
    """
    stream = stream_of(stream)
    q, k, v = (as_device_array(x, stream) for x in (q, k, v))
    real, images, sizes = energy_dtype(v.dtype).type, v.shape[0], tuple(v.shape[2:])
    out, lse = _allocate(tuple(v.shape), real, stream), cuda.device_array((images, *sizes), real, stream=stream)
    if images:
        query, key, value, result = (_lines(x, stream) for x in (q, k, v, out))
        launch_forward(query, key, value, result, _numbers(lse, stream), sizes, scale, stream=stream)
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
        out, lse: what `forward` returned.
        dlse: (B, *S), the gradient of lse, in lse's dtype; None for zeros, which are copied from the host: the copy may
            wait for the stream.

    Returns:
        dq, dk (B, D, *S) and dv (B, C, *S), channels-last in memory, in the dtype of v: Numba device arrays.
    """
    stream = stream_of(stream)
    dout, q, k, v, out, lse = (as_device_array(x, stream) for x in (dout, q, k, v, out, lse))
    real, sizes = energy_dtype(v.dtype).type, tuple(v.shape[2:])
    gradients = [_allocate(tuple(x.shape), real, stream) for x in (q, k, v)]
    if v.shape[0]:
        if dlse is None:
            dlse = cuda.to_device(np.zeros(lse.shape, real), stream=stream)
        else:
            dlse = as_device_array(dlse, stream)
        delta = cuda.device_array(lse.shape, real, stream=stream)
        query, key, value, result, gradient = (_lines(x, stream) for x in (q, k, v, out, dout))
        numbers = [_numbers(x, stream) for x in (lse, dlse, delta)]
        dq, dk, dv = (_lines(x, stream) for x in gradients)
        launch_backward(
            query, key, value, result, numbers[0], gradient, numbers[1], numbers[2], dq, dk, dv,
            sizes, scale, stream=stream,
        )  # fmt: skip
    dq, dk, dv = (_rounded(x, v.dtype, stream) for x in gradients)
    return dq, dk, dv
