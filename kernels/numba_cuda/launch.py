"""The launches of the Numba CUDA kernels, on channels-last device arrays (B, P, channels) with P all positions.

`launch_forward` and the others enqueue a kernel for each phase of a call and write to arrays that the caller gives: the
interface for a bridge that owns its memory. calls.py takes arrays of any layout; the kernels are in fused.py and
stages.py.

float32 and float16 arrays are computed in float32, float64 arrays in float64. Results are float32 for float16 inputs
too, and are rounded once at the end: every phase adds to what earlier ones have written, so float16 results of a map of
300 x 300, whose lines have five segments, would be rounded ten times. The price is a float32 array for each result.

In Numba's simulator (NUMBA_ENABLE_CUDASIM=1), NumPy arrays and the simulator's own arrays stand for device arrays.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
from numba import config, cuda

from ccgpu.kernels.compilation import told
from ccgpu.kernels.dtypes import energy_dtype
from ccgpu.kernels.numba_cuda.fused import backward_kernel, forward_kernel
from ccgpu.kernels.numba_cuda.schedule import Phase, phases
from ccgpu.kernels.numba_cuda.stages import affinity_kernel, aggregate_kernel
from ccgpu.kernels.numba_cuda.tiles import Shape

SIMULATED = bool(config.ENABLE_CUDASIM)
if SIMULATED:
    from ccgpu.kernels.numba_cuda.simulator import FakeCUDAArray  # stands for a device array in the simulator

# Tiles of 64 positions: 256 threads with 16 energies each and 33,536 bytes of shared memory. float64 has tiles of 32
# positions and 25,344 bytes, because 64 positions would need more than the 48 KB that a block gets without opting in.
DEVICE_SHAPES = {np.float32: Shape(64, 16, 32, np.float32), np.float64: Shape(32, 16, 32, np.float64)}
# The simulator runs a Python thread for each CUDA thread, and switching between them costs more than the computation.
SIMULATOR_SHAPES = {real: Shape(8, 1, 8, real) for real in (np.float32, np.float64)}


def shape_for(dtype: Any) -> Shape:
    """Return the shape of the kernels for arrays of `dtype`."""
    return (SIMULATOR_SHAPES if SIMULATED else DEVICE_SHAPES)[energy_dtype(dtype).type]


def stream_of(handle: Any) -> Any:
    """Return a Numba stream for launches, given its address (0: the default stream) or the Numba stream itself."""
    if isinstance(handle, int) and handle and not SIMULATED:
        return cuda.external_stream(handle)
    return handle


def as_device_array(x: Any, stream: Any = 0) -> Any:
    """Return a Numba array on the memory of an array with `__cuda_array_interface__`, for use on a stream.

    If x names another stream than `stream` (a Numba stream, or 0), the host waits for the work enqueued there. In the
    simulator x is a NumPy array.
    """
    if SIMULATED:
        return x if isinstance(x, FakeCUDAArray) else FakeCUDAArray(np.asarray(x))
    named = x.__cuda_array_interface__.get("stream")
    return cuda.as_cuda_array(x, sync=named is not None and named != int(stream))


def _share(steps: tuple[Phase, ...], crossing: int | None = None) -> float:
    """Return one over the number of lines through a position: the weight of the position itself on each of them."""
    return 1.0 / (sum(phase.shift == 0 for phase in steps) if crossing is None else crossing)


def _run(
    kernel: Any, shape: Shape, steps: tuple[Phase, ...], images: int, stream: Any, arguments: Any, numbers: Any = ()
) -> None:
    """Launch a kernel for each phase of `steps`: kernel(*arguments, phase, *numbers)."""
    compiles = not SIMULATED and not kernel.overloads
    with told("a CUDA kernel with Numba, for this process") if compiles else contextlib.nullcontext():
        for phase in steps:
            kernel[phase.blocks(images), (shape.side, shape.side), stream](*arguments, phase, *numbers)


def launch_forward(
    q: Any, k: Any, v: Any, out: Any, lse: Any, sizes: tuple[int, ...], scale: float, *, stream: Any = 0,
    shape: Shape | None = None, crossing: int | None = None,
) -> None:  # fmt: skip
    """Enqueue forward; see `calls.forward` for the formula.

    Args:
        q, k: (B, P, D), v: (B, P, C), of one dtype; like all arrays here, C-contiguous device arrays.
        out: (B, P, C), lse: (B, P); written; float32 (float64 for float64).
        sizes: sizes of the map, one to three; their product is P.
        scale: factor of the energies.
        stream: stream of the launches, a Numba stream or 0.
        shape: shape of the kernels; None: `shape_for` the arrays' dtype.
        crossing: lines through a position, the map's among them; None: the map has all of them.
    """
    shape = shape_for(q.dtype) if shape is None else shape
    steps, real = phases(sizes, shape.tile), shape.real
    if q.shape[0]:
        arguments = (q, k, v, out, lse, q.shape[2], v.shape[2])
        numbers = (real(scale), real(math.log(_share(steps, crossing))))
        _run(forward_kernel(shape), shape, steps, q.shape[0], stream, arguments, numbers)


def launch_backward(
    q: Any, k: Any, v: Any, out: Any, lse: Any, dout: Any, dlse: Any, delta: Any, dq: Any, dk: Any, dv: Any,
    sizes: tuple[int, ...], scale: float, *, stream: Any = 0, shape: Shape | None = None,
    crossing: int | None = None,
) -> None:  # fmt: skip
    """Enqueue backward; see `calls.backward` for the formula.

    Args:
        q, k, v, sizes, scale, stream, shape, crossing: as in `launch_forward`.
        out, dout: (B, P, C) in v's dtype.
        lse, dlse: (B, P), float32 (float64 for float64).
        delta: (B, P), in lse's dtype; written and read.
        dq, dk: (B, P, D), dv: (B, P, C), in lse's dtype; written.
    """
    shape = shape_for(q.dtype) if shape is None else shape
    steps, real = phases(sizes, shape.tile), shape.real
    if q.shape[0]:
        arguments = (q, k, v, out, lse, dout, dlse, delta, dq, dk, dv, q.shape[2], v.shape[2])
        numbers = (real(scale), real(math.log(_share(steps, crossing))))
        _run(backward_kernel(shape), shape, steps, q.shape[0], stream, arguments, numbers)


def launch_affinity(
    q: Any, k: Any, energies: Any, sizes: tuple[int, ...], *, stream: Any = 0, shape: Shape | None = None
) -> None:
    """Enqueue affinity: q, k (B, P, D) -> energies (B, P, K), float32 (float64 for float64); K = sum(S) - len(S) + 1.

    The K energies of a position are in the order of `kernels.reference.neighbours`.
    """
    shape = shape_for(q.dtype) if shape is None else shape
    if q.shape[0]:
        steps = phases(sizes, shape.tile, True)
        _run(affinity_kernel(shape), shape, steps, q.shape[0], stream, (q, k, energies, q.shape[2]))


def launch_aggregate(
    weights: Any, v: Any, out: Any, sizes: tuple[int, ...], *, transposed: bool = False, stream: Any = 0,
    shape: Shape | None = None,
) -> None:  # fmt: skip
    """Enqueue aggregate, or its transpose: weights (B, P, K), v (B, P, C) -> out (B, P, C).

    weights and out are float32 (float64 for float64); see `kernels.reference` for the formulas.
    """
    shape = shape_for(v.dtype) if shape is None else shape
    if v.shape[0]:
        steps = phases(sizes, shape.tile)
        arguments, numbers = (weights, v, out, v.shape[2]), (shape.real(_share(steps)),)
        _run(aggregate_kernel(shape, transposed), shape, steps, v.shape[0], stream, arguments, numbers)
