"""Measure criss-cross attention, ours and the peers, side by side: `python -m benchmarks.cca` or `make bench`.

First the values and gradients of each implementation are compared with float64; one that disagrees is not timed. Then
all take turns at forward, backward and both. An implementation that cannot run gets a row with the reason. Without
--suite one case is measured, on the CUDA device if there is one. After each case the rows are appended to
benchmarks/results/cca_<device>.csv (--record) or to a file of that name in another folder (--out).

The exit status is 1 if one of this library's backends failed or any implementation disagreed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import measure, results_file
from benchmarks.candidates import Candidate, candidates
from benchmarks.cases import DTYPES, STEPS, Case, precision, suite
from benchmarks.run_case import Row, measure_case, measure_host

HOST_SIZES = (16, 16)


def parser() -> argparse.ArgumentParser:
    """Return the command's flags."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flags.add_argument("--suite", action="store_true", help="all shapes and dtypes, the most informative first")
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
        default="all",
        help="cases that also measure what torch.compile compiles",
    )
    flags.add_argument("--threads", type=int, default=2, help="threads of the CPU")
    flags.add_argument("--turns", type=int, default=30, help="how often each step is timed")
    flags.add_argument("--share", type=float, default=1.0, help="seconds that one step may take in all")
    flags.add_argument("--seconds", type=float, default=3600.0, help="most seconds of the whole measurement")
    flags.add_argument("--record", action="store_true", help="append the rows to benchmarks/results")
    flags.add_argument("--out", type=Path, metavar="DIR", help="append the rows to a file in this folder")
    flags.add_argument("--commit", help="commit to record if the tree has no git")
    return flags


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    """Return the cases that the flags select."""
    if arguments.suite:
        return [case for case in suite() if arguments.dtype is None or case.dtype in arguments.dtype]
    on_gpu = torch.device(arguments.device).type == "cuda"
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
    """Return the bytes/s of a copy and the FLOP/s of a matrix product of the case's dtype on this device, now."""
    clock = measure.Clock(device)
    with precision(case.dtype):
        return {"copy": measure.copy_rate(clock, turns), "matrix": measure.matrix_rate(clock, case.torch_dtype, turns)}


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

    def keep(case: Case, rows: Sequence[Row], more: Row) -> None:
        shape = {"shape": case.shape, "D": case.query, "C": case.channels, "dtype": case.dtype}
        if folder is not None:
            results_file.append(
                results_file.path_for(device, folder), [{**common, **shape, **more, **row} for row in rows]
            )

    failed: list[str] = []
    rates: dict[str, dict[str, float]] = {}
    for number, case in enumerate(cases_of(arguments)):
        if time.monotonic() > deadline:
            print(f"{case}: not measured, the {arguments.seconds:.0f} s are over")
            continue
        if case.dtype == "tf32" and device.type != "cuda":
            print(f"{case}: not measured, TF32 is a number format of GPUs")
            continue
        if case.dtype not in rates:
            rates[case.dtype] = rates_of(case, device)
        rate = rates[case.dtype]
        more: Row = {"copy_gb_s": round(rate["copy"] / 1e9, 1), "gflops_mm": round(rate["matrix"] / 1e9, 1)}
        taking_part = chosen(candidates(case, device), arguments.only, arguments.without)
        if number > 0 and arguments.compiled == "first":
            taking_part = [c for c in taking_part if not c.compiled]
        rows, failures = measure_case(
            case, taking_part, device, rate, turns=arguments.turns, share=arguments.share, deadline=deadline
        )
        keep(case, rows, more)
        failed += failures
        print(table(case, rows, rate), flush=True)
        if number == 0:
            small = case._replace(batch=1, sizes=HOST_SIZES)
            taking_part = chosen(candidates(small, device), arguments.only, arguments.without)
            rows = measure_host(small, taking_part, device)
            keep(small, rows, {})
            print(host_table(small, rows), flush=True)
    for failure in failed:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
