"""Measure criss-cross attention, ours and the peers, side by side: `python -m benchmarks.cca`.

First the values and gradients of each implementation are compared with float64; one that disagrees is not timed. Then
all take turns at forward, backward and both. An implementation that cannot run gets a row with the reason. Without
--suite one case is measured, on the CUDA device if there is one. After each case the rows are appended to
benchmarks/results/cca_<device>.csv (--record) or to a file of that name in another folder (--out).

On a CPU, --suite takes some seventeen minutes (`make bench`): maps from 4x4 to 256x256, single lines and a clip in each
dtype, forward and both. There a peer that takes ten times as long as this library is not timed, and what torch.compile
compiles is timed on the first case only. At the end it prints the tables of `benchmarks.cpu_tables`.

The exit status is 1 if one of this library's backends failed or any implementation disagreed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import cpu_tables, measure, results_file
from benchmarks.candidates import DENSE, OURS, Candidate, candidates
from benchmarks.cases import DTYPES, STEPS, Case, cpu_suite, gpu_suite, precision
from benchmarks.first_call import compile_seconds
from benchmarks.patience import Patience
from benchmarks.run_case import Row, measure_case, measure_host

HOST_SIZES = (16, 16)


class Effort(NamedTuple):
    """How much is measured: the defaults of the flags, which steps, and which implementations take part."""

    turns: int
    share: float
    compiled: str
    timed: tuple[str, ...] = STEPS
    without: tuple[str, ...] = ()


CASE = Effort(30, 1.0, "all")
# Small maps take microseconds, so they get many turns. What has no backward here, or another function, is left out.
CPU_SUITE = Effort(300, 0.5, "first", ("forward", "forward+backward"), (DENSE, "FlexAttention", "SDPA"))


def parser() -> argparse.ArgumentParser:
    """Return the command's flags."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flags.add_argument("--suite", action="store_true", help="all shapes and dtypes of the device")
    flags.add_argument("--size", type=int, nargs="+", default=[97, 97], metavar="N", help="H W, or T H W")
    flags.add_argument("--batch", type=int, help="8 on a GPU, 1 on a CPU")
    flags.add_argument("--query-channels", type=int, default=64, metavar="D")
    flags.add_argument("--channels", type=int, default=512, metavar="C")
    flags.add_argument("--dtype", choices=DTYPES, nargs="+", help="bfloat16 on a GPU, float32 on a CPU; a suite: all")
    flags.add_argument("--only", nargs="+", metavar="TEXT", help="implementations whose name contains one of these")
    flags.add_argument(
        "--without", nargs="+", default=[], metavar="TEXT", help="implementations to leave out, likewise"
    )
    flags.add_argument(
        "--compiled",
        choices=("all", "first"),
        help="cases that also measure what torch.compile compiles (all; a CPU's suite: first)",
    )
    flags.add_argument("--threads", type=int, default=2, help="threads of the CPU")
    flags.add_argument("--turns", type=int, help="how often each step is timed, at most (30; a CPU's suite: 300)")
    flags.add_argument("--share", type=float, help="seconds that one step may take in all (1; a CPU's suite: 0.5)")
    flags.add_argument("--seconds", type=float, default=3600.0, help="most seconds of the whole measurement")
    flags.add_argument("--record", action="store_true", help="append the rows to benchmarks/results")
    flags.add_argument("--out", type=Path, metavar="DIR", help="append the rows to a file in this folder")
    flags.add_argument("--commit", help="commit to record if the tree has no git")
    return flags


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    """Return the cases that the flags select."""
    on_gpu = torch.device(arguments.device).type == "cuda"
    if arguments.suite:
        suite = gpu_suite() if on_gpu else cpu_suite()
        return [case for case in suite if arguments.dtype is None or case.dtype in arguments.dtype]
    batch = arguments.batch if arguments.batch is not None else (8 if on_gpu else 1)
    dtypes = arguments.dtype or ["bfloat16" if on_gpu else "float32"]
    shape = (batch, tuple(arguments.size))
    return [Case(*shape, dtype, arguments.query_channels, arguments.channels) for dtype in dtypes]


def chosen(every: Sequence[Candidate], only: Sequence[str] | None, without: Sequence[str]) -> list[Candidate]:
    """Return the candidates whose names contain a text of `only`, if given, and none of `without`."""
    return [
        c
        for c in every
        if (only is None or any(text in c.name for text in only)) and not any(text in c.name for text in without)
    ]


def rates_of(case: Case, device: torch.device, turns: int = 9) -> dict[str, float]:
    """Return the bytes/s of a copy and the FLOP/s of a matrix product of the case's dtype on this device, now.

    Half precision may be computed in float32, so its rate is at least float32's: a CPU's torch has slow float16.
    """
    clock = measure.Clock(device)
    dtypes = {case.torch_dtype, torch.float32} if case.torch_dtype.itemsize == 2 else {case.torch_dtype}
    with precision(case.dtype):
        products = [measure.matrix_rate(clock, dtype, turns) for dtype in dtypes]
        return {"copy": measure.copy_rate(clock, turns), "matrix": max(products)}


def command_of(argv: Sequence[str] | None) -> str:
    """Return the command to record, without the folder of the results, so that it can be repeated anywhere."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--out" in words:
        at = words.index("--out")
        del words[at : at + 2]
    return shlex.join(["python", "-m", "benchmarks.cca", *words])


def table(case: Case, rows: Sequence[Row], rates: dict[str, float]) -> str:
    """Return the rows of a case as text."""
    lines = [f"\n{case}: copy {rates['copy'] / 1e9:.0f} GB/s, matrix product {rates['matrix'] / 1e12:.2f} TFLOP/s"]
    for step in STEPS:
        timed = [row for row in rows if row["pass"] == step and "median_ms" in row]
        if not timed:
            continue
        lines.append(f"{step}: {timed[0]['minimum_mb']} MB, {timed[0]['gflop']} GFLOP, floor {timed[0]['floor_ms']} ms")
        lines.append(f"  {'':40} {'median ms':>10} {'20-80 %':>17} {'x floor':>8} {'temporaries MB':>15} {'error':>8}")
        for row in sorted(timed, key=lambda r: float(str(r["median_ms"]))):
            span = f"{row['low_ms']:.3f}-{row['high_ms']:.3f}"
            over = float(str(row["median_ms"])) / float(str(row["floor_ms"]))
            who = f"{row['name']}, {row['layout']}"
            lines.append(
                f"  {who:40} {row['median_ms']:>10.3f} {span:>17} {over:>8.2f} "
                f"{row['temporaries_mb']:>15.2f} {row['error']:>8}"
            )
    return "\n".join(lines)


def host_table(case: Case, rows: Sequence[Row]) -> str:
    """Return the times of the Python calls alone as text."""
    lines = [f"\n{case}: time of the Python call alone"]
    for row in rows:
        what = f"{1e3 * float(str(row['median_ms'])):.0f} us" if "median_ms" in row else str(row["reason"])
        lines.append(f"  {row['name']:40} {row['pass']:24} {what}")
    return "\n".join(lines)


def compile_rows(cases: Sequence[Case]) -> list[Row]:
    """Return a row for each dtype: how long the CPU kernels compile at its first call."""
    rows: list[Row] = []
    for dtype in dict.fromkeys(case.dtype for case in cases):
        seconds = compile_seconds(dtype)
        print(f"{dtype}: its CPU kernels compile in {seconds:.1f} s", flush=True)
        rows.append(
            {"name": f"{OURS} numba_cpu", "dtype": dtype, "pass": cpu_tables.COMPILE, "median_ms": 1e3 * seconds}
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the flags say; return the exit status."""
    flags = parser()
    arguments = flags.parse_args(argv)
    if len(arguments.size) not in (2, 3) or min(arguments.size) < 1:
        flags.error(f"--size must be two or three positive numbers, got {arguments.size}; give H W or T H W")
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        flags.error("--device must be one that torch sees, got cuda; leave it out to run on the CPU")
    torch.set_num_threads(arguments.threads)
    deadline = time.monotonic() + arguments.seconds
    folder = arguments.out or (results_file.FOLDER if arguments.record else None)
    common = results_file.environment(device, command_of(argv), arguments.commit)
    print(f"{common['device']}, torch {common['torch']}, commit {common['commit']}")
    kept: list[Row] = []

    def keep(rows: Sequence[Row], case: Case | None = None, more: Row | None = None) -> None:
        shape = {} if case is None else {"shape": case.shape, "D": case.query, "C": case.channels, "dtype": case.dtype}
        added = [{**common, **shape, **(more or {}), **row} for row in rows]
        kept.extend(added)
        if folder is not None:
            results_file.append(results_file.path_for(device, folder), added)

    cases, on_cpu = cases_of(arguments), device.type == "cpu"
    whole = arguments.suite and on_cpu
    effort = CPU_SUITE if whole else CASE
    turns, share = arguments.turns or effort.turns, arguments.share or effort.share
    without = [*arguments.without, *effort.without]
    patience = Patience() if whole else None
    failed: list[str] = []
    rates: dict[str, dict[str, float]] = {}
    for number, case in enumerate(cases):
        if time.monotonic() > deadline:
            print(f"{case}: not measured, the {arguments.seconds:.0f} s are over")
            continue
        if case.dtype == "tf32" and on_cpu:
            print(f"{case}: not measured, TF32 is a number format of GPUs")
            continue
        if case.dtype not in rates:
            rates[case.dtype] = rates_of(case, device)
        rate = rates[case.dtype]
        more: Row = {"copy_gb_s": round(rate["copy"] / 1e9, 1), "gflops_mm": round(rate["matrix"] / 1e9, 1)}
        taking_part = chosen(candidates(case, device), arguments.only, without)
        if number > 0 and (arguments.compiled or effort.compiled) == "first":
            taking_part = [c for c in taking_part if not c.compiled]
        rows, failures = measure_case(
            case,
            taking_part,
            device,
            rate,
            turns=turns,
            share=share,
            deadline=deadline,
            timed=effort.timed,
            patience=patience,
        )
        keep(rows, case, more)
        failed += failures
        print(table(case, rows, rate), flush=True)
        if number == 0 and not whole:
            small = case._replace(batch=1, sizes=HOST_SIZES)
            taking_part = chosen(candidates(small, device), arguments.only, without)
            rows = measure_host(small, taking_part, device)
            keep(rows, small)
            print(host_table(small, rows), flush=True)
    if whole:
        keep(compile_rows(cases))  # after the cases: these rows say that a run was not ended before
        print(cpu_tables.report([{name: str(value) for name, value in row.items()} for row in kept]))
    for failure in failed:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
