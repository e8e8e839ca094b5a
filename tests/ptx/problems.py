"""Runs the bridge on the executed PTX and judges the results by the NumPy reference, for the tests of kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.cases import precision
from benchmarks.registers import GPUS
from ccgpu.bridges.cupy_cuda.attention import Kernels
from tests.ccgpu.problems import Problem, attend_plainly, check_errors, expected
from tests.kernels.cuda.test_kernels import TF32_UNIT, attend, most_tiles
from tests.ptx.launcher import PtxLauncher


def launcher(generation: int, multiprocessors: int | None = None, **options: Any) -> PtxLauncher:
    """Return a launcher for a generation of GPUs, such as 90; with no multiprocessors no channels are cut."""
    limits = GPUS[f"sm_{generation}"]
    if multiprocessors is not None:
        limits = limits._replace(multiprocessors=multiprocessors)
    return PtxLauncher(limits, f"compute_{generation}", **options)


@contextlib.contextmanager
def arithmetic_of(name: str, tiles: tuple[int, ...] | None = None) -> Iterator[None]:
    """Choose an arithmetic by torch's setting for TF32, and the numbers of tiles that a block may hold."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(precision(name))
        if tiles is not None:
            stack.enter_context(most_tiles(tiles))
        yield


def judge(results: tuple[Any, ...], problem: Problem, arithmetic: str) -> None:
    """Raise unless out, lse, dq, dk, dv are as near to the reference as einsum's, but for what rounding costs."""
    unit = TF32_UNIT if arithmetic == "tf32" else None
    check_errors(results, attend_plainly(problem), expected(problem), problem, unit)


def check(problem: Problem, arithmetic: str, on: PtxLauncher, tiles: tuple[int, ...] | None = None) -> None:
    """Run forward and backward and judge them; every launch must be of the arithmetic."""
    with arithmetic_of(arithmetic, tiles):
        judge(attend(problem, Kernels(on)), problem, arithmetic)
    assert {launch.configuration.arithmetic for launch in on.launched} == {arithmetic}


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    """Tell whether results are the same to the bit."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
