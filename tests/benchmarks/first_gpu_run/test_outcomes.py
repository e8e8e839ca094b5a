"""The plugin of pytest: outcomes are recorded, and tests that hang or break the device cost only themselves."""

import importlib.util
import subprocess
import sys

import pytest

from benchmarks.first_gpu_run.records import append, read
from benchmarks.first_gpu_run.runner import ROOT
from benchmarks.first_gpu_run.steps import pytest as pytest_words

pytestmark = pytest.mark.nvrtc

XDIST = importlib.util.find_spec("xdist") is not None
ALONE = ("-n", "0") if XDIST else ()
# test_traps leaves the device in an error, until another process asks.
TESTS = """
import time
import pytest
import torch

def broken():
    raise RuntimeError("CUDA error: unspecified launch failure")

torch.cuda.synchronize = lambda: None

def test_passes(): pass
def test_fails(): assert 1 == 2, "not so"
@pytest.mark.skip(reason="no such device")
def test_is_skipped(): pass
def test_traps():
    torch.cuda.synchronize = broken
    torch.cuda.synchronize()
def test_between(): assert torch.cuda.synchronize is not broken
def test_hangs(): time.sleep(600)
def test_after(): pass
"""


def words(path, *more, step="step", timeout=3):
    """Return the words after `python -m pytest` that run a file as a step does."""
    return [*pytest_words(step, path.parent / "records.jsonl", timeout, *more, str(path))[2:]]


def run(path, *more, **options):
    """Run a file of tests as a step, in a process where torch sees a device."""
    code = "import sys, torch, pytest; torch.cuda.is_available = lambda: True; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *words(path, *more, **options), "--rootdir", str(path.parent)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def outcomes(path):
    """Return the last outcome of each test, by its name."""
    rows = read(path.parent / "records.jsonl")
    assert {row["step"] for row in rows} == {"step"}
    return {row["test"].split("::")[-1]: (row["outcome"], row.get("reason")) for row in rows}


@pytest.mark.skipif(not XDIST, reason="pytest-xdist is not installed")
def test_a_hang_and_a_broken_device_cost_one_test_each(tmp_path):
    path = tmp_path / "test_some.py"
    path.write_text(TESTS)
    ran = run(path)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    found = outcomes(path)
    assert found["test_passes"] == found["test_between"] == found["test_after"] == ("passed", "")
    assert found["test_fails"][0] == found["test_traps"][0] == found["test_hangs"][0] == "failed"
    assert "AssertionError: not so" in found["test_fails"][1]
    assert "crashed while running" in found["test_hangs"][1]
    assert found["test_is_skipped"] == ("skipped", "no such device")
    rows = read(tmp_path / "records.jsonl")
    assert [row["outcome"] for row in rows if row["test"].endswith("test_passes")] == ["started", "passed"]
    assert "unspecified launch failure" in str([row for row in rows if row["test"].endswith("test_traps")])


def test_without_other_processes_a_hang_is_the_last_row(tmp_path):
    path = tmp_path / "test_some.py"
    path.write_text(TESTS)
    ran = run(path, *ALONE, "-k", "hangs", timeout=1)
    assert ran.returncode == 1
    assert read(tmp_path / "records.jsonl")[-1]["test"].endswith("test_hangs")
    assert read(tmp_path / "records.jsonl")[-1]["outcome"] == "started"
    assert "Timeout" in ran.stdout + ran.stderr


def test_tests_of_earlier_steps_are_left_out(tmp_path):
    path = tmp_path / "test_some.py"
    path.write_text("def test_a(): pass\ndef test_b(): pass\ndef test_c(): pass\n")
    first = run(path, *ALONE, "-k", "test_a", step="first")
    assert first.returncode == 0, first.stdout + first.stderr
    (name,) = {row["test"] for row in read(tmp_path / "records.jsonl")}
    append(
        tmp_path / "records.jsonl", {"step": "first", "test": name.replace("test_a", "test_b"), "outcome": "started"}
    )
    assert run(path, *ALONE, "--unrecorded", step="second").returncode == 0
    rows = [row for row in read(tmp_path / "records.jsonl") if row["step"] == "second"]
    assert {row["test"] for row in rows} == {name.replace("test_a", "test_c")}
