"""The context modules that are compared, and what one of them costs on features of one size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ccgpu.models.attention import RCCA
from ccgpu.models.context import ASPP, NonLocal, PyramidPooling
from ccgpu.train.measurement.timing import Clock, milliseconds
from ccgpu.train.memory import peak_bytes, saved_bytes

PAPERS_SHAPE = (1, 512, 97, 97)
Build = Callable[[int], nn.Module]


class Candidate(NamedTuple):
    """A module to measure.

    Attributes:
        context: the value of --contexts that selects it.
        name: its name in the table.
        build: number of channels -> the module.
        paper: the paper's numbers by column, at `PAPERS_SHAPE`.
    """

    context: str
    name: str
    build: Build
    paper: Mapping[str, float] = {}


CANDIDATES = (
    Candidate("rcca", "RCCA R=1", lambda channels: RCCA(channels, 1), {"gflops": 8.3, "saved_mb": 53}),
    Candidate("rcca", "RCCA R=2", lambda channels: RCCA(channels, 2), {"gflops": 16.5, "saved_mb": 127}),
    Candidate("rcca", "RCCA R=3", lambda channels: RCCA(channels, 3), {"gflops": 24.7, "saved_mb": 208}),
    Candidate("rcca", "RCCA R=2, recompute", lambda channels: RCCA(channels, 2, recompute=True)),
    Candidate(
        "nonlocal",
        "non-local, materialised",
        lambda channels: NonLocal(channels, form="materialised"),
        {"gflops": 108, "peak_mb": 1411},
    ),
    Candidate("nonlocal", "non-local, sdpa", lambda channels: NonLocal(channels, form="sdpa"), {"gflops": 108}),
    Candidate("psp", "PSP", PyramidPooling),
    Candidate("aspp", "ASPP", ASPP),
)
CONTEXTS = tuple(dict.fromkeys(candidate.context for candidate in CANDIDATES))


def flops(build: Build, shape: Sequence[int], *, backward: bool = False) -> int:
    """Return the multiplications and additions of a module on (B, C, H, W) features; nothing is computed.

    On the meta device `scaled_dot_product_attention` counts as the two matrix products that it is. On the CPU torch
    has a fused kernel for D = C that its counter does not know, so counting there would miss them.

    Args:
        build: number of channels -> the module.
        shape: (B, C, H, W).
        backward: whether to count forward and backward, instead of forward alone.
    """
    with torch.device("meta"):
        module, x = build(shape[1]).eval(), torch.empty(*shape).requires_grad_()
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            out = module(x)
            if backward:
                out.backward(torch.empty_like(out))  # the counter forbids autograd.grad around a checkpoint
    return counter.get_total_flops()


def prepared(build: Build, shape: Sequence[int], device: torch.device) -> tuple[nn.Module, Tensor]:
    """Return the module in eval mode and its input, which requires a gradient, both in channels last."""
    torch.manual_seed(0)
    with device:  # and not by .to, which refuses the parameters of a fake module
        module = build(shape[1]).eval()
    for name, parameter in module.named_parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        elif name == "gamma":
            nn.init.constant_(parameter, 0.5)
    x = torch.randn(*shape, device=device).to(memory_format=torch.channels_last).requires_grad_()
    return module, x


def training_step(module: nn.Module, x: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Return a function that runs forward and backward and returns the gradients of x and of the parameters."""
    gradient = torch.ones_like(x)
    return lambda: torch.autograd.grad(module(x), [x, *module.parameters()], gradient)


def measure(build: Build, shape: Sequence[int], clock: Clock, repeats: int) -> dict[str, Any]:
    """Return the cost of a module on (B, C, H, W) features.

    Args:
        build: number of channels -> the module.
        shape: (B, C, H, W).
        clock: the clock of the device on which to measure.
        repeats: number of timings, of which the median counts.

    Returns:
        parameters, gflops (forward), saved_mb, peak_mb, forward_ms and forward_backward_ms; `ccgpu cost` explains them.
    """
    module, x = prepared(build, shape, clock.device)
    step = training_step(module, x)
    step()  # the first call compiles kernels and fills caches
    peak, _ = peak_bytes(step, clock.device)
    both = milliseconds(step, clock, repeats)
    with torch.no_grad():
        module(x)
        forward = milliseconds(lambda: module(x), clock, repeats)
    return {
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "gflops": flops(build, shape) / 1e9,
        "saved_mb": saved_bytes(module, x) / 1e6,
        "peak_mb": peak / 1e6,
        "forward_ms": forward,
        "forward_backward_ms": both,
    }
