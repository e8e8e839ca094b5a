"""The public functions as modules with inputs of any size, and what an exported one must return."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ccgpu

SCALE = 0.7
FUNCTIONS = ("cca", "cca with lse", "affinity", "aggregate")
ALL = "all functions"  # in one module: an exporter that takes seconds for a module then serves them all
TRACED = {1: (5,), 2: (5, 7), 3: (2, 3, 4)}  # map sizes for tracing, by number of axes


class Call(nn.Module):
    """A public function as a module, whatever it returns as a tuple."""

    def __init__(self, name: str, backend: str | None = None) -> None:
        super().__init__()
        self.name = name
        self.backend = backend

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if self.name == "affinity":
            return (ccgpu.affinity(*inputs, backend=self.backend),)
        if self.name == "aggregate":
            return (ccgpu.aggregate(*inputs, backend=self.backend),)
        if self.name == ALL:
            q, k, v, weights = inputs
            stages = ccgpu.affinity(q, k, backend=self.backend), ccgpu.aggregate(weights, v, backend=self.backend)
            return *ccgpu.cca(q, k, v, scale=SCALE, return_lse=True, backend=self.backend), *stages
        q, k, v = inputs
        if self.name == "cca":
            return (ccgpu.cca(q, k, v, scale=SCALE, backend=self.backend),)
        return ccgpu.cca(q, k, v, scale=SCALE, return_lse=True, backend=self.backend)


def draw(name: str, batch: int, sizes: Sequence[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Return inputs of a function for a map of these sizes."""
    generator = torch.Generator().manual_seed(batch + sum(sizes))
    count = sum(sizes) - len(sizes) + 1

    def tensor(channels: int) -> Tensor:
        return torch.randn(batch, channels, *sizes, generator=generator, dtype=torch.float64).to(dtype)

    if name == "affinity":
        return tensor(3), tensor(3)
    if name == "aggregate":
        return tensor(count), tensor(5)
    maps = tensor(3), tensor(3), tensor(5)
    return (*maps, tensor(count)) if name == ALL else maps


def other_sizes(sizes: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
    """Return batches and map sizes at which nothing was traced: larger, empty batch, one position, one line."""
    return [
        (1, tuple(3 * size - 2 for size in sizes)),
        (0, sizes),
        (3, (1,) * len(sizes)),
        (1, (1, *sizes[1:])),
        (2, (*sizes[:-1], 1)),
        (1, (13, *(1 for _ in sizes[1:]))),
    ]


def check(found: Sequence[Tensor], name: str, inputs: Sequence[Tensor], least: float = 1e-12) -> None:
    """Compare what an exported function returned with the definition in NumPy float64, to `least` or the dtype's."""
    expected = Call(name, "reference")(*inputs)
    assert len(found) == len(expected)
    for value, wanted in zip(found, expected, strict=True):
        # A unit of the last place at 1 for results of 16 bits, rounding errors of sums for the others.
        unit = max(torch.finfo(wanted.dtype).eps, 1e-5 if wanted.dtype == torch.float32 else 0, least)
        torch.testing.assert_close(value, wanted, rtol=unit, atol=unit, equal_nan=True)


def dynamic_axes(name: str, inputs: Sequence[Tensor]) -> list[list[int]]:
    """Return each input's dynamic axes: all but the channels of maps."""
    axes = [[axis for axis in range(x.ndim) if axis != 1] for x in inputs]
    weights = {"aggregate": 0, ALL: 3}.get(name)
    if weights is not None:
        axes[weights] = list(range(inputs[weights].ndim))  # H + W - 1 of them
    return axes


def dynamic_shapes(name: str, inputs: Sequence[Tensor]) -> tuple[tuple[dict[int, Any], ...]]:
    """Return the dynamic axes as torch.export takes them, the inputs of `Call` being one argument, *inputs."""
    return (tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in dynamic_axes(name, inputs)),)


def run_without_ccgpu(program: str, folder: Path) -> None:
    """Run a Python program in a folder, where ccgpu cannot be imported."""
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    source = f'import sys\nsys.modules["ccgpu"] = None\n{program}'
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", source],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
