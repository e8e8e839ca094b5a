"""The formulations people use today, written for comparison: inputs (B, D, H, W), (B, D, H, W), (B, C, H, W)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def _no_centre(n: int, like: Tensor) -> Tensor:
    return torch.diag(like.new_full((n,), -math.inf))


def authors_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The authors' formulation: copy columns and rows into batches, bmm, one softmax over the joined energies."""
    b, _, h, w = q.shape

    def columns(x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2).contiguous().view(b * w, -1, h)

    def rows(x: Tensor) -> Tensor:
        return x.permute(0, 2, 1, 3).contiguous().view(b * h, -1, w)

    energy_h = torch.bmm(columns(q).transpose(1, 2), columns(k)) + _no_centre(h, q).expand(b * w, h, h)
    energy_w = torch.bmm(rows(q).transpose(1, 2), rows(k))
    energy = torch.cat([energy_h.view(b, w, h, h).permute(0, 2, 1, 3), energy_w.view(b, h, w, w)], 3)
    weights = torch.softmax(energy, 3)
    weights_h = weights[..., :h].permute(0, 2, 1, 3).contiguous().view(b * w, h, h)
    weights_w = weights[..., h:].contiguous().view(b * h, w, w)
    out_h = torch.bmm(columns(v), weights_h.transpose(1, 2)).view(b, w, -1, h).permute(0, 2, 3, 1)
    out_w = torch.bmm(rows(v), weights_w.transpose(1, 2)).view(b, h, -1, w).permute(0, 2, 1, 3)
    return out_h + out_w


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """mmcv's formulation: two einsums, one softmax over the joined energies, two einsums."""
    h = q.shape[2]
    energy_h = torch.einsum("bchw,bciw->bwhi", q, k) + _no_centre(h, q)
    energy_w = torch.einsum("bchw,bchj->bhwj", q, k)
    weights = torch.softmax(torch.cat([energy_h.permute(0, 2, 1, 3), energy_w], -1), -1)
    out = torch.einsum("bciw,bhwi->bchw", v, weights[..., :h])
    return out + torch.einsum("bchj,bhwj->bchw", v, weights[..., h:])


def dense_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Non-local attention, every position to every position: another function, for the cost only."""
    lines = (x.flatten(2).transpose(1, 2).unsqueeze(1) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(*lines, scale=1.0)
    return out.squeeze(1).transpose(1, 2).unflatten(2, q.shape[2:])


SAME_FUNCTION = {"authors' bmm": authors_bmm, "mmcv's einsum": einsum}
OTHER_FUNCTION = {"dense SDPA (non-local)": dense_sdpa}
