"""Forward and backward in bfloat16 as a whole: layouts, sizes, pieces of lines, threads, and other CPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ccgpu
from ccgpu.kernels.numba_cpu import dot_products, plans, schedule
from tests.ccgpu.problems import Problem, attend, attend_plainly, check_errors, layouts, truth_in_float64

ROOT = Path(__file__).resolve().parents[4]
needs_instructions = pytest.mark.skipif(not dot_products.AVAILABLE, reason="Numba does not compile for AVX-512 BF16")


@pytest.fixture
def plan_with(monkeypatch):
    """Return a function that sets numbers of schedule.py, for plans that are made anew."""

    def change(**numbers):
        for name, number in numbers.items():
            monkeypatch.setattr(schedule, name, number)
        plans.plan_of.cache_clear()

    yield change
    plans.plan_of.cache_clear()


def problem_of(sizes, batch, depth, channels, layout, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, depth, *sizes), (batch, depth, *sizes), (batch, channels, *sizes), (batch, channels, *sizes)
    q, k, v, dout = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    dlse = torch.randn(batch, *sizes, generator=generator)
    tensors = tuple(layouts(x, layout) for x in (q, k, v))
    return Problem(tensors, layouts(dout, layout), dlse, 0.3, (layout,) * 3)


def check(problem):
    check_errors(attend(problem, "numba_cpu"), attend_plainly(problem), truth_in_float64(problem), problem)


@needs_instructions
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "misaligned"])
@pytest.mark.parametrize(
    ("sizes", "depth", "channels"),
    [
        ((97,), 3, 33),
        ((1, 130), 64, 64),
        ((130, 1), 6, 31),
        ((33, 17), 64, 96),
        ((19, 45), 5, 70),
        ((3, 17, 18), 8, 32),
    ],
)
def test_values_of_larger_maps(layout, sizes, depth, channels):
    check(problem_of(sizes, 2, depth, channels, layout))


@needs_instructions
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("sizes", [(61,), (61, 3), (3, 61), (25, 26), (13, 2, 29)])
def test_lines_some_queries_at_a_time(layout, sizes, plan_with):
    """dv of a piece is not rounded: rounded once for each of these pieces, it would have ten roundings."""
    plan_with(SHEET_BYTES=1)
    check(problem_of(sizes, 1, 9, 40, layout))


@needs_instructions
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_chunks_of_channels(layout, plan_with, monkeypatch):
    plan_with(CHUNK_GATHERED=4)
    check(problem_of((20, 23), 1, 64, 100, layout))


@needs_instructions
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("sizes", [(40, 33), (1, 700), (700, 1)])
def test_same_bits_for_every_number_of_threads(layout, sizes):
    problem, before = problem_of(sizes, 1, 16, 64, layout), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(attend(problem, "numba_cpu"))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        for a, b in zip(results[0], others, strict=True):
            assert torch.equal(a, b)


@needs_instructions
def test_lines_of_infinite_and_nan_values_stay_among_themselves():
    for value in (torch.nan, torch.inf):
        problem = problem_of((21, 22), 1, 8, 40, "channels_last")
        problem.tensors[2][0, 3, 7, 9] = value
        out, _ = ccgpu.cca(*problem.tensors, scale=0.3, return_lse=True, backend="numba_cpu")
        reached = torch.zeros(1, 40, 21, 22, dtype=torch.bool)
        reached[0, 3, 7, :] = reached[0, 3, :, 9] = True
        assert torch.equal(out.isfinite(), ~reached)


PROGRAM = """
import torch, ccgpu
from ccgpu.kernels.numba_cpu import dot_products
x = torch.randn(1, 6, 5, 7, dtype=torch.bfloat16, requires_grad=True)
out = ccgpu.cca(x, x, x, backend="numba_cpu")
(gradient,) = torch.autograd.grad(out.sum(), x)
exact = ccgpu.cca(x.double(), x.double(), x.double(), backend="cpu")
assert (out - exact).abs().max() < 0.05
assert gradient.isfinite().all()
print(dot_products.AVAILABLE)
"""


AVX512 = "+avx,+avx2,+fma,+f16c,+avx512f,+avx512bw,+avx512dq,+avx512vl"


@pytest.mark.parametrize(
    "settings",
    [
        {"NUMBA_CPU_NAME": "generic"},
        {"NUMBA_ENABLE_AVX": "0"},
        pytest.param({"NUMBA_CPU_NAME": "skylake-avx512", "NUMBA_CPU_FEATURES": AVX512}, marks=needs_instructions),
    ],
    ids=["generic", "without AVX", "without BF16"],
)
def test_other_instructions_are_used_where_numba_may_not_use_these(settings, tmp_path):
    environment = {**os.environ, **settings, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    answer = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (answer.returncode, answer.stdout.strip()) == (0, "False"), answer.stderr
