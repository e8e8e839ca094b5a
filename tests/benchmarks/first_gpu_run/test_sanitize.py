"""The step of compute-sanitizer, with a command that stands in for it."""

import pytest

from benchmarks.first_gpu_run import sanitize
from benchmarks.first_gpu_run.records import SKIPPED, read


@pytest.fixture
def sanitizer(tmp_path, monkeypatch):
    """A function that puts a shell script in the tool's place."""

    def install(script):
        path = tmp_path / "bin" / "compute-sanitizer"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(path.parent), prepend=":")
        monkeypatch.setattr(sanitize, "need_kernels", lambda: None)

    return install


def run(tmp_path, seconds="30"):
    status = sanitize.main(["--records", str(tmp_path / "records"), "--seconds", seconds])
    return status, read(tmp_path / "records")


CLEAN = 'case $2 in memcheck) echo "==== ERROR SUMMARY: 0 errors";; *) echo "==== RACECHECK SUMMARY: 0 hazards";; esac'


def test_clean_runs(tmp_path, sanitizer):
    sanitizer(CLEAN)
    status, rows = run(tmp_path)
    assert status == 0
    assert [(row["tool"], row["dtype"]) for row in rows] == list(sanitize.RUNS)
    assert all(row["clean"] for row in rows)
    assert rows[0]["summary"] == ["ERROR SUMMARY: 0 errors"]


@pytest.mark.parametrize(
    "script", ['echo "==== ERROR SUMMARY: 3 errors"; exit 86', "exit 0", f"{CLEAN}; exit 1"], ids=["found", "none", "1"]
)
def test_errors_are_found(tmp_path, sanitizer, script):
    sanitizer(script)
    status, rows = run(tmp_path)
    assert status == 1
    assert not any(row["clean"] for row in rows)


def test_a_slow_run_ends_the_step_with_what_it_said(tmp_path, sanitizer):
    sanitizer('echo "on its way"; exec sleep 600')
    status, rows = run(tmp_path, "1")
    assert status == 0
    (row,) = rows
    assert row["reason"] == "not done after 1 s; last line: on its way"


def test_a_device_that_the_tool_refuses_is_a_reason(tmp_path, sanitizer, capsys):
    sanitizer('echo "==== Error: Device not supported. Please refer to the documentation"; exit 1')
    with pytest.raises(SystemExit) as ended:
        run(tmp_path)
    assert ended.value.code == SKIPPED
    assert capsys.readouterr().out == "compute-sanitizer does not support this device or driver\n"


def test_without_the_tool_it_is_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sanitize, "need_kernels", lambda: None)
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: None)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path)
    assert ended.value.code == SKIPPED
    assert capsys.readouterr().out.startswith("compute-sanitizer is not installed")


def test_the_command_has_the_tool_and_the_script(tmp_path, sanitizer):
    sanitizer('echo "$@"; echo "==== ERROR SUMMARY: 0 errors"')
    status, text = sanitize.sanitized(str(tmp_path / "bin" / "compute-sanitizer"), "memcheck", "x.py", seconds=10)
    assert status == 0
    assert "--tool memcheck --error-exitcode 86" in text
    assert text.splitlines()[0].endswith(" x.py")
