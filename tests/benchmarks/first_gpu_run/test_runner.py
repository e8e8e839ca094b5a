"""Steps that hang, crash, skip or leave children behind, and a runner that is killed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.first_gpu_run.records import OUTPUT, SKIPPED, STEPS, append, read
from benchmarks.first_gpu_run.runner import ROOT, Step, run


def step(name, code, limit=20.0, least=0.5, **environment):
    return Step(name, ("-c", code), limit, least, tuple(environment.items()))


def statuses(rows):
    return {row["step"]: row["status"] for row in rows}


def lines(out):
    """Return the rows of steps.jsonl, which every line must be valid in."""
    return [json.loads(line) for line in (out / STEPS).read_text().splitlines()]


def test_a_step_that_hangs_is_killed_and_the_next_one_runs(tmp_path):
    hang = "import time; print('before', flush=True); time.sleep(600)"
    start = time.monotonic()
    rows = run([step("hangs", hang, limit=1.5), step("next", "print('ran')")], tmp_path, 60, say=lambda text: None)
    assert time.monotonic() - start < 20
    assert statuses(rows) == {"hangs": "killed", "next": "passed"}
    assert rows[0]["reason"] == "still running after 2 s; last line: before"
    assert rows[1]["reason"] == "ran"
    assert [(row["step"], row["status"]) for row in lines(tmp_path)] == [
        ("hangs", "started"),
        ("hangs", "killed"),
        ("next", "started"),
        ("next", "passed"),
    ]
    assert rows == [row for row in lines(tmp_path) if row["status"] != "started"]


def test_children_are_killed_with_a_step(tmp_path):
    child = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
    )
    ended = step("ended", child + "print(p.pid)")
    hangs = step("hangs", child + "print(p.pid, flush=True); time.sleep(600)", limit=1.5)
    rows = run([ended, hangs], tmp_path, 60, say=lambda text: None)
    assert statuses(rows) == {"ended": "passed", "hangs": "killed"}
    for row in rows:
        assert not alive(int(str(row["reason"]).split()[-1]))


def alive(pid):
    """Tell whether a process still runs; a zombie, which nobody has waited for, does not."""
    for _ in range(100):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return False
        except OSError:
            return False
        time.sleep(0.05)
    return True


def test_a_crash_an_error_and_a_skip_are_told_apart(tmp_path):
    steps = [
        step("crashes", "import os, signal; print('last words', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"),
        step("fails", "raise ValueError('no such thing')"),
        step("skips", f"import sys; print('no device'); sys.exit({SKIPPED})"),
        step("runs", "import os; print(os.environ['CCGPU_TEST'])", CCGPU_TEST="set"),
    ]
    rows = run(steps, tmp_path, 60, say=lambda text: None)
    assert [row["status"] for row in rows] == ["failed", "failed", "skipped", "passed"]
    assert [row["reason"] for row in rows] == [
        "signal SIGSEGV; last line: last words",
        "ValueError: no such thing",
        "no device",
        "set",
    ]
    assert [row["exit"] for row in rows] == [-signal.SIGSEGV, 1, SKIPPED, 0]


def test_too_few_seconds_skip_what_does_not_fit(tmp_path):
    steps = [step("short", "print(1)", least=1.0), step("long", "print(2)", least=500.0), step("last", "print(3)")]
    rows = run(steps, tmp_path, 30, say=lambda text: None)
    assert statuses(rows) == {"short": "passed", "long": "skipped", "last": "passed"}
    assert rows[1]["reason"].endswith("s are left, and it needs 500")
    assert all(row["status"] == "skipped" for row in run(steps, tmp_path, 0.0, say=lambda text: None))


def test_a_step_leaves_the_later_ones_what_they_need(tmp_path):
    told = "import sys; print(sys.argv[1])"
    first = Step("first", ("-c", told, "{seconds}"), 100.0, 5.0)
    run([first, step("second", "print(1)", least=20.0)], tmp_path, 50, say=lambda text: None)
    limits = {row["step"]: row["limit"] for row in lines(tmp_path) if row["status"] == "started"}
    assert limits["first"] == pytest.approx(30, abs=0.2)
    assert "\n27\n" in (tmp_path / OUTPUT).read_text()  # it should end by itself before its limit
    # Where the seconds do not suffice for all, the earlier steps are the more important ones.
    run([first, step("second", "print(1)", least=20.0)], tmp_path / "few", 10, say=lambda text: None)
    assert lines(tmp_path / "few")[0]["limit"] == 5
    assert [row["status"] for row in lines(tmp_path / "few")] == ["started", "passed", "skipped"]


def test_files_are_few_and_the_output_of_all_steps_is_one(tmp_path):
    run([step(name, f"print('of {name}')") for name in "abcdefghij"], tmp_path, 60, say=lambda text: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [OUTPUT, STEPS]
    text = (tmp_path / OUTPUT).read_text()
    assert [text.index(f"\nof {name}\n") for name in "abcdefghij"] == sorted(
        text.index(f"\nof {name}\n") for name in "abcdefghij"
    )


RUNNER = """
import sys
from pathlib import Path
from benchmarks.first_gpu_run.runner import Step, run
work = "import time, sys; from pathlib import Path; from benchmarks.first_gpu_run.records import append\\n"
work += "for i in range(10000): append(Path(sys.argv[1]), {'number': i, 'text': 'x' * 1000}); time.sleep(0.0005)"
quick = Step("quick", ("-c", "print(1)"), 10.0, 0.1)
long = Step("long", ("-c", work, sys.argv[1] + "/records.jsonl"), 100.0, 0.1)
run([quick, long], Path(sys.argv[1]), 200)
"""


def test_a_killed_runner_leaves_valid_lines(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", RUNNER, str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while len(read_safely(tmp_path / "records.jsonl")) < 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kill_what_writes(tmp_path / "records.jsonl")
    assert [(row["step"], row["status"]) for row in lines(tmp_path)] == [
        ("quick", "started"),
        ("quick", "passed"),
        ("long", "started"),
    ]
    numbers = [row["number"] for row in read(tmp_path / "records.jsonl")]
    assert numbers == list(range(len(numbers)))


def read_safely(path):
    return path.read_text().splitlines() if path.exists() else []


def kill_what_writes(path):
    """Kill the step of the killed runner: the one process with this path in its command."""
    for entry in os.listdir("/proc"):
        try:
            with open(f"/proc/{entry}/cmdline", "rb") as file:
                words = file.read().split(b"\0")
        except OSError:
            continue
        if str(path).encode() in words:
            os.kill(int(entry), signal.SIGKILL)
            assert not alive(int(entry))


def test_rows_of_several_processes_do_not_mix(tmp_path):
    code = (
        "import sys; from pathlib import Path; from benchmarks.first_gpu_run.records import append\n"
        "for i in range(300): append(Path(sys.argv[1]), {'who': sys.argv[2], 'text': 'y' * 3000})"
    )
    path = tmp_path / "records.jsonl"
    processes = [subprocess.Popen([sys.executable, "-c", code, str(path), name], cwd=ROOT) for name in "ab"]
    assert [process.wait() for process in processes] == [0, 0]
    assert sorted(row["who"] for row in read(path)) == ["a"] * 300 + ["b"] * 300


def test_rows_take_what_json_does_not_know(tmp_path):
    append(tmp_path / "rows", {"path": tmp_path, "nan": float("nan")})
    (row,) = read(tmp_path / "rows")
    assert row["path"] == str(tmp_path)
    assert row["nan"] != row["nan"]
    assert read(tmp_path / "none") == []
