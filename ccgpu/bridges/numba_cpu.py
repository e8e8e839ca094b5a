"""The backend `numba_cpu`: the CPU kernels of `kernels/numba_cpu` on CPU tensors, which it gets by address.

Half precision is computed in float32 and converted where it is read and written. torch.get_num_threads() threads share
the work. Numba is imported at the first call.
"""

from __future__ import annotations

import functools
import importlib
import math
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


def why_not(call: Call) -> str | None:
    """Return why the kernels cannot run a call, or None."""
    return _reason()


def suits(call: Call) -> bool:
    """Return whether the kernels are faster than torch's products, as measured in docs/backends.md.

    They are ("Which is chosen when") if there is at least one line of every axis for each thread.
    """
    longest = max(call.sizes, default=1)
    return longest <= 1 or call.images * math.prod(call.sizes) // longest >= torch.get_num_threads()


class _Tensors:
    """The operands of a call of tensors, in the dtype that its arithmetic has in memory: the tensors, or copies."""

    def __init__(self, dtype: torch.dtype) -> None:
        name: str = _operands().ARITHMETIC[NAMES[dtype]].memory
        self._memory: torch.dtype = getattr(torch, name)
        self._alive: list[Tensor] = []
        self._results: list[Result] = []

    def read(self, x: Tensor) -> Any:
        """Return the operand of a tensor that is read."""
        return self._operand(x.to(self._memory))

    def write(self, x: Tensor) -> Any:
        """Return the operand of a tensor that `finish` completes."""
        if x.dtype == self._memory:
            return self._operand(x)
        self._results.append(Result(x, torch.empty_like(x, dtype=self._memory)))
        return self._operand(self._results[-1].memory)

    def finish(self) -> None:
        """Fill the tensors that are written from their copies."""
        for result in self._results:
            result.finish()

    def _operand(self, x: Tensor) -> Any:
        self._alive.append(x)
        size = x.element_size()
        strides = tuple([size * stride for stride in x.stride()])
        return _operands().Operand(x.data_ptr(), tuple(x.shape), strides, NAMES[x.dtype])


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return out (B, C, *S) in v's dtype and layout and lse (B, *S); see `ccgpu.cca` for the formula."""
    out, lse = torch.empty_like(v), q.new_empty((q.shape[0], *q.shape[2:]), dtype=energy_dtype(q.dtype))
    tensors = _Tensors(q.dtype)
    maps = [tensors.read(q), tensors.read(k), tensors.read(v), tensors.write(out)]
    _launch().forward(*maps, lse=lse.data_ptr(), scale=scale, threads=torch.get_num_threads())
    tensors.finish()
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv in the layouts of q, k, v, given the gradients of out and lse."""
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    tensors, dtype = _Tensors(q.dtype), energy_dtype(q.dtype)
    maps = [tensors.read(x) for x in (dout, q, k, v, out)]
    maps += [tensors.write(x) for x in gradients]
    saved, given = (x.to(dtype).contiguous() for x in (lse, dlse))
    addresses = {"lse": saved.data_ptr(), "dlse": given.data_ptr()}
    _launch().backward(*maps, **addresses, scale=scale, threads=torch.get_num_threads())
    tensors.finish()
    return gradients


def affinity(q: Tensor, k: Tensor) -> Tensor:
    """Return the energies q_u . k_i (B, K, *S), float32 (float64 for float64 inputs), channels-last in memory."""
    energies, tensors = empty_energies(q), _Tensors(q.dtype)
    _launch().affinity(tensors.read(q), tensors.read(k), energies.data_ptr(), torch.get_num_threads())
    return energies


def aggregate(weights: Tensor, v: Tensor) -> Tensor:
    """Return each position's sum of v over its criss-cross, weighted (B, C, *S), in v's dtype and layout."""
    return _weighted_sum(weights, v, transposed=False)


def aggregate_transposed(weights: Tensor, x: Tensor) -> Tensor:
    """Return the transpose of `aggregate` applied to x (B, C, *S), in x's dtype and layout."""
    return _weighted_sum(weights, x, transposed=True)


def _weighted_sum(weights: Tensor, v: Tensor, transposed: bool) -> Tensor:
    dtype = energy_dtype(v.dtype)  # also of the sums, which are rounded once, and not once for each axis
    out, tensors = torch.empty_like(v), _Tensors(dtype)
    wide = weights.to(dtype).movedim(1, -1).contiguous()
    values, result = tensors.read(v), tensors.write(out)
    _launch().aggregate(wide.data_ptr(), values, result, torch.get_num_threads(), transposed=transposed)
    tensors.finish()
    return out
