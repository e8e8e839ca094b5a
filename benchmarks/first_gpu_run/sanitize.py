"""Step: small calls of the kernels under compute-sanitizer's memcheck and racecheck."""

from __future__ import annotations

import argparse
import glob
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cases import Case
from benchmarks.first_gpu_run.records import append, need_kernels, one_line, skip
from benchmarks.first_gpu_run.runner import ROOT

# Small maps that end inside a tile; tests/gpu/small_cases.py runs them in each dtype.
SHAPES = (
    Case(2, (33, 18), "bfloat16", 16, 24),
    Case(2, (3, 17), "bfloat16", 5, 9),
    Case(2, (97, 2), "bfloat16", 64, 72),
    Case(2, (300,), "bfloat16", 8, 8),
    Case(2, (2, 5, 19), "bfloat16", 8, 8),
)
SCRIPT = ROOT / "tests" / "gpu" / "small_cases.py"
ERROR = 86  # the exit status that the tool returns, by its flags, if it found an error
RUNS = tuple((tool, dtype) for dtype in ("bfloat16", "tf32", "float64") for tool in ("memcheck", "racecheck"))
UNSUPPORTED, REFUSED = "Device not supported", "compute-sanitizer does not support this device or driver"
CLEAN = ("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards")


def find_sanitizer() -> str | None:
    """Return the path of compute-sanitizer, or None."""
    installed = sorted(glob.glob("/usr/local/cuda*/bin/compute-sanitizer"))
    return shutil.which("compute-sanitizer") or (installed[-1] if installed else None)


def sanitized(sanitizer: str, tool: str, *arguments: str, seconds: float) -> tuple[int, str]:
    """Run Python under a tool of the sanitizer; return its exit status and output.

    Every tensor is an allocation of its own there, so that an access beside it is one outside an allocation.

    Raises:
        subprocess.TimeoutExpired: it did not end within `seconds`.
    """
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(ERROR), "--print-limit", "5"]
    ran = subprocess.run(
        [*command, sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | alone,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
    )
    return ran.returncode, ran.stdout


def main(argv: Sequence[str] | None = None) -> int:
    """Run each tool on each dtype while there is time; return the exit status, 1 if one found anything."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--records", type=Path, required=True)
    flags.add_argument("--seconds", type=float, required=True)
    arguments = flags.parse_args(argv)
    end = time.monotonic() + arguments.seconds
    need_kernels()
    sanitizer = find_sanitizer()
    if sanitizer is None:
        skip("compute-sanitizer is not installed; it comes with the CUDA toolkit")
    found = 0
    for tool, dtype in RUNS:
        row: dict[str, object] = {"step": "sanitizer", "tool": tool, "dtype": dtype}
        start = time.monotonic()
        try:
            left = max(1.0, end - start)
            status, text = sanitized(sanitizer, tool, str(SCRIPT), "cupy", dtype, seconds=left)
        except subprocess.TimeoutExpired as late:
            output = (late.stdout or b"").decode(errors="replace")
            append(arguments.records, row | {"reason": f"not done after {left:.0f} s; last line: {one_line(output)}"})
            print(output[-2000:])
            break
        if UNSUPPORTED in text:
            skip(REFUSED)
        clean = status == 0 and any(words in text for words in CLEAN)
        summary = [line.strip("= ") for line in text.splitlines() if "SUMMARY" in line]
        took = round(time.monotonic() - start, 1)
        append(arguments.records, row | {"clean": clean, "exit": status, "summary": summary, "seconds": took})
        print(tool, dtype, status, summary, f"{took} s", "" if clean else text[-4000:], flush=True)
        found += not clean
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
