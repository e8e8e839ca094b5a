"""Step: the hot case with other lags, cuts, hints and additions in L2: times, and bytes by Nsight Compute (ncu).

Each variant is compared with the first one, then timed in turns with the others of its macros. Under ncu the same
variants run once more, forward and backward once each. A variant that cannot run gets a row with the reason.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case, precision
from benchmarks.first_gpu_run.records import append, need_kernels, read
from benchmarks.measure import Clock, Step, interleaved
from benchmarks.profile_kernels import find_ncu
from benchmarks.run_case import AGREEMENT, Sets, make_sets, milliseconds, number_of_sets, reason
from ccgpu.bridges.cupy_cuda.attention import Kernels
from ccgpu.bridges.cupy_cuda.launch import CuPyLauncher, Launcher
from ccgpu.kernels.cuda.plans import Launch

HOT = Case(8, (97, 97), "bfloat16")
PASSES = ("forward", "backward")
METRICS = (
    *("gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum"),
    *("lts__t_bytes.sum", "lts__t_sectors_op_read.sum", "lts__t_sectors_op_write.sum", "lts__t_sectors_op_red.sum"),
)
COMPILE_SECONDS = 5.0  # of a variant with new macros, at most


class Variant(NamedTuple):
    """Macros of the kernels, and arguments of `plans.plan` in place of their defaults."""

    defines: tuple[str, ...] = ()
    schedule: tuple[tuple[str, int], ...] = ()  # numbers and switches

    def __str__(self) -> str:
        return " ".join([*self.defines, *(f"{name}={value}" for name, value in self.schedule)]) or "as shipped"


VARIANTS = (
    Variant(),
    *(Variant((), (("lag", lag),)) for lag in (0, 1, 2, 4)),
    *(Variant((), (("cuts", cuts),)) for cuts in (1, 2, 4)),
    *(Variant((), (("adds", True), ("lag", lag))) for lag in (0, 1)),
    *(Variant(("CCGPU_HINTS=0",), (("lag", lag),)) for lag in (0, 1)),
)


class CountingLauncher(CuPyLauncher):
    """A launcher that counts its launches, to find a call's kernels in ncu's report."""

    launched = 0

    def launch(self, launches: tuple[Launch, ...], tensors: dict[str, Tensor], counters: Tensor, scale: float) -> None:
        """Count the launches and run them."""
        self.launched += len(launches)
        super().launch(launches, tensors, counters, scale)


def calls(variant: Variant, launcher: Launcher, sets: Sets) -> dict[str, Callable[[int], tuple[Tensor, ...]]]:
    """Return forward and backward of a variant as functions of the number of a set of inputs."""
    kernels = Kernels(launcher, **dict(variant.schedule))
    saved = [kernels.forward(q, k, v, 1.0) for q, k, v in sets.tensors]

    def forward(number: int) -> tuple[Tensor, ...]:
        return kernels.forward(*sets.tensors[number % len(saved)], 1.0)

    def backward(number: int) -> tuple[Tensor, ...]:
        number %= len(saved)
        out, lse = saved[number]
        return kernels.backward(sets.douts[number], *sets.tensors[number], out, lse, torch.zeros_like(lse), 1.0)

    return dict(zip(PASSES, (forward, backward), strict=True))


def difference(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest relative difference, in the 2-norm, of tensors from others."""
    pairs = zip(results, expected, strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)


def times(
    case: Case,
    device: torch.device,
    turns: int,
    end: float,
    launcher: Callable[[tuple[str, ...]], Launcher] = CuPyLauncher,
) -> Iterator[dict[str, object]]:
    """Yield a row for each variant and pass: its times and its difference from the first variant.

    `end` is the time, as time.monotonic gives it, after which no other variant begins.
    """
    sets, clock = make_sets(case, device, "channels_last", number_of_sets(case, device)), Clock(device)
    expected: dict[str, tuple[Tensor, ...]] = {}
    for _, group in groupby(VARIANTS, key=lambda variant: variant.defines):
        able: dict[str, dict[str, Callable[[int], tuple[Tensor, ...]]]] = {}
        for variant in group:
            row = {"step": "sweep", "case": str(case), "variant": str(variant)}
            if end - time.monotonic() < COMPILE_SECONDS:
                yield row | {"reason": "no time left"}
                continue
            try:
                made = calls(variant, launcher(variant.defines), sets)
                results = {name: made[name](0) for name in PASSES}
                expected = expected or results
                worst = max(difference(results[name], expected[name]) for name in PASSES)
                if not worst <= AGREEMENT[case.dtype]:
                    raise ArithmeticError(f"differs from {VARIANTS[0]} by {worst:.2g}")
                able[str(variant)] = made
            except Exception as error:  # whatever it is, it is the result of this variant
                yield row | {"reason": reason(error)}
        for name in PASSES:
            steps = {text: Step(lambda number: number, made[name]) for text, made in able.items()}
            for text, timing in interleaved(steps, turns, clock).items():
                row = {"step": "sweep", "case": str(case), "variant": text, "pass": name}
                yield row | ({"reason": reason(timing)} if isinstance(timing, Exception) else milliseconds(timing))


def count(case: Case, device: torch.device, launched: Path) -> None:
    """Run each variant's passes once between the profiler's start and stop; append what ran to a file."""
    sets = make_sets(case, device, "channels_last", 1)
    for variant in VARIANTS:
        try:
            launcher = CountingLauncher(variant.defines)
            made = calls(variant, launcher, sets)
            made["backward"](0)  # compiles
        except Exception as error:  # a row of `times` has the reason
            print(f"{variant}: {reason(error)}")
            continue
        for name in PASSES:
            before = launcher.launched
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            made[name](0)
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            append(launched, {"variant": str(variant), "pass": name, "launches": launcher.launched - before})


def ncu_command(ncu: str, report: Path, launched: Path) -> list[str]:
    """Return the command that counts METRICS of our kernels; the clocks are left as they are."""
    options = ["--csv", "--page", "raw", "--print-units", "base", "--log-file", str(report)]
    chosen = ["--profile-from-start", "off", "--clock-control", "none", "--kernel-name", "regex:^cca_"]
    command = [sys.executable, "-m", "benchmarks.first_gpu_run.sweep", "--count", str(launched)]
    return [ncu, *options, *chosen, "--metrics", ",".join(METRICS), *command]


def counted(report: str, launched: Sequence[dict[str, Any]]) -> list[dict[str, object]]:
    """Return a row for each pass that ran, with the sums of its launches' metrics.

    Args:
        report: ncu's output of page raw: a line for each kernel, a column for each metric, a line of units first.
        launched: variant, pass and number of launches of each call, in order.

    Raises:
        ValueError: the kernels cannot be attributed to the calls, or a metric is missing.
    """
    lines = report.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels = [row for row in csv.DictReader(lines[start:]) if row["ID"].isdigit()]
    expected = sum(call["launches"] for call in launched)
    if not kernels or len(kernels) != expected:
        raise ValueError(f"counted: ncu must report {expected} kernels, those of the calls, got {len(kernels)}")
    rows, left = [], iter(kernels)
    for call in launched:
        mine = list(islice(left, call["launches"]))
        if not all(f"_{call['pass']}_" in row["Kernel Name"] for row in mine):
            raise ValueError(f"counted: kernels of {call} must be named for it, got {mine[0]['Kernel Name']}")
        sums = {name: sum(float((row[name] or "nan").replace(",", "")) for row in mine) for name in METRICS}
        rows.append({"step": "sweep", "case": str(HOT), **call, **sums})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Sweep; return the exit status."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--records", type=Path)
    flags.add_argument("--scratch", type=Path, help="folder for ncu's report")
    flags.add_argument("--seconds", type=float, default=600.0)
    flags.add_argument("--turns", type=int, default=20)
    flags.add_argument("--count", type=Path, help=argparse.SUPPRESS)
    arguments = flags.parse_args(argv)
    end, device = time.monotonic() + arguments.seconds, torch.device("cuda")
    need_kernels()
    if arguments.count is not None:
        count(HOT, device, arguments.count)
        return 0
    with precision(HOT.dtype):
        for row in times(HOT, device, arguments.turns, end - arguments.seconds / 2):
            append(arguments.records, row)
            print({name: row[name] for name in row if name not in ("step", "case")}, flush=True)
    ncu = find_ncu()
    if ncu is None:
        append(arguments.records, {"step": "sweep", "reason": "no bytes counted: ncu is not installed"})
        return 0
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    report, launched = arguments.scratch / "ncu.csv", arguments.scratch / "launched.jsonl"
    launched.unlink(missing_ok=True)
    command = ncu_command(ncu, report, launched)
    print(*command, flush=True)
    left = max(1.0, end - time.monotonic())
    try:
        ran = subprocess.run(command, timeout=left)
        if ran.returncode:
            raise ValueError(f"ncu ended with {ran.returncode}")
        rows = counted(report.read_text(), read(launched))
    except (OSError, KeyError, ValueError) as error:
        append(
            arguments.records,
            {"step": "sweep", "reason": f"no bytes counted: ncu ended with {ran.returncode}; {error}"},
        )
        return 1
    for row in rows:
        append(arguments.records, row)
        print({name: row[name] for name in row if name not in ("step", "case")}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
