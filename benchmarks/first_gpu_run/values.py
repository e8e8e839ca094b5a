"""Step: values and gradients of the CUDA kernels against float64, small maps first, memory full of NaN."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

import ccgpu
from benchmarks.cases import Case, precision
from benchmarks.first_gpu_run.records import append, need_kernels
from benchmarks.run_case import AGREEMENT, make_sets, reason, relative_errors, steps_of, truth

# The most likely to fail or to hang last: one image (nothing waits for other images), lines in a block, lines in
# segments, three axes, and the case that counts, small batches first.
SMALL = (
    Case(1, (9, 7), "bfloat16", 16, 24),
    Case(1, (33, 40), "bfloat16", 64, 64),
    Case(3, (33, 40), "bfloat16", 64, 72),
    *(Case(3, (33, 40), dtype, 64, 72) for dtype in ("float16", "tf32", "float32", "float64")),
    Case(2, (97, 97), "bfloat16", 128, 256),
    Case(2, (5, 20, 31), "bfloat16"),
    Case(2, (2, 19, 17), "float32", 8, 12),
    *(Case(2, (300, 20), dtype) for dtype in ("bfloat16", "float32")),
    Case(2, (150, 7), "float64", 16, 16),
    Case(1, (129, 257), "bfloat16"),
)
HOT = tuple(
    Case(batch, (97, 97), dtype)
    for dtype in ("bfloat16", "float16", "tf32", "float32", "float64")
    for batch in ((1, 2, 8) if dtype == "bfloat16" else (1,))
)
CASES = (*SMALL, *HOT)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Make torch allocate memory full of NaN, so that elements never written, or read too early, show."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # cuBLAS warns that its workspace is not fixed
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def errors_of(case: Case, device: torch.device, backend: str) -> dict[str, float]:
    """Return the relative errors of out and of the gradients; a NaN anywhere in a result is an error of NaN."""
    with precision(case.dtype), poisoned_memory():
        sets = make_sets(case, device, "channels_last", 1)
        results = steps_of(partial(ccgpu.cca, backend=backend), sets)["forward+backward"].run(0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        assert isinstance(results, tuple)
        errors = relative_errors(results, truth(case, sets))
    return {step: errors[step] for step in ("forward", "backward")}


def check(case: Case, device: torch.device, backend: str) -> dict[str, object]:
    """Return the row of a case: its errors, or the exception; `agrees` is true where every error is small."""
    start = time.perf_counter()
    row: dict[str, object] = {"step": "values", "case": str(case), "backend": backend, "agrees": False}
    try:
        errors = errors_of(case, device, backend)
    except Exception as error:  # whatever it is, it is the result of this case
        return row | {"reason": reason(error)}
    row["agrees"] = all(error <= AGREEMENT[case.dtype] for error in errors.values())
    return row | errors | {"seconds": round(time.perf_counter() - start, 2)}


def usable() -> bool:
    """Tell whether this process can still use the device."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Check the cases; return the exit status, 1 if one disagrees."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--records", type=Path, required=True)
    flags.add_argument("--first", type=int, default=0, help="number of the first case")
    arguments = flags.parse_args(argv)
    need_kernels()
    wrong = 0
    for number, case in enumerate(CASES[arguments.first :], arguments.first):
        print(case, end=": ", flush=True)
        row = check(case, torch.device("cuda"), "cupy")
        append(arguments.records, row)
        print({name: row[name] for name in row if name not in ("step", "case")}, flush=True)
        wrong += not row["agrees"]
        if not usable():
            # An error in a kernel makes every later call of the process fail: another one goes on.
            rest = ["--records", str(arguments.records), "--first", str(number + 1)]
            subprocess.run([sys.executable, "-m", "benchmarks.first_gpu_run.values", *rest])
            return 1
    print(f"{wrong} of {len(CASES) - arguments.first} cases disagree")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
