"""Forward and backward in bfloat16 as a whole: layouts, sizes, pieces of lines, threads."""

import pytest
import torch

import ccgpu
from ccgpu.kernels.numba_cpu import dot_products
from tests.ccgpu.problems import Problem, attend, attend_plainly, check_errors, layouts, truth_in_float64
from tests.kernels.numba_cpu.problems import cut_up

needs_instructions = pytest.mark.skipif(not dot_products.AVAILABLE, reason="Numba does not compile for AVX-512 BF16")


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
def test_lines_some_queries_at_a_time(layout, sizes, monkeypatch):
    """dv of a piece is not rounded: rounded once for each of these pieces, it would have ten roundings."""
    cut_up(monkeypatch, SHEET_BYTES=1)
    check(problem_of(sizes, 1, 9, 40, layout))


@needs_instructions
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_chunks_of_channels(layout, monkeypatch):
    cut_up(monkeypatch, CHUNK_GATHERED=4)
    check(problem_of((20, 23), 1, 64, 100, layout))


@needs_instructions
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("sizes", [(40, 33), (1, 700), (700, 1), (300, 4)])
def test_same_bits_for_every_number_of_threads(layout, sizes):
    """One thread gathers four columns of (300, 4) together; of five, each gathers one. dP sums over all channels."""
    problem, before = problem_of(sizes, 1, 16, 150, layout), torch.get_num_threads()
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
