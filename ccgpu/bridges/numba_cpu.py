"""The backend `numba_cpu`: the CPU kernels of `kernels/numba_cpu` on CPU tensors, which it gets by address.

Half precision is multiplied by the CPU's dot-product instructions or in float32, which `arithmetic` tells, and summed
in float32. torch.get_num_threads() threads share the work, those that torch's own operations run on where they are
OpenMP's. Numba is imported at the first call.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

import torch
from torch import Tensor

from ccgpu.bridges.call import Call, first_line
from ccgpu.layouts import NAMES, Result, empty_energies, energy_dtype


@functools.cache
def _launch() -> Any:
    return importlib.import_module("ccgpu.kernels.numba_cpu.launch")


@functools.cache
def _operands() -> Any:
    return importlib.import_module("ccgpu.kernels.numba_cpu.operands")


@functools.cache
def _reason() -> str | None:
    """Return why Numba cannot be used, or None."""
    try:
        numba = importlib.import_module("numba")
        if numba.config.DISABLE_JIT:
            return "Numba compiles nothing, because NUMBA_DISABLE_JIT is set"
        _launch()
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"Numba cannot be used ({first_line(error)}); install a release of numba for this Python and NumPy"
    return None


def forget_memory() -> None:
    """Make the kernels compute in new memory at their next calls, so that a measurement counts it; see scratch.py."""
    scratch = sys.modules.get("ccgpu.kernels.numba_cpu.scratch")  # what has not been imported keeps nothing
    if scratch is not None:
        scratch.forget()


def why_not(call: Call) -> str | None:
    """Return why the kernels cannot run a call, or None."""
    return _reason()


def arithmetic(dtype: torch.dtype) -> str:
    """Say how the kernels compute a dtype on this CPU, for example "bfloat16 by dot-product instructions"."""
    return str(_operands().arithmetic_of(NAMES[dtype]))


@functools.lru_cache(maxsize=256)
def _plan(
    kernel: str, threads: int, crossing: int | None, *maps: tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
) -> Any:
    """Return the plan of a call, for maps of these shapes, strides and dtypes."""
    layouts = [_operands().Layout(tuple(a), tuple(c.itemsize * n for n in b), NAMES[c]) for a, b, c in maps]
    options = {} if crossing is None else {"crossing": crossing}
    return getattr(_launch(), kernel)(*layouts, threads=threads, **options)


@functools.cache
def _team() -> Any:
    """Return the OpenMP threads that torch's operations run on; None where torch has others."""
    return importlib.import_module("ccgpu.kernels.numba_cpu.workers").team_of(torch._C.__file__)


def _run(
    kernel: str,
    maps: tuple[Tensor, ...],
    numbers: tuple[int, ...],
    scale: float = 1.0,
    crossing: int | None = None,
) -> None:
    """Run a kernel on maps and the addresses of arrays of numbers."""
    plan = _plan(kernel, torch.get_num_threads(), crossing, *[(x.shape, x.stride(), x.dtype) for x in maps])
    plan.run([*[x.data_ptr() for x in maps], *numbers], scale, _team())


def _numbers(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x as the kernels take numbers: contiguous, in the dtype of energies."""
    return x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous()


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, crossing: int | None = None) -> tuple[Tensor, Tensor]:
    """Return out (B, C, *S) in v's dtype and layout and lse (B, *S); see `ccgpu.cca` for the formula."""
    out, lse = torch.empty_like(v), q.new_empty((q.shape[0], *q.shape[2:]), dtype=energy_dtype(q.dtype))
    _run("forward_plan", (q, k, v, out), (lse.data_ptr(),), scale, crossing)
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
    dtype = energy_dtype(q.dtype)
    lse, dlse = _numbers(lse, dtype), _numbers(dlse, dtype)
    _run("backward_plan", (dout, q, k, v, out, dq, dk, dv), (lse.data_ptr(), dlse.data_ptr()), scale, crossing)
    return dq, dk, dv


def affinity(q: Tensor, k: Tensor) -> Tensor:
    """Return the energies q_u . k_i (B, K, *S), float32 (float64 for float64 inputs), channels-last in memory."""
    energies = empty_energies(q)
    _run("affinity_plan", (q, k), (energies.data_ptr(),))
    return energies


def aggregate(weights: Tensor, v: Tensor) -> Tensor:
    """Return each position's sum of v over its criss-cross, weighted (B, C, *S), in v's dtype and layout."""
    return _weighted_sum(weights, v, transposed=False)


def aggregate_transposed(weights: Tensor, x: Tensor) -> Tensor:
    """Return the transpose of `aggregate` applied to x (B, C, *S), in x's dtype and layout."""
    return _weighted_sum(weights, x, transposed=True)


def _weighted_sum(weights: Tensor, v: Tensor, transposed: bool) -> Tensor:
    dtype, out = energy_dtype(v.dtype), torch.empty_like(v)
    # The sums are rounded once, and not once for each axis.
    sums = Result(out) if v.dtype == dtype else Result(out, torch.empty_like(out, dtype=dtype))
    wide = _numbers(weights.movedim(1, -1), dtype)
    _run("aggregate_plan", (v.to(dtype), sums.memory), (wide.data_ptr(), int(transposed)))
    return sums.finish()
