"""The whole command: a rehearsal where there is no device, and its arguments."""

import re
import subprocess
import sys

import pytest
import torch

from benchmarks import cca
from benchmarks.candidates import BATCHED, DENSE, EAGER_BMM, EAGER_EINSUM, candidates
from benchmarks.cases import Case
from benchmarks.first_gpu_run import __main__ as command
from benchmarks.first_gpu_run import compare, kernels
from benchmarks.first_gpu_run.records import OUTPUT, RECORDS, STEPS, read
from benchmarks.first_gpu_run.runner import ROOT
from benchmarks.first_gpu_run.steps import steps
from benchmarks.registers import GPUS
from ccgpu.bridges.cupy_cuda.launch import compiler_options
from ccgpu.kernels.cuda import plans
from ccgpu.kernels.cuda.configurations import KERNELS

NAMES = ["facts", "kernels", "primitives", "values", "sweep", "compare", "order", "sanitizer", "rest"]


@pytest.mark.nvrtc
@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run here")
def test_rehearsal(tmp_path):
    """Every step starts as it would on a device, and says why it does not go on."""
    words = ["-m", "benchmarks.first_gpu_run", "--out", str(tmp_path / "out"), "--seconds", "540"]
    ran = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = read(tmp_path / "out" / STEPS)
    assert [row["step"] for row in rows if row["status"] == "started"] == NAMES
    ends = [row for row in rows if row["status"] != "started"]
    assert [row["step"] for row in ends] == NAMES
    assert {(row["status"], row["reason"]) for row in ends} == {("skipped", "torch sees no CUDA device")}
    assert len(ran.stdout.splitlines()) == len(NAMES)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [OUTPUT, RECORDS, STEPS]
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) < 50_000
    (facts,) = read(tmp_path / "out" / RECORDS)
    assert facts["device"] is None
    assert facts["versions"]["torch"] == torch.__version__


def test_steps_fit_ten_minutes(tmp_path):
    planned = steps(tmp_path, tmp_path, tmp_path)
    assert [step.name for step in planned] == NAMES
    assert sum(step.least for step in planned) <= 240
    assert all(step.least <= step.limit for step in planned)
    assert all("CUPY_CACHE_DIR" in dict(step.environment) for step in planned)


def test_steps_bound_the_waits_of_tests_and_measure_what_is_shipped(tmp_path):
    bounded = {s.name for s in steps(tmp_path, tmp_path, tmp_path) if "CCGPU_CUDA_DEFINES" in dict(s.environment)}
    assert bounded == {"primitives", "values", "order", "sanitizer", "rest"}
    assert compiler_options(kernels.BOUNDED)[-1] == "-DCCGPU_WAIT_LIMIT=4000000"


@pytest.mark.nvrtc
def test_tests_of_the_order_step_exist(tmp_path):
    (order,) = (step for step in steps(tmp_path, tmp_path, tmp_path) if step.name == "order")
    words = [*order.words[order.words.index("-k") :], "--collect-only", "-q", "-o", "addopts=--import-mode=importlib"]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    for name in ("test_gradcheck_in_float64", "test_same_bits_every_time", "test_cuda_graph", "test_call_waits_for"):
        assert name in ran.stdout
    assert "numba_cuda" not in ran.stdout


def test_comparison_has_the_hot_case_first_and_the_peers(monkeypatch):
    """Forward and backward of einsum, bmm, permuted matrix products and SDPA, in the same dtype."""
    given = []
    monkeypatch.setattr(compare, "need_kernels", lambda: None)
    monkeypatch.setattr(cca, "main", lambda words: given.append(words) or 0)
    assert compare.main(["--out", "x", "--seconds", "87", "--commit", "abc"]) == 0
    arguments = cca.parser().parse_args(given[0])
    assert (arguments.seconds, arguments.commit, str(arguments.out)) == (87.0, "abc", "x")
    first, *others = cca.cases_of(arguments)
    assert first == Case(8, (97, 97), "bfloat16")
    assert len(others) == 3
    names = [c.name for c in cca.chosen(candidates(first, torch.device("cuda")), arguments.only, arguments.without)]
    peers = [BATCHED, EAGER_EINSUM, EAGER_BMM, "SDPA an axis, merged", DENSE]
    assert names == ["ccgpu cupy", "ccgpu torch", *peers]


def test_kernels_of_the_hot_case_are_prepared_first():
    chosen = kernels.chosen("sm_90")
    assert len(chosen) == len(set(chosen)) == len({job.name for job in chosen})
    assert [job.configuration.kernel for job in chosen[:2]] == ["forward", "backward"]
    assert all("_bf16_n112_d64_" in job.name and job.defines == () for job in chosen[:2])
    assert {job.defines for job in chosen} == {kernels.SHIPPED, kernels.BOUNDED}
    assert {job.configuration.kernel for job in chosen} == set(KERNELS)
    assert [job.name for job in kernels.chosen("sm_90")] == [job.name for job in chosen]
    assert not {job.name for job in kernels.chosen("sm_80")} & {job.name for job in chosen}


def test_kernels_of_a_call_are_those_that_it_launches():
    case = Case(3, (33, 40), "tf32", 60, 72)
    names = [x.entry for x in kernels.configurations(case, "sm_90", KERNELS)]
    launched = []
    for kernel in KERNELS:
        depth = 60 if kernel in ("forward", "backward", "affinity") else 72
        launched += plans.plan(kernel, "tf32", 3, (33, 40), depth, 72, GPUS["sm_90"])
    assert names == [launch.configuration.entry for launch in launched]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--out or --prepare must be given"),
        (["--prepare", "x", "--arch", "12"], "--arch must be one of 75, 80, .*, got 12"),
        (["--out", "x", "--only", "facts", "nothing"], "--only must name steps, got nothing; there are facts, "),
    ],
)
def test_wrong_arguments_are_named(capsys, words, message):
    with pytest.raises(SystemExit):
        command.main(words)
    assert re.search(message, capsys.readouterr().err)


def test_some_steps_alone(tmp_path, capsys):
    assert command.main(["--out", str(tmp_path), "--only", "facts", "--seconds", "1"]) == 0
    assert [(row["step"], row["status"]) for row in read(tmp_path / STEPS)] == [("facts", "skipped")]
    assert "s are left, and it needs 15" in capsys.readouterr().out
