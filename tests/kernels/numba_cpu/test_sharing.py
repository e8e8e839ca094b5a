"""Few lines on many threads: parts of lines, lines that all threads share; plans, values, threads that are late."""

import concurrent.futures
import itertools
import os
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ccgpu.bridges import numba_cpu
from ccgpu.kernels import reference
from ccgpu.kernels.numba_cpu import calls, schedule, sharing, workers
from ccgpu.kernels.numba_cpu.lines import group_at, part_of, position_of, share_of
from tests.ccgpu import stage_problems
from tests.ccgpu.problems import attend_plainly, check_errors, expected
from tests.error_table import VALUE_LIMIT
from tests.kernels.numba_cpu.problems import DTYPES, LAYOUTS, arrays_of, attend, cut_up, problem_of, tensors_of

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32", "float16"])


# Plans ----------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(1, 5000), st.integers(1, 70))
def test_parts_are_no_smaller_than_a_tile_and_hardly_lengthen_a_share(lines, length, threads):
    parts = sharing.parts_of(lines, length, threads)
    assert 1 <= parts <= max(1, length // sharing.TILE_ROWS)

    def longest(parts):
        return -(-lines * parts // threads) * -(-length // parts)

    assert longest(parts) <= longest(1) + length / sharing.HELD_UP


@pytest.mark.parametrize(
    ("lines", "length", "threads", "parts"),
    [
        (1, 1000, 2, 8),
        (1, 1000, 8, 16),
        (2, 1000, 8, 8),
        (8, 1000, 8, 1),
        (97, 97, 2, 1),
        (1, 1000, 1, 1),
        (1, 9, 8, 1),
    ],
)
def test_parts_of_lines(lines, length, threads, parts):
    assert sharing.parts_of(lines, length, threads) == parts


def places(axis, positions, part):
    """Return the indices of a part's positions among all images of `positions` positions."""
    place = position_of.py_func
    return {place(axis, positions, part, m, i) for m in range(part.lines) for i in range(part.length)}


@given(
    st.sampled_from([(60,), (1, 47), (47, 1), (2, 30), (30, 3), (1, 2, 40), (3, 5, 4), (13,)]),
    st.integers(1, 3),
    st.booleans(),
    st.integers(1, 20),
    st.integers(1, 2**14),
)
@settings(max_examples=60, deadline=None)
def test_backward_computes_each_step_once_and_after_what_it_needs(sizes, images, gathers, threads, sheet_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "SHEET_BYTES", sheet_bytes)
        axes = schedule.plan_axes(sizes, images, 4, gathers, threads, whole=True)
    positions = int(np.prod(sizes))
    for axis in axes:
        count = images * axis.outer * axis.groups
        columns, by_queries, by_keys = [], [], []
        for divided, task, begin, end, _ in sharing.backward_phases(axis, 0, count, threads, 8):
            for number in range(begin, end):
                group = group_at.py_func(divided, number)
                line, keys = part_of.py_func(group, 0, axis.length), places(axis, positions, group)
                if task.columns:
                    columns += keys
                for first in range(task.first, task.end, axis.queries):
                    queries = part_of.py_func(line, first, min(axis.queries, task.end - first))
                    if task.by_queries:
                        part = share_of.py_func(queries, number % divided.parts, divided.parts)
                        assert places(axis, positions, line) <= set(columns)
                        by_queries += places(axis, positions, part)
                    if task.by_keys:
                        needed = places(axis, positions, queries)
                        assert needed <= set(by_queries)
                        by_keys += [(min(needed), key) for key in keys]
        everything = list(range(images * positions))
        assert sorted(columns) == sorted(by_queries) == everything
        pieces = -(-axis.length // axis.queries)
        assert len(by_keys) == len(set(by_keys)) == len(everything) * pieces


# Values ---------------------------------------------------------------------------------------------------------------

# Maps of few lines that are longer than the queries whose energies are in memory at once, and not multiples of these.
LINES = [(83,), (1, 83), (83, 1), (2, 61), (61, 3), (1, 1, 83), (1, 61, 2), (24,), (37,)]


@pytest.fixture
def short_pieces(monkeypatch):
    """Pieces of 12 to 32 queries."""
    cut_up(monkeypatch, SMALL=0, SHEET_BYTES=2**13)


@every_dtype
@pytest.mark.parametrize("order", ["contiguous", "channels last", "sliced"])
@pytest.mark.parametrize("channels", [(16, 48), (9, 150)], ids=["whole vectors", "parts of vectors"])
@pytest.mark.parametrize("sizes", LINES, ids=str)
def test_few_lines_on_many_threads(short_pieces, sizes, channels, order, dtype):
    """Values are right, and the same to the bit for every number of threads."""
    problem = problem_of(sizes, dtype, batch=1, d=channels[0], c=channels[1])
    arrays = [LAYOUTS[order](x) for x in arrays_of(problem)]
    alone = attend(*arrays, problem.scale, threads=1)
    check_errors(tensors_of(alone), attend_plainly(problem), expected(problem), problem)
    for threads in (2, 3, 5, 16):
        for a, b in zip(alone, attend(*arrays, problem.scale, threads), strict=True):
            np.testing.assert_array_equal(a, b, f"{threads} threads")


@every_dtype
@pytest.mark.parametrize("order", ["contiguous", "channels last"])
@pytest.mark.parametrize("sizes", LINES, ids=str)
def test_stages_of_few_lines_on_many_threads(short_pieces, sizes, order, dtype):
    q, k, v, weights = (x.detach() for x in stage_problems.inputs(sizes, dtype, d=9, c=21))
    a, b, c, w = (LAYOUTS[order](x.numpy()) for x in (q, k, v, weights))
    x = torch.zeros_like(v).requires_grad_()
    (transposed,) = torch.autograd.grad(stage_problems.plain_aggregate(weights, x), x, v)
    stages = {
        "affinity": ((a, b), stage_problems.plain_affinity(q, k), (q, k)),
        "aggregate": ((w, c), stage_problems.plain_aggregate(weights, v), (weights, v)),
        "aggregate_transposed": ((w, c), transposed, (weights, v)),
    }
    for name, (arguments, plain, tensors) in stages.items():
        alone = getattr(calls, name)(*arguments, threads=1)
        (tensor,) = tensors_of([alone])
        assert stage_problems.units_of(tensor, plain, VALUE_LIMIT, getattr(reference, name), *tensors) <= VALUE_LIMIT
        for threads in (2, 3, 5, 16):
            np.testing.assert_array_equal(getattr(calls, name)(*arguments, threads=threads), alone, name)


@pytest.mark.parametrize("sizes", [(83,), (2, 61)], ids=str)
def test_few_lines_in_bfloat16(short_pieces, monkeypatch, sizes):
    problem = problem_of(sizes, torch.bfloat16, batch=1, d=16, c=48)
    alone = None
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        q, k, v = (x.detach() for x in problem.tensors)
        out, lse = numba_cpu.forward(q, k, v, problem.scale)
        gradients = numba_cpu.backward(problem.dout, q, k, v, out, lse, problem.dlse, problem.scale)
        results = (out, lse, *gradients)
        if alone is None:
            check_errors(results, attend_plainly(problem), expected(problem), problem)
        alone = alone or results
        assert all(torch.equal(a, b) for a, b in zip(alone, results, strict=True))


def test_batches_of_single_lines(short_pieces):
    for batch in (2, 3, 7):
        arrays = [LAYOUTS["channels last"](x) for x in arrays_of(problem_of((1, 50), torch.float32, batch=batch))]
        for a, b in zip(attend(*arrays, 1.0, threads=1), attend(*arrays, 1.0, threads=4), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_reach_the_same_places(short_pieces, value):
    q, k, v, dout, dlse = arrays_of(problem_of((1, 83), torch.float32, batch=1, d=16, c=32))
    for array, place in itertools.product((q, k, v, dout), (0, 40, 82)):
        changed = [x.copy() if x is array else x for x in (q, k, v, dout)]
        next(x for x, y in zip(changed, (q, k, v, dout), strict=True) if x is not y)[0, 3, 0, place] = value
        alone, together = (attend(*changed, dlse, 1.0, threads) for threads in (1, 4))
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_array_equal(a, b)


# Threads --------------------------------------------------------------------------------------------------------------


def line_of(length=500):
    return arrays_of(problem_of((1, length), torch.float32, batch=1, d=16, c=32))


@pytest.mark.timeout(60)
def test_helpers_that_come_in_the_middle_of_a_line(monkeypatch):
    cut_up(monkeypatch, SMALL=0, SHEET_BYTES=2**18)
    arrays = line_of()
    alone = attend(*arrays, 1.0, threads=1)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:

        class Delayed:
            delays = itertools.cycle([0.0, 0.0005, 0.001, 0.002])

            def submit(self, function):
                delay = next(self.delays)
                return threads.submit(lambda: (time.sleep(delay), function()))

        monkeypatch.setattr(workers, "_pool", Delayed())
        for _ in range(20):
            for a, b in zip(alone, attend(*arrays, 1.0, threads=5), strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.timeout(60)
def test_helpers_that_never_come_to_a_line(monkeypatch):
    class Asleep:
        def submit(self, function):
            return concurrent.futures.Future()

    cut_up(monkeypatch, SMALL=0, SHEET_BYTES=2**18)
    arrays = line_of()
    alone = attend(*arrays, 1.0, threads=1)
    monkeypatch.setattr(workers, "_pool", Asleep())
    for a, b in zip(alone, attend(*arrays, 1.0, threads=5), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.timeout(60)
def test_lines_shared_by_calls_from_many_threads():
    arrays = line_of()
    alone, results = attend(*arrays, 1.0, threads=1), []
    callers = [threading.Thread(target=lambda: results.append(attend(*arrays, 1.0, threads=2))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 4
    for result in results:
        for a, b in zip(alone, result, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.timeout(60)
def test_a_line_shared_in_a_forked_process():
    arrays = line_of()
    alone = attend(*arrays, 1.0, threads=2)
    child = os.fork()
    if child == 0:
        same = all((a == b).all() for a, b in zip(alone, attend(*arrays, 1.0, threads=2), strict=True))
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
