"""The two stages of the op on the CUDA kernels: `affinity`, `aggregate` and its transpose.

Energies and weights are channels-last in memory, (B, *S, K): the K numbers of a position's criss-cross are contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ccgpu.bridges.cupy_cuda.attention import Kernels, aligned, native, result_like
from ccgpu.bridges.cupy_cuda.launch import LAUNCHER, Launcher
from ccgpu.layouts import empty_energies, energy_dtype


class Stages:
    """The kernels of the stages behind a launcher, as functions of torch tensors."""

    def __init__(self, launcher: Launcher) -> None:
        self._kernels = Kernels(launcher)

    def affinity(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the energies q_u . k_i (B, K, *S), float32 (float64 for float64 inputs), channels-last in memory."""
        energies = empty_energies(q)
        if energies.numel():
            self._kernels.run("affinity", q, q, {"q": native(q), "k": native(k), "weights": energies}, 1.0)
        return energies

    def aggregate(self, weights: Tensor, v: Tensor) -> Tensor:
        """Return each position's sum of v over its criss-cross, weighted (B, C, *S), in v's dtype and layout."""
        return self._weighted_sum("aggregate", weights, v)

    def aggregate_transposed(self, weights: Tensor, x: Tensor) -> Tensor:
        """Return the transpose of `aggregate` applied to x (B, C, *S), in x's dtype and layout."""
        return self._weighted_sum("aggregate_transposed", weights, x)

    def _weighted_sum(self, kernel: str, weights: Tensor, v: Tensor) -> Tensor:
        if v.numel() == 0:
            return torch.empty_like(v)
        out = result_like(v)
        wide = aligned(weights.to(energy_dtype(v.dtype)).movedim(1, -1))
        self._kernels.run(kernel, v, v, {"v": native(v), "weights": wide, "out": out.memory}, 1.0)
        return out.finish()


_STAGES = Stages(LAUNCHER)
affinity = _STAGES.affinity
aggregate = _STAGES.aggregate
aggregate_transposed = _STAGES.aggregate_transposed
