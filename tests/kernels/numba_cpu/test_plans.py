"""Plans: kept for calls of the same shapes, told apart by all that decides them; the memory that threads keep."""

import threading

import numpy as np
import pytest
import torch

from ccgpu.bridges import numba_cpu
from ccgpu.kernels.numba_cpu import calls, launch, plans, scratch
from ccgpu.kernels.numba_cpu.operands import Layout
from ccgpu.kernels.numba_cpu.vectors import VECTOR_BYTES
from tests.kernels.numba_cpu.problems import LAYOUTS, arrays_of, attend, cut_up, problem_of


def same(ours, theirs):
    return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def layout_of(shape, strides, dtype="float32"):
    return Layout(shape, tuple(4 * n for n in strides), dtype)


SHAPE, DEEP = (2, 3, 5, 7), (105, 35, 7, 1)
LAST = (105, 1, 21, 3)


def test_a_plan_is_made_once_for_calls_of_the_same_kind():
    x = layout_of(SHAPE, DEEP)
    assert launch.forward_plan(x, x, x, x, 2) is launch.forward_plan(*[layout_of(SHAPE, DEEP)] * 4, 2)


def test_all_that_decides_a_plan_tells_it_from_others():
    x, y = layout_of(SHAPE, DEEP), layout_of(SHAPE, LAST)
    wide = layout_of((2, 3, 7, 5), (105, 35, 5, 1))
    double = layout_of(SHAPE, tuple(2 * n for n in DEEP), "float64")
    made = [launch.forward_plan(*[x] * 4, 1), launch.forward_plan(*[x] * 4, 3), launch.affinity_plan(x, x, 1)]
    made += [launch.forward_plan(*[z] * 4, 1) for z in (y, wide, double)]
    made += [launch.forward_plan(*[y if m == n else x for m in range(4)], 1) for n in range(4)]
    made.append(launch.aggregate_plan(x, x, 1))
    made.append(launch.backward_plan(*[x] * 8, threads=1))
    assert len({id(plan) for plan in made}) == len(made)


@pytest.mark.parametrize("other", [torch.zeros(1, 3, 5, 8), torch.zeros(2, 3, 5, 7), torch.zeros(1, 3, 5, 7).double()])
def test_maps_that_differ_are_refused(other):
    """The op itself, torch.ops.ccgpu.cca_forward, checks nothing."""
    q = torch.zeros(1, 3, 5, 7)
    with pytest.raises(ValueError, match="forward: all maps must have one dtype, batch and map size, got float32"):
        numba_cpu.forward(q, q, other, 1.0)


def test_the_number_of_plans_is_bounded():
    assert plans.plan_of.cache_info().maxsize == plans.PLANS
    assert numba_cpu._plan.cache_info().maxsize == plans.PLANS


@pytest.mark.parametrize("threads", [1, 3])
def test_calls_of_a_plan_have_nothing_in_common(monkeypatch, threads):
    """Other values, addresses and scales; calls of other plans in between."""
    cut_up(monkeypatch, SMALL=0)
    problems = [problem_of(sizes, torch.float32, seed=seed) for seed in range(3) for sizes in ((5, 7), (4,))]
    arrays = [[LAYOUTS["channels last"](x) for x in arrays_of(problem)] for problem in problems]
    first = [attend(*x, 0.5 + n, threads) for n, x in enumerate(arrays)]
    again = [attend(*[y.copy() for y in x], 0.5 + n, threads) for n, x in enumerate(arrays)]
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not np.allclose(first[0][0], first[2][0])


def test_layouts_that_are_copied_and_others_share_no_plan():
    """An address that is not aligned does not show in the plan, and makes copies as well."""
    arrays = arrays_of(problem_of((5, 7), torch.float32))
    for name in ("contiguous", "misaligned", "Fortran", "misaligned channels last", "contiguous", "records"):
        out, _ = calls.forward(*(LAYOUTS[name](x) for x in arrays[:3]), threads=1)
        np.testing.assert_allclose(out, calls.forward(*arrays[:3], threads=1)[0], rtol=1e-5, atol=1e-6)


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def _nothing_kept(monkeypatch):
    monkeypatch.setattr(scratch, "_kept", scratch._Kept())


@pytest.mark.usefixtures("_nothing_kept")
def test_memory_is_kept_for_the_next_call_of_the_thread():
    first = scratch.take(1000)
    assert first.address % VECTOR_BYTES == 0
    scratch.give_back(first)
    assert scratch.take(999) is first


@pytest.mark.usefixtures("_nothing_kept")
def test_memory_in_use_is_not_given_twice():
    first, second = scratch.take(1000), scratch.take(1000)
    assert first is not second
    scratch.give_back(first)
    assert scratch.take(1001) is not first


@pytest.mark.usefixtures("_nothing_kept")
def test_no_more_memory_is_kept_than_said():
    large = scratch.take(scratch.KEPT + 1)
    scratch.give_back(large)
    assert scratch.take(1) is not large


@pytest.mark.usefixtures("_nothing_kept")
def test_threads_do_not_share_memory():
    scratch.give_back(scratch.take(1000))
    taken = []
    worker = threading.Thread(target=lambda: taken.append(scratch.take(10)))
    worker.start()
    worker.join()
    assert taken[0] is not scratch.take(10)
