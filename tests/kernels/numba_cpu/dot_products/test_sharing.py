"""A few long lines in bfloat16 on many threads: who computes what, values, the same bits for every number of them."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ccgpu.bridges import numba_cpu
from ccgpu.kernels.numba_cpu import dot_products, launch, schedule, sharing
from ccgpu.kernels.numba_cpu.attention import Sizes
from ccgpu.kernels.numba_cpu.dot_products import rows, sheets
from ccgpu.kernels.numba_cpu.lines import Group
from ccgpu.kernels.numba_cpu.operands import Layout
from ccgpu.kernels.numba_cpu.vectors import VECTOR_BYTES
from tests.ccgpu.problems import attend_plainly, check_errors, layouts, truth_in_float64
from tests.kernels.numba_cpu.problems import cut_up, problem_of

needs_instructions = pytest.mark.skipif(not dot_products.AVAILABLE, reason="Numba does not compile for AVX-512 BF16")
# Maps of few lines that are longer than the queries whose energies are in memory at once, and not multiples of these.
LINES = [(83,), (1, 83), (83, 1), (2, 61), (61, 3), (1, 1, 83), (1, 61, 2), (24,), (37,), (1, 200), (131, 1)]
CHANNELS = [(16, 48), (32, 64), (9, 150), (1, 33)]


@pytest.fixture
def cut(monkeypatch):
    """Return a function that sets numbers of schedule.py for plans that are made anew, and shares the smallest work."""
    return lambda **numbers: cut_up(monkeypatch, SMALL=0, **numbers)


@pytest.fixture
def attend(monkeypatch):
    """Return a function that returns out, lse, dq, dk, dv of a problem on a number of threads."""

    def attend_on(problem, threads, layout="contiguous"):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        q, k, v, dout = (layouts(x.detach(), layout) for x in (*problem.tensors, problem.dout))
        out, lse = numba_cpu.forward(q, k, v, problem.scale)
        return out, lse, *numba_cpu.backward(dout, q, k, v, out, lse, problem.dlse, problem.scale)

    return attend_on


def check(problem, results):
    """Check errors against the definition in float64."""
    check_errors(results, attend_plainly(problem), truth_in_float64(problem), problem)


def same_bits(a, b):
    """Tell whether tensors have the same bits, whichever number or NaN these stand for."""
    return np.array_equal(*(x.contiguous().flatten().view(torch.uint8).numpy() for x in (a, b)))


# Who computes what ----------------------------------------------------------------------------------------------------


@needs_instructions
def test_a_long_line_is_shared_in_backward():
    """One phase for K^T and V^T; for each of four pieces of 325 queries, one by queries and one by keys."""
    x = Layout((1, 64, 1, 1000), (128_000, 2000, 2000, 2), "bfloat16")
    phases = {threads: launch.backward_plan(*[x] * 8, threads=threads)._phases for threads in (1, 2, 8)}
    assert phases == {1: 1, 2: 9, 8: 9}


@given(st.integers(0, 50), st.integers(1, 3000), st.integers(1, 64), st.sampled_from([1, 2, 32]))
@settings(deadline=None)
def test_parts_are_of_whole_pairs_and_panels(first, length, parts, multiple):
    group, end = Group(0, 5, 3, first, length), first
    for number in range(parts):
        part = rows.share_of.py_func(group, number, parts, multiple)
        assert (part.first, part.image, part.position, part.lines) == (end, 0, 5, 3)
        assert part.length >= 0
        end += part.length
        assert (end - first) % multiple == 0 or number == parts - 1
    assert end == first + length


@given(
    st.sampled_from([(60,), (1, 1000), (4096, 1), (2, 30), (30, 3), (5, 300)]),
    st.integers(1, 300),
    st.integers(1, 600),
    st.booleans(),
    st.booleans(),
)
@settings(deadline=None)
def test_memory_is_divided_in_vectors_and_in_order(extents, depth, channels, gathers, shared):
    sizes = Sizes(int(np.prod(extents)), depth, channels, 1.0, 7, extents[-1])
    for axis in schedule.plan_axes(extents, 1, 4, gathers, 2, whole=True):
        at = sheets.divide_memory(axis, sizes, shared)
        assert list(at) == sorted(at)
        assert all(offset % VECTOR_BYTES == 0 for name, offset in at._asdict().items() if name != "one")
        assert sum(sheets.memory_of_a_shared_line(axis, sizes)) == sheets.divide_memory(axis, sizes, True).end


@pytest.mark.parametrize("extents", [(1, 1000), (1, 4096), (4096, 1)])
@pytest.mark.parametrize("gathers", [False, True])
def test_a_shared_line_needs_no_more_memory_than_converted_numbers(extents, gathers):
    sizes = Sizes(max(extents), 64, 512, 1.0, 7, extents[-1])
    for axis in schedule.plan_axes(extents, 1, 4, gathers, 2, whole=True):
        if axis.length == 1:
            continue
        converted = sharing.memory_of_a_shared_line(axis, sizes, 4, True)
        assert all(
            ours <= theirs for ours, theirs in zip(sheets.memory_of_a_shared_line(axis, sizes), converted, strict=True)
        )


# Values ---------------------------------------------------------------------------------------------------------------


@needs_instructions
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("sizes", LINES, ids=str)
def test_few_lines_on_many_threads(cut, attend, sizes, channels, layout):
    cut(SHEET_BYTES=2**13)
    problem = problem_of(sizes, torch.bfloat16, batch=1, d=channels[0], c=channels[1])
    alone = attend(problem, 1, layout)
    check(problem, alone)
    for threads in (2, 3, 5, 16):
        for a, b in zip(alone, attend(problem, threads, layout), strict=True):
            assert same_bits(a, b), f"{threads} threads"


@needs_instructions
@pytest.mark.parametrize("queries", [6, 7, 16, 33])
def test_lengths_around_those_of_pieces(cut, attend, queries):
    """Pieces of an even and of an odd number of queries; a last one of a single query, or of as many as the others."""
    for length in sorted({n * queries + more for n in (1, 2, 4) for more in (-1, 0, 1)} - {5}):
        row = -(-length * 4 // 64) * 64
        cut(SHEET_BYTES=2 * queries * row)
        problem = problem_of((1, length), torch.bfloat16, batch=1, d=8, c=40, seed=length)
        alone = attend(problem, 1)
        check(problem, alone)
        for threads in (2, 3, 5, 16):
            for a, b in zip(alone, attend(problem, threads), strict=True):
                assert same_bits(a, b), f"{length} positions, {threads} threads"


@needs_instructions
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("batch", [2, 3, 7])
def test_images_of_a_single_line(cut, attend, batch, layout):
    cut(SHEET_BYTES=2**13)
    problem = problem_of((1, 50), torch.bfloat16, batch=batch, d=9, c=70)
    alone = attend(problem, 1, layout)
    check(problem, alone)
    for threads in (2, 4, 5, 16):
        for a, b in zip(alone, attend(problem, threads, layout), strict=True):
            assert same_bits(a, b), f"{threads} threads"


@needs_instructions
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_line_in_one_piece_and_in_chunks_of_channels(cut, attend, layout):
    """Without pieces dk and dv are not summed apart; V^T of a shared line lies chunk after chunk."""
    cut(CHUNK_GATHERED=4)
    for sizes in ((1, 300), (150, 2), (2050, 1)):
        problem = problem_of(sizes, torch.bfloat16, batch=1, d=40, c=100)
        alone = attend(problem, 1, layout)
        check(problem, alone)
        for threads in (2, 5):
            for a, b in zip(alone, attend(problem, threads, layout), strict=True):
                assert same_bits(a, b), f"{sizes}, {threads} threads"


@needs_instructions
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_reach_the_same_places(cut, attend, value):
    cut(SHEET_BYTES=2**13)
    for number, place in itertools.product(range(4), (0, 40, 82)):
        problem = problem_of((1, 83), torch.bfloat16, batch=1, d=16, c=32)
        (*problem.tensors, problem.dout)[number].detach()[0, 3, 0, place] = value
        alone, together = (attend(problem, threads) for threads in (1, 4))
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a.isfinite(), b.isfinite())
            assert torch.equal(a.nan_to_num(0.5), b.nan_to_num(0.5))
