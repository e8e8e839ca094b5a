"""Criss-cross attention in differentiable torch operations: the source of second derivatives, and what exported
networks hold in place of the op.

It keeps every energy and lets autograd differentiate to any order. Its operations have a counterpart in ONNX.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ccgpu.torch_lines import energy_dtype


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return out and lse of `ccgpu.cca`, each a differentiable function of q, k and v."""
    axes = range(q.ndim - 2)
    wide = energy_dtype(q.dtype)
    energies = []
    for axis in axes:
        lines_q, lines_k = (x.movedim(1, -1).movedim(1 + axis, -2).to(wide) for x in (q, k))
        line = scale * lines_q @ lines_k.transpose(-1, -2)
        if axis != axes[-1]:  # the centre counts once: on the last axis
            index = torch.arange(line.shape[-1], device=line.device)
            line = line.masked_fill(index == index[:, None], -math.inf)
        energies.append(line.movedim(-2, 1 + axis))
    joint = torch.cat(energies, -1)
    lse = torch.logsumexp(joint, -1)
    weights = torch.exp(joint - lse.unsqueeze(-1)).split([e.shape[-1] for e in energies], -1)
    out = torch.zeros_like(v.movedim(1, -1), dtype=wide)
    for axis, w in zip(axes, weights, strict=True):
        lines_v = v.movedim(1, -1).movedim(1 + axis, -2).to(wide)
        out = out + (w.movedim(1 + axis, -2) @ lines_v).movedim(-2, 1 + axis)
    return out.movedim(-1, 1).to(v.dtype), lse
