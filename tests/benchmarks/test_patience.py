"""Which peers are too slow to be timed."""

import time

import pytest
import torch

from benchmarks import run_case
from benchmarks.candidates import Candidate, ours
from benchmarks.cases import Case
from benchmarks.patience import Patience

KEY = ("peer", "NCHW", "float16")
CPU = torch.device("cpu")


def test_a_peer_is_tried_once_and_then_judged_by_its_best_rate():
    patience = Patience(times=10, least=0.2)
    assert patience.why_not(KEY, 10**9, ours=0.01) is None
    assert patience.after(KEY, 10**9, seconds=0.1, ours=0.01) is None
    assert patience.after(KEY, 10**9, seconds=0.19, ours=0.001) is None  # as much time as any peer may take
    why = patience.why_not(KEY, 10**10, ours=0.02)
    assert why == "slow: forward and backward would take at its best rate so far 1 s, 50 times ours"
    assert patience.why_not(KEY, 10**10, ours=0.11) is None
    assert patience.after(("peer", "NCHW", "float32"), 10**6, seconds=0.01, ours=0.001) is None
    assert patience.why_not(("peer", "NCHW", "float32"), 10**9, ours=0.001) is None  # a short run tells no rate
    assert patience.why_not(("peer", "channels_last", "float16"), 10**10, ours=0.02) is None
    assert patience.after(KEY, 10**10, seconds=3.0, ours=0.1) == "slow: forward and backward took 3 s, 30 times ours"


def test_a_first_run_that_decides_is_run_again():
    patience = Patience(times=10, least=0.2)
    assert not patience.unsure(KEY, 0.04, ours=0.001)
    assert patience.unsure(KEY, 0.06, ours=0.001)
    patience.after(KEY, 10**9, seconds=0.06, ours=0.001)
    assert not patience.unsure(KEY, 0.19, ours=0.001)
    assert patience.unsure(KEY, 0.21, ours=0.001)


def test_a_peer_that_prepares_kernels_at_its_first_call_is_timed():
    case, rates, calls = Case(1, (4, 4), "float32", 4, 4), {"copy": 1e10, "matrix": 1e11}, []
    function = ours(case, CPU)[-1].make()

    def prepares(q, k, v):
        calls.append(time.sleep(0.3 if not calls else 0.0))
        return function(q, k, v)

    taking_part = [*ours(case, CPU), Candidate("peer", lambda: prepares, layouts=("NCHW",))]
    flags = {"turns": 2, "say": lambda line: None, "timed": ("forward",), "patience": Patience(times=1, least=0.25)}
    rows, _ = run_case.measure_case(case, taking_part, CPU, rates, **flags)
    assert [row["reason"] for row in rows if row["name"] == "peer"] == [""]


@pytest.mark.parametrize("name", ["peer", "ccgpu x"])
def test_a_slow_peer_has_a_row_with_the_reason_and_ours_is_always_timed(name):
    def slow(q, k, v):
        return function(q.repeat(1, 1, 1, 1), k, v) + sum(0 * v for _ in range(2000))

    function = ours(Case(1, (4, 4), "float32", 4, 4), CPU)[-1].make()
    peers = [Candidate(name, lambda: slow, layouts=("NCHW",)), Candidate("quick", lambda: function, layouts=("NCHW",))]
    case, rates = Case(1, (4, 4), "float32", 4, 4), {"copy": 1e10, "matrix": 1e11}
    taking_part = [*ours(case, CPU), *peers]
    rows, failed = run_case.measure_case(
        case,
        taking_part,
        CPU,
        rates,
        turns=2,
        say=lambda line: None,
        timed=("forward",),
        patience=Patience(times=2, least=0.0),
    )
    assert failed == []
    assert {row["pass"] for row in rows if row["name"] == "ccgpu numba_cpu"} == {"forward"}
    (row,) = [row for row in rows if row["name"] == name]
    assert row["reason"].startswith("slow: " if name == "peer" else "")
    assert ("median_ms" in row) == (name != "peer")
