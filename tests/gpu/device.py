"""The device under test, its backends and its arithmetics."""

from typing import NamedTuple

import torch

import ccgpu
from ccgpu import dispatch
from tests.ccgpu.problems import layouts

DEVICE = torch.device("cuda")
BACKENDS = [b.name for b in dispatch.BACKENDS if b.made_for != "cpu"]


class Arithmetic(NamedTuple):
    """How products are computed: the dtype, and the relative rounding of a factor if it is not the dtype's."""

    dtype: torch.dtype
    unit: float | None = None


ARITHMETICS = {
    "float64": Arithmetic(torch.float64),
    "float32": Arithmetic(torch.float32),
    # 10 bits behind the point; cuBLAS cuts off what the kernels round.
    "tf32": Arithmetic(torch.float32, 2.0**-10),
    "bfloat16": Arithmetic(torch.bfloat16),
    "float16": Arithmetic(torch.float16),
}


def why_not(backend, dtype=torch.float32):
    """Return why a backend cannot run CUDA tensors of a dtype here, with its name, or None."""
    status = next(b for b in ccgpu.backends("cuda", dtype=dtype) if b.name == backend)
    return None if status.available else f"{backend}: {status.reason}"


def inputs(sizes, d=16, c=24, dtype=torch.float32, batch=2, seed=0, last=True, device=DEVICE):
    """Return q, k, v and a gradient of out, the channels last in memory or not."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for channels in (d, d, c, c):
        x = torch.randn(batch, channels, *sizes, generator=generator, dtype=torch.float64)
        x = (x * channels**-0.25 if len(tensors) < 2 else x).to(dtype).to(device)
        tensors.append(layouts(x, "channels_last") if last else x)
    return tuple(tensors[:3]), tensors[3]


def gradients(tensors, dout, backend=None, function=None):
    """Return out, lse, dq, dk, dv; the gradient of lse is all ones."""
    leaves = tuple(x.detach().requires_grad_() for x in tensors)
    attend = ccgpu.cca if function is None else function
    out, lse = attend(*leaves, return_lse=True, backend=backend)
    return (out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, (dout, torch.ones_like(lse))))


def same_bits(first, second):
    """Tell whether two lists of tensors are equal in every bit, NaN and the sign of zero included."""
    return all(
        a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(first, second, strict=True)
    )
