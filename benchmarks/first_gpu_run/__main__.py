"""The first minutes on a GPU: `python -m benchmarks.first_gpu_run --out DIR --seconds 540`.

For a machine that is lent for minutes and has no network. Every step is a process with a hard limit; what cannot run is
skipped with its reason. DIR gets few and small files: steps.jsonl (a line when a step starts, one when it ends),
records.jsonl (measurements, errors, tests), output.log (what the steps printed) and a CSV file of `benchmarks.cca`.

Before, on a machine with NVRTC (extra test-cuda): `python -m benchmarks.first_gpu_run --prepare DIR --arch 90` compiles
the kernels; carried along, they spare the other machine that time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.first_gpu_run import kernels
from benchmarks.first_gpu_run.runner import ROOT, run
from benchmarks.first_gpu_run.steps import steps
from benchmarks.registers import GPUS

SCRATCH = ROOT / "build" / "first_gpu_run"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps, or prepare the kernels; return the exit status, 1 if a step failed or was killed."""
    flags = argparse.ArgumentParser(
        prog="python -m benchmarks.first_gpu_run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("--out", type=Path, help="folder for the results")
    flags.add_argument("--seconds", type=float, default=540.0, help="most seconds of the whole run (%(default).0f)")
    flags.add_argument("--commit", help="commit to record if the tree has no git")
    flags.add_argument("--only", nargs="+", metavar="STEP", help="these steps alone")
    flags.add_argument("--scratch", type=Path, default=SCRATCH, help="folder for CuPy's cache (build/first_gpu_run)")
    flags.add_argument(
        "--prepare", type=Path, nargs="?", const=SCRATCH, metavar="DIR", help="compile into DIR, and run nothing"
    )
    flags.add_argument("--prepared", type=Path, default=SCRATCH, help="folder of --prepare (build/first_gpu_run)")
    flags.add_argument("--arch", default="90", help="compute capability to prepare for (%(default)s)")
    arguments = flags.parse_args(argv)
    if arguments.prepare is not None:
        gpu = f"sm_{arguments.arch}"
        if gpu not in GPUS:
            known = ", ".join(name.removeprefix("sm_") for name in GPUS)
            flags.error(f"--arch must be one of {known}, got {arguments.arch}")
        path, errors = kernels.prepare(arguments.prepare, gpu)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB", *errors, sep="\n")
        return 1 if errors else 0
    if arguments.out is None:
        flags.error("--out or --prepare must be given")
    folders = (arguments.out.resolve(), arguments.scratch.resolve(), arguments.prepared.resolve())
    chosen = steps(*folders, arguments.commit)
    unknown = set(arguments.only or ()) - {step.name for step in chosen}
    if unknown:
        names = ", ".join(step.name for step in chosen)
        flags.error(f"--only must name steps, got {', '.join(sorted(unknown))}; there are {names}")
    chosen = tuple(step for step in chosen if arguments.only is None or step.name in arguments.only)
    rows = run(chosen, arguments.out.resolve(), arguments.seconds)
    return 1 if any(row["status"] in ("failed", "killed") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
