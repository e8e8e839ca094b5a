"""Run steps one after another, each a process with a hard limit, within a number of seconds."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from benchmarks.first_gpu_run.records import OUTPUT, SKIPPED, STEPS, append, one_line

ROOT = Path(__file__).resolve().parents[2]
MARGIN = 3.0  # seconds before its limit at which a step that knows its limit ends by itself
STUCK = 10.0  # seconds after which a killed process is left to the system
Row = dict[str, object]


class Step(NamedTuple):
    """A process to run.

    Attributes:
        name: its name in the records.
        words: arguments of Python; "{seconds}" becomes the seconds after which it should end by itself.
        limit: most seconds; then its process group gets SIGKILL.
        least: seconds in which it is of use: it is skipped if fewer are left, and earlier steps leave them to it.
        environment: variables to set.
    """

    name: str
    words: tuple[str, ...]
    limit: float
    least: float
    environment: tuple[tuple[str, str], ...] = ()


def run(steps: Sequence[Step], out: Path, seconds: float, say: Callable[[str], None] = print) -> list[Row]:
    """Run the steps in order within `seconds`; return the row of each, which is also a line of `out`/steps.jsonl.

    A step gets its limit if the steps behind it keep the seconds that they need at least, otherwise fewer, but not
    fewer than it needs itself.
    """
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    rows: list[Row] = []
    for number, step in enumerate(steps):
        left = end - time.monotonic()
        reserved = sum(later.least for later in steps[number + 1 :])
        allowed = min(step.limit, max(left - reserved, step.least))
        row: Row = {"step": step.name, "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        if left < step.least:
            reason = f"{max(0.0, left):.0f} s are left, and it needs {step.least:.0f}"
            row |= {"status": "skipped", "seconds": 0.0, "reason": reason}
        else:
            append(out / STEPS, row | {"status": "started", "limit": round(allowed, 1)})
            row |= execute(step, out / OUTPUT, allowed)
        append(out / STEPS, row)
        say(f"{step.name:12} {row['status']:8} {row['seconds']:7} s  {row['reason']}")
        rows.append(row)
    return rows


def execute(step: Step, output: Path, allowed: float) -> Row:
    """Run a step for at most `allowed` seconds, its output appended to a file; return its status, seconds and reason.

    Its group of processes gets SIGKILL at the limit, and also when it has ended, for children that it left behind.
    """
    words = [word.replace("{seconds}", f"{max(1.0, allowed - MARGIN):.0f}") for word in step.words]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **dict(step.environment)}
    start, status = time.monotonic(), "killed"
    with output.open("ab", buffering=0) as log:
        log.write(f"\n===== {step.name}: python {' '.join(words)}\n".encode())
        begin = log.tell()
        # A group, not a session: what ends the processes of a session at its own limit still finds this one.
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=os.setpgrp,
        )
        try:
            code = process.wait(allowed)
            status = {0: "passed", SKIPPED: "skipped"}.get(code, "failed")
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
        finally:
            kill(process)
    with output.open("rb") as log:
        log.seek(begin)
        reason = one_line(log.read().decode(errors="replace"))
    if status == "failed" and code < 0:
        reason = f"signal {signal.Signals(-code).name}; last line: {reason}"
    elif status == "killed":
        reason = f"still running after {allowed:.0f} s; last line: {reason}"
    return {"status": status, "exit": code, "seconds": round(time.monotonic() - start, 1), "reason": reason}


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # it may be in a driver call that does not return
        process.wait(STUCK)
