"""The sweep on a stand-in for the kernels, and the reading of ncu's report."""

import inspect
import time

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.first_gpu_run import sweep
from benchmarks.first_gpu_run.sweep import METRICS, VARIANTS, Variant, counted, ncu_command, times
from ccgpu.bridges.cupy_cuda.launch import compiler_options
from ccgpu.kernels.cuda import plans

CASE = Case(1, (3, 4), "float32", 2, 2)


class Kernels:
    """Results that do not depend on the schedule, except for one variant that is wrong and one that fails."""

    def __init__(self, launcher, **schedule):
        self._launcher, self._schedule = launcher, schedule

    def forward(self, q, k, v, scale):
        if self._schedule.get("cuts") == 4:
            raise ValueError("plan: no such cut")
        wrong = self._schedule.get("lag") == 2
        return v * (2.0 if wrong else 1.0), q.sum(1)

    def backward(self, dout, q, k, v, out, lse, dlse, scale):
        return q.clone(), k.clone(), dout.clone()


def rows_of(monkeypatch, end=60.0, refused=()):
    def launcher(defines):
        if set(defines) & set(refused):
            raise ValueError("CCGPU_CUDA_DEFINES: a definition must be NAME=VALUE")
        return defines

    monkeypatch.setattr(sweep, "Kernels", Kernels)
    return list(times(CASE, torch.device("cpu"), 3, time.monotonic() + end, launcher))


def test_each_variant_gets_its_times_or_its_reason(monkeypatch):
    rows = rows_of(monkeypatch, refused=("CCGPU_HINTS=0",))
    by_variant = {}
    for row in rows:
        by_variant.setdefault(row["variant"], []).append(row)
    assert set(by_variant) == {str(variant) for variant in VARIANTS}
    assert [row["pass"] for row in by_variant["as shipped"]] == ["forward", "backward"]
    assert all(row["median_ms"] >= 0 and row["turns"] == 3 for row in by_variant["as shipped"])
    assert by_variant["cuts=4"][0]["reason"] == "ValueError: plan: no such cut"
    assert by_variant["lag=2"][0]["reason"].startswith("ArithmeticError: differs from as shipped by 1")
    assert "a definition must be" in by_variant["CCGPU_HINTS=0 lag=0"][0]["reason"]


def test_no_variant_begins_without_time(monkeypatch):
    rows = rows_of(monkeypatch, end=0.0)
    assert [row["variant"] for row in rows] == [str(variant) for variant in VARIANTS]
    assert {row["reason"] for row in rows} == {"no time left"}


def test_variants_are_arguments_of_the_plan_and_macros_of_the_kernels():
    arguments = set(inspect.signature(plans.plan).parameters)
    assert len(set(VARIANTS)) == len(VARIANTS)
    assert VARIANTS[0] == Variant()
    for variant in VARIANTS:
        assert set(dict(variant.schedule)) <= arguments
        compiler_options(variant.defines)


LAUNCHED = [
    {"variant": "as shipped", "pass": "forward", "launches": 1},
    {"variant": "as shipped", "pass": "backward", "launches": 2},
]
KERNELS = ["cca_forward_bf16_n112", "cca_backward_bf16_n112", "cca_backward_bf16_n112"]


def report(kernels=KERNELS, value=lambda number, metric: f"{1000 * (number + 1):,}"):
    """Return a report as ncu writes it: its own lines, names of columns, their units, a line for each kernel."""
    quoted = lambda words: ",".join(f'"{word}"' for word in words)  # noqa: E731
    rows = [quoted([number, 77, name, *(value(number, m) for m in METRICS)]) for number, name in enumerate(kernels)]
    head = quoted(["ID", "Process ID", "Kernel Name", *METRICS])
    units = quoted(["", "", "", *("byte" for _ in METRICS)])
    return "\n".join(["==PROF== Connected to process 77", head, units, *rows, '"==PROF== Disconnected"'])


def test_metrics_are_summed_over_the_launches_of_a_call():
    first, second = counted(report(), LAUNCHED)
    assert (first["variant"], first["pass"]) == ("as shipped", "forward")
    assert [first[metric] for metric in METRICS] == [1000.0] * len(METRICS)
    assert [second[metric] for metric in METRICS] == [5000.0] * len(METRICS)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "must report 3 kernels, those of the calls, got 0"),
        (report(KERNELS[:2]), "must report 3 kernels, those of the calls, got 2"),
        (report(KERNELS[::-1]), "must be named for it, got cca_backward_bf16_n112"),
        (report(value=lambda number, metric: "n/a"), "could not convert string to float"),
    ],
)
def test_reports_that_do_not_fit_are_refused(text, match):
    with pytest.raises(ValueError, match=match):
        counted(text, LAUNCHED)


def test_ncu_leaves_the_clocks_alone(tmp_path):
    words = ncu_command("ncu", tmp_path / "a", tmp_path / "b")
    assert words[words.index("--clock-control") + 1] == "none"
    assert words[words.index("--metrics") + 1].split(",") == list(METRICS)
