"""Criss-cross attention by torch's fused attention: one call for each axis, merged by log-sum-exp.

Every line of an axis is a head of its own, so channels-last memory need not be copied. A bias masks the centre on all
axes but the last. The fused backward of each axis,

    P = exp(E - lse), dS = P (dO V^T - dO . out)

only needs lse and out of the whole criss-cross instead of the line's own, as in ring attention.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

aten = torch.ops.aten


def lines(x: Tensor, axis: int) -> Tensor:
    """Return x (B, channels, *S) as (outer, inner, N, channels): the lines of an axis as heads.

    A view of channels-last memory; of other memory a copy, because the fused attention needs contiguous channels.
    """
    sizes = x.shape[2:]
    outer, inner = x.shape[0] * math.prod(sizes[:axis]), math.prod(sizes[axis + 1 :])
    return x.movedim(1, -1).contiguous().view(outer, sizes[axis], inner, x.shape[1]).transpose(1, 2)


def to_map(x: Tensor, like: Tensor) -> Tensor:
    """Return the inverse of `lines` on x (outer, inner, N, channels), as a map with like's batch and sizes."""
    return x.transpose(1, 2).reshape(like.shape[0], *like.shape[2:], x.shape[-1]).movedim(-1, 1)


def _bias(n: int, like: Tensor) -> Tensor:
    """Return -inf on the diagonal (outer, inner, N, N), each row beginning at a multiple of 16 elements."""
    bias = like.new_zeros(n, -(-n // 16) * 16)
    bias.fill_diagonal_(-math.inf)
    return bias[:, :n].expand(*like.shape[:2], n, n)


def _forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return out (outer, inner, N, C) and lse (outer, inner, N) of attention along each line."""
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=1.0)
        return out, lse
    out, lse, _, _ = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, scale=1.0)
    return out, lse[..., : q.shape[2]]  # padded to a multiple of 32


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv of attention along each line, with the whole criss-cross's out and lse."""
    if q.device.type == "cpu":
        # The CPU's backward expects lse with the heads last in memory.
        lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, False, attn_mask=bias, scale=1.0
        )
    padding = -lse.shape[-1] % 32
    lse = functional.pad(lse, (0, padding), value=math.inf) if padding else lse.contiguous()
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    mask = [True, True, True, False]
    return aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, bias, out, lse, seed, seed, 0.0, mask, False, scale=1.0
    )[:3]


class _LineAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs, lses = [], []
        for axis, bias in _axes(q):
            out, lse = _forward(lines(q, axis), lines(k, axis), lines(v, axis), bias)
            outs.append(to_map(out, v))
            lses.append(to_map(lse.unsqueeze(-1), v))
        lse = torch.logsumexp(torch.stack(lses), 0)
        out = (lses[0] - lse).exp().to(v.dtype) * outs[0]
        for part, part_lse in zip(outs[1:], lses[1:], strict=True):
            out = torch.addcmul(out, (part_lse - lse).exp().to(v.dtype), part)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        totals: list[Tensor] = []
        for axis, bias in _axes(q):
            dout_lines, out_lines = (lines(x, axis) for x in (grads[0], out))
            q_lines, k_lines, v_lines = (lines(x, axis) for x in (q, k, v))
            lse_lines = lines(lse, axis).squeeze(-1)
            results = _backward(dout_lines, q_lines, k_lines, v_lines, bias, out_lines, lse_lines)
            parts = [to_map(x, q) for x in results]
            totals = [a + b for a, b in zip(totals, parts, strict=True)] if totals else parts
        return tuple(totals)


def _axes(q: Tensor) -> list[tuple[int, Tensor | None]]:
    """Return each axis with its bias; axes of length 1 but the last are left out: they hold only the centre."""
    last = q.ndim - 3
    axes = [axis for axis in range(last + 1) if axis == last or q.shape[2 + axis] > 1]
    return [(axis, None if axis == last else _bias(q.shape[2 + axis], lines(q, axis))) for axis in axes]


def line_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return criss-cross attention, computed by one fused attention for each axis."""
    return _LineAttention.apply(q, k, v)
