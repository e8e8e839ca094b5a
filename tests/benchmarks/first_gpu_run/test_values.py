"""The step of values on a backend for CPUs, and on results that are wrong."""

import pytest
import torch

import ccgpu
from benchmarks.cases import DTYPES, Case
from benchmarks.first_gpu_run import values
from benchmarks.first_gpu_run.values import CASES, HOT, SMALL, check, poisoned_memory

CPU = torch.device("cpu")
SMALLEST = Case(2, (5, 6), "float32", 4, 6)


@pytest.mark.parametrize("case", [SMALLEST, Case(1, (3, 4, 5), "float64", 3, 2), Case(1, (7, 6), "bfloat16", 8, 8)])
def test_a_backend_that_agrees(case):
    row = check(case, CPU, "cpu")
    assert row["agrees"]
    assert 0 <= row["forward"] < 0.1
    assert 0 <= row["backward"] < 0.1
    assert row["case"] == str(case)


@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_wrong_results_do_not_agree(monkeypatch, wrong):
    cca = ccgpu.cca
    monkeypatch.setattr(ccgpu, "cca", lambda q, k, v, backend: cca(q, k, v, backend=backend) * wrong)
    row = check(SMALLEST, CPU, "cpu")
    assert not row["agrees"]
    assert "reason" not in row


def test_an_exception_is_the_result(monkeypatch):
    row = check(SMALLEST, CPU, "cupy")
    assert not row["agrees"]
    assert "'cupy' cannot run this call" in row["reason"]


def test_cases_have_every_dtype_and_the_case_that_counts():
    assert {case.dtype for case in SMALL} == {case.dtype for case in HOT} == set(DTYPES)
    assert Case(8, (97, 97), "bfloat16") in HOT
    assert len(CASES) == len(set(CASES))
    assert CASES[0].batch == 1


def test_another_process_goes_on_after_an_error_of_the_device(monkeypatch, tmp_path):
    """A kernel's error stays with the process, so the cases that follow need another one."""
    started = []
    monkeypatch.setattr(values, "need_kernels", lambda: None)
    monkeypatch.setattr(values, "check", lambda case, device, backend: {"case": str(case), "agrees": False})
    monkeypatch.setattr(values, "usable", lambda: len((tmp_path / "r").read_text().splitlines()) < 3)
    monkeypatch.setattr(values.subprocess, "run", lambda command: started.append(command))
    assert values.main(["--records", str(tmp_path / "r")]) == 1
    (command,) = started
    assert command[-2:] == ["--first", "3"]


def test_memory_is_poisoned():
    with poisoned_memory():
        assert bool(torch.empty(1000).isnan().all())
    assert not torch.are_deterministic_algorithms_enabled()
