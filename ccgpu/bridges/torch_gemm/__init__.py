"""The backends `cpu` and `torch`: the op on torch's own matrix products, line by line, on any device."""

from __future__ import annotations

import torch

from ccgpu.bridges.call import Call
from ccgpu.bridges.torch_gemm.attention import backward, forward
from ccgpu.bridges.torch_gemm.stages import affinity, aggregate, aggregate_transposed

__all__ = ["affinity", "aggregate", "aggregate_transposed", "backward", "forward", "why_not"]


def why_not(call: Call) -> str | None:
    """Return why torch cannot run a call (a CUDA device that it does not see), or None."""
    if call.device.type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None
