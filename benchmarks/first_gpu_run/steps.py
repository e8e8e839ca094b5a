"""The steps of the first minutes on a GPU, in order, each with its seconds."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from benchmarks.first_gpu_run.kernels import BOUNDED
from benchmarks.first_gpu_run.records import RECORDS
from benchmarks.first_gpu_run.runner import Step
from ccgpu.bridges.cupy_cuda.launch import DEFINES

PACKAGE = "benchmarks.first_gpu_run"
TESTS = "tests/gpu"
NO_SANITIZER = f"--ignore={TESTS}/test_sanitizer.py"  # it has a step of its own, and takes longer than a test may here


def module(name: str, *words: str) -> tuple[str, ...]:
    """Return the words that run a module of this package."""
    return "-m", f"{PACKAGE}.{name}", *words


def pytest(step: str, records: Path, timeout: int, *words: str, workers: int = 1) -> tuple[str, ...]:
    """Return the words that run tests, each recorded at once and with a timeout of its own.

    A timeout ends the process, because a thread that waits for the device cannot be interrupted; pytest-xdist, where
    it is installed, goes on in another process.
    """
    spread = ("-n", str(workers)) if find_spec("xdist") else ()
    limits = ("-o", "addopts=--import-mode=importlib", f"--timeout={timeout}", "--timeout-method=thread")
    plain = ("-v", "--tb=short", "--show-capture=no", "-p", "no:cacheprovider")
    plugin = ("-p", f"{PACKAGE}.outcomes", "--records", str(records), "--step", step)
    return "-m", "pytest", *limits, *plain, *plugin, *spread, *words


def steps(out: Path, scratch: Path, prepared: Path, commit: str | None = None) -> tuple[Step, ...]:
    """Return the steps.

    Args:
        out: folder of the results.
        scratch: folder for CuPy's cache and for reports that are read and not kept.
        prepared: folder of `kernels.prepare`.
        commit: what to record where the tree has no git.
    """
    records = out / RECORDS
    written = ("--records", str(records))
    timed = (*written, "--seconds", "{seconds}")
    shipped = ("CUPY_CACHE_DIR", str(scratch / "kernel_cache"))
    bounded = (shipped, (DEFINES, " ".join(BOUNDED)))
    known = () if commit is None else ("--commit", commit)
    order = "cupy and (gradcheck_in or same_bits or stream or cuda_graph)"
    return (
        Step("facts", module("facts", *written, *known), 40, 15, (shipped,)),
        Step("kernels", module("kernels", *timed, "--prepared", str(prepared)), 60, 15, (shipped,)),
        Step("primitives", pytest("primitives", records, 15, f"{TESTS}/test_primitives.py"), 40, 15, bounded),
        Step("values", module("values", *written), 90, 25, bounded),
        Step("sweep", module("sweep", *timed, "--scratch", str(scratch)), 70, 25, (shipped,)),
        Step("compare", module("compare", "--out", str(out), *known, "--seconds", "{seconds}"), 90, 30, (shipped,)),
        Step(
            "order",
            pytest("order", records, 30, "-k", order, f"{TESTS}/test_order.py", f"{TESTS}/test_torch.py"),
            60,
            25,
            bounded,
        ),
        Step("sanitizer", module("sanitize", *timed), 120, 30, bounded),
        Step(
            "rest",
            pytest("rest", records, 100, "--unrecorded", "-m", "not slow", NO_SANITIZER, TESTS, workers=4),
            600,
            30,
            bounded,
        ),
    )
