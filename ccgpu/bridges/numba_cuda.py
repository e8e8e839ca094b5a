"""The backend `numba_cuda`: the kernels of `kernels/numba_cuda` on CUDA tensors, as Numba arrays on the same memory.

The kernels take channels-last memory (B, P, channels) in the tensors' dtype, P being the positions of the map, and
write float32 (float64 for float64). Other layouts and dtypes are copied on the way in or out. All memory is torch's and
belongs to its current stream, on which the kernels are launched, so a temporary may be dropped once the kernel that
uses it is enqueued.

Numba is imported at the first call. With its simulator, the backend runs CPU tensors.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ccgpu.bridges.call import Call, device_reason, first_line, install_command
from ccgpu.interchange import numba_array, simulated_numba_array
from ccgpu.kernels.dtypes import DTYPES
from ccgpu.layouts import NAMES, channels_last, channels_last_result, empty_energies, energy_dtype

SIMULATOR_VARIABLE = "NUMBA_ENABLE_CUDASIM"
_REASONS: dict[int, str | None] = {}  # why a device is unavailable, by its index; None: usable


def simulated() -> bool:
    """Return whether Numba simulates CUDA, without importing Numba, which decides so when it is imported."""
    numba: Any = sys.modules.get("numba")
    if hasattr(numba, "config"):
        return bool(numba.config.ENABLE_CUDASIM)
    value = os.environ.get(SIMULATOR_VARIABLE, "0")
    return value.isdigit() and int(value) != 0


def _find_reason(index: int) -> str | None:
    """Return why a device is unavailable, or None."""
    if torch.version.hip is not None:
        return "it needs CUDA, and this torch is built for ROCm"
    if importlib.util.find_spec("numba_cuda") is None:
        return f"numba-cuda is not installed; {install_command()}"
    try:
        cuda = importlib.import_module("numba.cuda")
        devices = len(cuda.gpus) if cuda.is_available() else 0
    except (ImportError, OSError, RuntimeError) as error:
        return f"numba-cuda cannot be used ({first_line(error)}); {install_command()} gives the one for this torch"
    if index >= devices:
        problem = str(cuda.cuda_error() or "").strip()  # the driver's
        why = f" ({problem.splitlines()[0]})" if problem else ""
        return f"Numba sees no CUDA device {index}{why}; {install_command()} gives the numba-cuda for this torch"
    return None


def why_not(call: Call) -> str | None:
    """Return why the kernels cannot run a call (the tensors' device, numba-cuda, the GPU, the dtype), or None."""
    if call.device.type == "cpu":
        if not simulated():
            return f"it runs CUDA tensors, and CPU tensors only in Numba's simulator ({SIMULATOR_VARIABLE}=1)"
    elif call.device.type != "cuda":
        return f"it runs CUDA tensors, and these are on {call.device}"
    elif simulated():
        return f"Numba runs in its simulator ({SIMULATOR_VARIABLE}), which takes CPU tensors"
    else:
        reason = device_reason(call.device, _REASONS, _find_reason)
        if reason is not None:
            return reason
    has_kernels = call.dtype in NAMES and DTYPES[NAMES[call.dtype]].in_numpy
    return None if has_kernels else f"it has no kernels for {call.dtype}"


def _kernels() -> Any:
    return importlib.import_module("ccgpu.kernels.numba_cuda.launch")


def _array(x: Tensor) -> Any:
    """Return Numba's array on the memory of a contiguous tensor."""
    return numba_array(x) if x.is_cuda else simulated_numba_array(x)


def _lines(x: Tensor) -> Any:
    """Return contiguous x (B, *S, channels) as Numba's array (B, P, channels)."""
    return _array(x.view(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]))


def _inputs(*tensors: Tensor) -> list[Any]:
    """Return tensors (B, channels, *S) as arrays (B, P, channels), copied if they have another layout.

    An array keeps the copy alive on whose memory it is.
    """
    return [_lines(channels_last(x, x.dtype)) for x in tensors]


def _numbers(x: Tensor) -> Any:
    """Return x (B, *S) as an array (B, P)."""
    return _array(x.contiguous().view(x.shape[0], math.prod(x.shape[1:])))


@contextlib.contextmanager
def _stream(x: Tensor) -> Iterator[Any]:
    """Make x's device Numba's current one, and yield torch's current stream on it as Numba's."""
    if not x.is_cuda:
        yield 0
        return
    with importlib.import_module("numba.cuda").gpus[x.device.index]:
        yield _kernels().stream_of(torch.cuda.current_stream(x.device).cuda_stream)


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, crossing: int | None = None) -> tuple[Tensor, Tensor]:
    """Return out (B, C, *S) in v's dtype and layout and lse (B, *S); see `ccgpu.cca` for the formula."""
    sizes, wide = tuple(q.shape[2:]), energy_dtype(q.dtype)
    out, lse = torch.empty_like(v), torch.empty((q.shape[0], *sizes), dtype=wide, device=q.device)
    if lse.numel():
        result = channels_last_result(out, wide)
        with _stream(q) as stream:
            arrays = (*_inputs(q, k, v), _lines(result.lines), _numbers(lse))
            _kernels().launch_forward(*arrays, sizes, scale, stream=stream, crossing=crossing)
        result.finish()
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor,
    scale: float,
    crossing: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv in the layouts of q, k, v, given the gradients of out and lse."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if lse.numel():
        results = [channels_last_result(x, lse.dtype) for x in (dq, dk, dv)]
        delta = torch.empty_like(lse, memory_format=torch.contiguous_format)
        with _stream(q) as stream:
            query, key, value, result, gradient = _inputs(q, k, v, out, dout)
            numbers = [_numbers(x) for x in (lse, dlse, delta)]
            arrays = (query, key, value, result, numbers[0], gradient, *numbers[1:])
            gradients = [_lines(x.lines) for x in results]
            sizes = tuple(q.shape[2:])
            _kernels().launch_backward(*arrays, *gradients, sizes, scale, stream=stream, crossing=crossing)
        for x in results:
            x.finish()
    return dq, dk, dv


def affinity(q: Tensor, k: Tensor) -> Tensor:
    """Return the energies q_u . k_i (B, K, *S), float32 (float64 for float64 inputs), channels-last in memory."""
    energies = empty_energies(q)
    if energies.numel():
        with _stream(q) as stream:
            arrays = (*_inputs(q, k), _lines(energies.movedim(1, -1)))
            _kernels().launch_affinity(*arrays, tuple(q.shape[2:]), stream=stream)
    return energies


def aggregate(weights: Tensor, v: Tensor) -> Tensor:
    """Return each position's sum of v over its criss-cross, weighted (B, C, *S), in v's dtype and layout."""
    return _weighted_sum(weights, v, transposed=False)


def aggregate_transposed(weights: Tensor, x: Tensor) -> Tensor:
    """Return the transpose of `aggregate` applied to x (B, C, *S), in x's dtype and layout."""
    return _weighted_sum(weights, x, transposed=True)


def _weighted_sum(weights: Tensor, v: Tensor, *, transposed: bool) -> Tensor:
    sums, wide = torch.empty_like(v), energy_dtype(v.dtype)
    if sums.numel():
        result = channels_last_result(sums, wide)
        with _stream(v) as stream:
            arrays = (*_inputs(weights.to(wide), v), _lines(result.lines))
            _kernels().launch_aggregate(*arrays, tuple(v.shape[2:]), transposed=transposed, stream=stream)
        result.finish()
    return sums
