"""What the benchmark counts and how it takes turns, on the CPU."""

import itertools
import time

import numpy as np
import pytest
import torch

import ccgpu
from benchmarks import measure
from benchmarks.cases import CPU_DTYPES, CPU_MAPS, Case, cpu_suite, gpu_suite, in_layout, precision
from benchmarks.measure import Clock, Step, Timing, interleaved, peak_bytes, quantiles, step, temporaries

PYTHON_OBJECTS = 50_000  # bytes that are traced together with NumPy's memory, at most


def test_quantiles_of_known_numbers():
    assert quantiles([float(n) for n in range(11)]) == Timing(5.0, 2.0, 8.0, 11)
    assert quantiles([3.0]) == Timing(3.0, 3.0, 3.0, 1)


def test_steps_take_turns_and_go_round_the_sets():
    order = []
    steps = {name: Step(lambda number, name=name: order.append((name, number)), lambda state: None) for name in "ab"}
    interleaved(steps, 4)
    timed = order[2 * measure.WARM_UPS :]
    assert timed == [("a", 0), ("b", 1), ("a", 2), ("b", 3), ("a", 4), ("b", 5), ("a", 6), ("b", 7)]


def test_preparation_is_not_timed():
    timing = interleaved({"": Step(lambda number: time.sleep(0.05), lambda state: None)}, 3)[""]
    assert timing.median < 0.025


def test_a_slow_step_sits_out_and_a_failing_one_is_left_out():
    def fails():
        raise ValueError("too large")

    results = interleaved({"slow": step(lambda: time.sleep(0.02)), "fails": step(fails)}, 50, share=0.03)
    assert isinstance(results["fails"], ValueError)
    assert results["slow"].turns == measure.FEWEST


@pytest.mark.parametrize(("nap", "ran_before", "runs"), [(0.0, True, 3), (0.11, True, 1), (0.11, False, 3)])
def test_a_slow_step_that_ran_before_is_warm_after_one_run(nap, ran_before, runs):
    calls = []
    measure.warm_up(step(lambda: calls.append(time.sleep(nap))), Clock(), ran_before)
    assert len(calls) == runs


def test_turns_of_a_slow_step_are_spread_over_the_time_of_the_others():
    order = []

    class Told(Clock):
        """A clock that is told how long each step takes."""

        def host(self, measured, number):
            return measured.prepare(number)

        def seconds(self, measured, number, head_start=0.0):
            order.append(measured.prepare(number))
            return order[-1]

    steps = {name: Step(lambda number, nap=nap: nap, lambda state: None) for name, nap in (("a", 0.001), ("b", 0.01))}
    results = interleaved(steps, 60, Told(), share=0.1)
    assert (results["a"].turns, results["b"].turns) == (60, 10)
    places = [place for place, seconds in enumerate(order) if seconds == 0.01]
    gaps = [b - a for a, b in itertools.pairwise(places)][measure.FEWEST :]
    assert max(gaps) - min(gaps) <= 1
    assert places[-1] == len(order) - 1


def test_a_step_that_fails_later_is_left_out_too():
    calls = []

    def fails_later():
        calls.append(None)
        if len(calls) > measure.WARM_UPS + 1:
            raise MemoryError

    assert isinstance(interleaved({"": step(fails_later)}, 5)[""], MemoryError)


@pytest.mark.parametrize(
    "empty", [torch.empty, lambda n: torch.from_numpy(np.empty(n, np.float32))], ids=["torch", "NumPy"]
)
def test_temporaries_are_the_peak_without_results(empty):
    def call():
        x = empty(1_000_000)  # freed before the result exists twice over
        y = empty(3_000_000)
        del x
        return y

    assert 0 <= temporaries(step(call), Clock()) - 4_000_000 < PYTHON_OBJECTS
    assert 0 <= peak_bytes(call) - 16_000_000 < PYTHON_OBJECTS


def test_torchs_and_numpys_bytes_are_added():
    def call():
        return np.empty(250_000).nbytes + torch.empty(250_000).nbytes  # one after the other

    assert 0 <= temporaries(step(call), Clock()) - 3_000_000 < PYTHON_OBJECTS


def test_memory_from_before_is_not_counted():
    before = np.ones(1_000_000), torch.ones(1_000_000)
    assert peak_bytes(lambda: before[0].sum() + before[1].sum()) < PYTHON_OBJECTS


def test_kernels_on_numpys_memory_are_counted():
    """NCHW maps: each thread gathers lines into memory of its own, which it keeps for its next call."""
    q = torch.randn(1, 16, 40, 40)
    for _ in range(2):
        assert peak_bytes(lambda: ccgpu.cca(q, q, q, backend="numba_cpu")) > q.nbytes + PYTHON_OBJECTS


def test_rates_are_of_this_machine():
    assert 1e8 < measure.copy_rate(turns=2) < 1e13
    assert 1e9 < measure.matrix_rate(turns=1) < 1e14


def test_minimum_bytes_and_flops_of_the_hot_case():
    case = gpu_suite()[0]
    assert (case.batch, case.sizes, case.dtype) == (8, (97, 97), "bfloat16")
    assert case.minimum_bytes()["forward"] == 173_426_688 // 1
    assert case.minimum_bytes()["backward"] == 2 * case.minimum_bytes()["forward"]
    assert case.flops()["forward"] == 2 * 8 * 97 * 97 * 194 * (64 + 512)
    assert case.flops()["backward"] == 2 * 8 * 97 * 97 * 194 * (3 * 64 + 2 * 512)
    assert case.input_bytes == 8 * 97 * 97 * (2 * 64 + 512) * 2


def test_a_gpus_suite_has_every_shape_in_every_dtype_once():
    cases = gpu_suite()
    shapes = {(c.batch, c.sizes) for c in cases}
    assert shapes == {
        *((b, (97, 97)) for b in (1, 2, 8)),
        *((1, s) for s in ((65, 129), (129, 257), (256, 256), (5, 60, 80))),
    }
    assert len(cases) == len(set(cases)) == 4 * len(shapes)
    assert {c.dtype for c in cases} == {"bfloat16", "float16", "float32", "tf32"}


def test_a_cpus_suite_has_every_map_in_every_dtype_once():
    cases = cpu_suite()
    assert cases[0] == Case(1, (97, 97), "float32")
    wide = [case for case in cases if case.dtype == "float64"]
    assert len(cases) == len(set(cases)) == len(CPU_MAPS) * len(CPU_DTYPES) + len(wide)
    assert 1 <= len(wide) <= 2
    assert {(1, 1000), (1, 4096), (4, 4), (256, 256)} < {case.sizes for case in cases}


def test_a_cpus_maps_are_in_the_order_of_their_work():
    flops = [Case(1, sizes, "float32").flops()["forward"] for sizes in CPU_MAPS]
    assert flops == sorted(flops)


def test_inputs_are_the_same_values_in_every_layout():
    case = Case(2, (3, 4, 5), "bfloat16", 6, 7)
    (q, k, v), dout = case.inputs(3, torch.device("cpu"), "NCHW")
    last, dout_last = case.inputs(3, torch.device("cpu"), "channels_last")
    assert q.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip((q, k, v, dout), (*last, dout_last), strict=True))
    assert v.is_contiguous()
    assert last[2].movedim(1, -1).is_contiguous()
    assert not torch.equal(q, k)


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_layout_of_four_axes_is_torchs(layout):
    x = torch.randn(2, 3, 4, 5)
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert in_layout(x, layout).is_contiguous(memory_format=memory)


def test_precision_is_put_back():
    before = torch.get_float32_matmul_precision()
    with precision("tf32"):
        assert torch.get_float32_matmul_precision() == "high"
        with precision("float32"):
            assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == before


def test_a_gpu_waits_for_the_host_and_preparation_is_outside(monkeypatch):
    """The order of what is asked of a GPU, by one that only notes it."""
    asked = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            asked.append("record")

        def synchronize(self):
            asked.append("wait for the event")

        def elapsed_time(self, end):
            return 5.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: asked.append(cycles))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: asked.append("wait"))
    clock = Clock(torch.device("cuda"))
    measured = Step(lambda number: asked.append(f"prepare {number}"), lambda state: asked.append("run"))
    assert clock.seconds(measured, 4, head_start=1e-3) == 5e-3
    assert asked == ["prepare 4", "wait", 2_000_000, "record", "run", "record", "wait for the event"]


def test_temporaries_on_a_gpu_are_the_bytes_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    numbers = {"requested_bytes.all.current": 100, "requested_bytes.all.peak": 1500}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: numbers)
    clock = Clock(torch.device("cuda"))
    assert temporaries(step(lambda: (torch.empty(100), torch.empty(10))), clock) == 1500 - 100 - 440
