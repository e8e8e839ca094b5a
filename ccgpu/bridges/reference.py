"""The backend `reference`: the definition in NumPy, in float64, on CPU tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ccgpu.bridges.call import Call
from ccgpu.interchange import from_numpy, numpy_view
from ccgpu.kernels import reference
from ccgpu.layouts import empty_energies, energy_dtype


def _to_numpy(x: Tensor) -> np.ndarray:
    """Return x as an array in float64."""
    return numpy_view(x.to(torch.float64))


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, crossing: int | None = None) -> tuple[Tensor, Tensor]:
    """Return `kernels.reference.forward` on torch CPU tensors, rounded to their dtype once at the end.

    crossing is None, here and in `backward`: see `why_not`.
    """
    out, lse = reference.forward(_to_numpy(q), _to_numpy(k), _to_numpy(v), scale)
    return torch.empty_like(v).copy_(from_numpy(out)), from_numpy(lse).to(energy_dtype(q.dtype))


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
    """Return `kernels.reference.backward` on torch CPU tensors, rounded to their dtype once at the end."""
    gradients = reference.backward(
        _to_numpy(dout),
        _to_numpy(q),
        _to_numpy(k),
        _to_numpy(v),
        _to_numpy(out),
        _to_numpy(lse),
        _to_numpy(dlse),
        scale,
    )
    dq, dk, dv = (torch.empty_like(x).copy_(from_numpy(g)) for x, g in zip((q, k, v), gradients, strict=True))
    return dq, dk, dv


def affinity(q: Tensor, k: Tensor) -> Tensor:
    """Return `kernels.reference.affinity` on torch CPU tensors, rounded to the energies' dtype once at the end."""
    return empty_energies(q).copy_(from_numpy(reference.affinity(_to_numpy(q), _to_numpy(k))))


def aggregate(weights: Tensor, v: Tensor) -> Tensor:
    """Return `kernels.reference.aggregate` on torch CPU tensors, rounded to v's dtype once at the end."""
    return torch.empty_like(v).copy_(from_numpy(reference.aggregate(_to_numpy(weights), _to_numpy(v))))


def aggregate_transposed(weights: Tensor, x: Tensor) -> Tensor:
    """Return `kernels.reference.aggregate_transposed` on torch CPU tensors, rounded to x's dtype once at the end."""
    return torch.empty_like(x).copy_(from_numpy(reference.aggregate_transposed(_to_numpy(weights), _to_numpy(x))))


def why_not(call: Call) -> str | None:
    """Return why it cannot run a call that is a part of a criss-cross, or None: it runs every other call."""
    return None if call.whole else "it computes whole criss-crosses, and this is a part of one"
