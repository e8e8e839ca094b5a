"""Criss-cross attention by FlexAttention: dense attention under a block-sparse mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def line_numbers(position: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """Return, for every axis, the number of the line of that axis that a position (row-major) lies on."""
    numbers = []
    for axis in range(len(sizes)):
        inner, n = math.prod(sizes[axis + 1 :]), sizes[axis]
        numbers.append(position // (inner * n) * inner + position % inner)
    return numbers


@lru_cache(maxsize=4)
def criss_cross_mask(sizes: tuple[int, ...], block: int, device: torch.device) -> BlockMask:
    """Return the mask "both positions are on one line of some axis", in blocks of block x block positions.

    A block is computed if some line passes through its queries and its keys. torch's own constructor would find that
    out from a matrix of positions x positions, which needs gigabytes.
    """
    count = math.prod(sizes)
    blocks = -(-count // block)
    positions = torch.arange(count, device=device)
    joined = torch.zeros(blocks, blocks, dtype=torch.bool, device=device)
    for numbers in line_numbers(positions, sizes):
        through = torch.zeros(blocks, int(numbers.max()) + 1, device=device)
        through[positions // block, numbers] = 1.0
        joined |= through @ through.T > 0

    def on_one_line(b: Tensor, h: Tensor, u: Tensor, i: Tensor) -> Tensor:
        same = [x == y for x, y in zip(line_numbers(u, sizes), line_numbers(i, sizes), strict=True)]
        result = same[0]
        for other in same[1:]:
            result = result | other
        return result

    counts = joined.sum(-1, dtype=torch.int32)[None, None]
    order = joined.int().argsort(dim=-1, descending=True, stable=True).to(torch.int32)[None, None]
    return BlockMask.from_kv_blocks(counts, order, BLOCK_SIZE=block, mask_mod=on_one_line, seq_lengths=(count, count))


def touched(mask: BlockMask) -> float:
    """Return the share of blocks that are computed."""
    return float(mask.kv_num_blocks.sum()) / mask.kv_num_blocks.shape[-1] ** 2


def flex(sizes: tuple[int, ...], block: int, device: torch.device, compiled: bool = True) -> Function:
    """Return criss-cross attention on maps of one size by FlexAttention, compiled or in its plain eager form."""
    attention: Any = torch.compile(flex_attention, fullgraph=True, dynamic=False) if compiled else flex_attention
    mask = criss_cross_mask(sizes, block, device)
    # The default tiles are chosen for heads of at most 256 channels; with 512 channels of v they do not fit.
    options = None
    if device.type == "cuda":
        tile = min(block, 32)
        options = dict.fromkeys(("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2"), tile)
        options |= {"num_stages": 2, "num_warps": 4}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lines = (x.flatten(2).transpose(1, 2).unsqueeze(1) for x in (q, k, v))
        out = attention(*lines, block_mask=mask, scale=1.0, kernel_options=options)
        return out.squeeze(1).transpose(1, 2).unflatten(2, sizes)

    return attend
