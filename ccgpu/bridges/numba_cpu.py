"""The backend `numba_cpu`: the CPU kernels of `kernels/numba_cpu` on CPU tensors, as NumPy arrays on the same memory.

Half precision is computed in float32. torch.get_num_threads() threads share the work. Numba is imported at the first
call.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ccgpu.bridges.call import Call, first_line
from ccgpu.interchange import from_numpy, numpy_view
from ccgpu.layouts import Result, empty_energies, energy_dtype


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("ccgpu.kernels.numba_cpu.calls")


@functools.cache
def _reason() -> str | None:
    """Return why Numba cannot be used, or None."""
    try:
        numba = importlib.import_module("numba")
        if numba.config.DISABLE_JIT:
            return "Numba compiles nothing, because NUMBA_DISABLE_JIT is set"
        _kernels()
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"Numba cannot be used ({first_line(error)}); install a release of numba for this Python and NumPy"
    return None


def why_not(call: Call) -> str | None:
    """Return why the kernels cannot run a call, or None."""
    return _reason()


def suits(call: Call) -> bool:
    """Return whether the kernels are faster than torch's products, as measured in docs/backends.md.

    They are ("Which is chosen when") if there is at least one line of every axis for each thread and the dtype needs no
    conversion, which half precision does.
    """
    if call.dtype not in (torch.float32, torch.float64):
        return False
    longest = max(call.sizes, default=1)
    return longest <= 1 or call.images * math.prod(call.sizes) // longest >= torch.get_num_threads()


def _array(x: Tensor) -> np.ndarray:
    """Return x as an array: on its own memory, or on a float32 copy of half precision."""
    return numpy_view(x.to(energy_dtype(x.dtype)))


def _result_like(x: Tensor) -> Result:
    """Return a result in the layout of x, with float32 memory for the kernels if x has half precision."""
    target, dtype = torch.empty_like(x), energy_dtype(x.dtype)
    return Result(target) if x.dtype == dtype else Result(target, torch.empty_like(target, dtype=dtype))


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return out (B, C, *S) in v's dtype and layout and lse (B, *S); see `ccgpu.cca` for the formula."""
    result, threads = _result_like(v), torch.get_num_threads()
    arrays = (_array(x) for x in (q, k, v))
    _, lse = _kernels().forward(*arrays, scale, threads=threads, out=numpy_view(result.memory))
    return result.finish(), from_numpy(lse)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv in the layouts of q, k, v, given the gradients of out and lse."""
    results, threads = [_result_like(x) for x in (q, k, v)], torch.get_num_threads()
    arrays = (_array(x) for x in (dout, q, k, v, out, lse, dlse))
    _kernels().backward(*arrays, scale, threads=threads, gradients=tuple(numpy_view(x.memory) for x in results))
    dq, dk, dv = (x.finish() for x in results)
    return dq, dk, dv


def affinity(q: Tensor, k: Tensor) -> Tensor:
    """Return the energies q_u . k_i (B, K, *S), float32 (float64 for float64 inputs), channels-last in memory."""
    energies = empty_energies(q)
    _kernels().affinity(_array(q), _array(k), threads=torch.get_num_threads(), out=numpy_view(energies.movedim(1, -1)))
    return energies


def aggregate(weights: Tensor, v: Tensor) -> Tensor:
    """Return each position's sum of v over its criss-cross, weighted (B, C, *S), in v's dtype and layout."""
    return _weighted_sum("aggregate", weights, v)


def aggregate_transposed(weights: Tensor, x: Tensor) -> Tensor:
    """Return the transpose of `aggregate` applied to x (B, C, *S), in x's dtype and layout."""
    return _weighted_sum("aggregate_transposed", weights, x)


def _weighted_sum(kernel: str, weights: Tensor, v: Tensor) -> Tensor:
    result = _result_like(v)
    wide = weights.to(energy_dtype(v.dtype))
    getattr(_kernels(), kernel)(_array(wide), _array(v), threads=torch.get_num_threads(), out=numpy_view(result.memory))
    return result.finish()
