"""What a case would cost, known before it runs: memory by the shapes of its tensors, time by its FLOPs.

    peak    = counted peak * (measured / counted peak) of the module at a smaller size
    time    = FLOPs * (measured time / FLOPs) of the module at a smaller size

The counted peak is `ccgpu.train.memory.counted_peak` of the same operations on tensors without data. What it leaves
out, the workspace of convolutions and of batched products, grows with the map too, and the ratio at a smaller size
holds it. Where nothing smaller was measured, the ratio of memory is 1, and the FLOPs run at the rate of a large matrix
product, so that both are lower bounds. FLOPs and saved bytes follow from the shapes: they are exact.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ccgpu.train.measurement.contexts import Build, flops, prepared, training_step
from ccgpu.train.measurement.timing import Clock, milliseconds
from ccgpu.train.memory import counted_peak, saved_bytes

PREDICTED = ("peak_mb", "forward_ms", "forward_backward_ms")
"""The numbers of a case that are predicted; the others are exact."""
_SIDE = 1024  # of the matrices of `product_rate`: large enough for a matrix product's full rate on CPUs


class Counts(NamedTuple):
    """What follows from the shapes of a case alone.

    Attributes:
        parameters: their number.
        gflops: of forward.
        both_gflops: of forward and backward.
        saved_mb: what forward saves for backward, in 10^6 bytes.
        peak_mb: the counted peak of forward and backward, in 10^6 bytes.
    """

    parameters: int
    gflops: float
    both_gflops: float
    saved_mb: float
    peak_mb: float


class Rates(NamedTuple):
    """How a module's measurements relate to its counts.

    Attributes:
        peak: measured by counted peak.
        forward: milliseconds of forward by GFLOP.
        both: milliseconds of forward and backward by GFLOP.
    """

    peak: float
    forward: float
    both: float


def count(build: Build, shape: Sequence[int], device: torch.device) -> Counts:
    """Return the counts of a module on (B, C, H, W) features; nothing is computed and no memory is taken.

    The tensors are fake ones of the device, so that torch chooses the same implementations as for real ones.
    """
    with FakeTensorMode():
        module, x = prepared(build, shape, device)
        peak, saved = counted_peak(training_step(module, x)), saved_bytes(module, x)
    return Counts(
        sum(parameter.numel() for parameter in module.parameters()),
        flops(build, shape) / 1e9,
        flops(build, shape, backward=True) / 1e9,
        saved / 1e6,
        peak / 1e6,
    )


def rates(counts: Counts, record: Mapping[str, Any]) -> Rates:
    """Return the rates of a measured case, by its counts and its record of `measure`."""
    return Rates(
        record["peak_mb"] / counts.peak_mb,
        record["forward_ms"] / counts.gflops,
        record["forward_backward_ms"] / counts.both_gflops,
    )


def product_rate(clock: Clock) -> Rates:
    """Return the rates of a case of which nothing smaller was measured: those of a large matrix product."""
    a = torch.ones(_SIDE, _SIDE, device=clock.device)
    a @ a
    each = milliseconds(lambda: a @ a, clock, 3) / (2 * _SIDE**3 / 1e9)
    return Rates(1.0, each, each)


def predict(counts: Counts, by: Rates) -> dict[str, Any]:
    """Return the numbers of `measure` for a case that has not run."""
    return {
        "parameters": counts.parameters,
        "gflops": counts.gflops,
        "saved_mb": counts.saved_mb,
        "peak_mb": counts.peak_mb * by.peak,
        "forward_ms": counts.gflops * by.forward,
        "forward_backward_ms": counts.both_gflops * by.both,
    }


def available_bytes(device: torch.device) -> int:
    """Return the memory that a device has left, or where the system does not say, half of what it has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        return 1024 * kilobytes["MemAvailable"]
    except (OSError, KeyError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
