"""Step: what machine this is, and whether the checkout installs there without a network."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.first_gpu_run.records import append, need_kernels, one_line
from benchmarks.first_gpu_run.runner import ROOT
from benchmarks.first_gpu_run.sanitize import find_sanitizer
from benchmarks.profile_kernels import find_ncu
from ccgpu.train.runs import records as runs

PACKAGES = (
    *("torch", "triton", "numpy", "numba", "numba-cuda", "cupy-cuda13x", "cupy-cuda12x", "nvidia-cuda-nvrtc"),
    *("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "expecttest"),
)
QUERY = (
    "name,driver_version,memory.total,power.limit,pstate,temperature.gpu,clocks.sm,clocks.mem,clocks.max.sm,"
    "clocks.max.mem,clocks_event_reasons.active"
)
INSTALL = ("-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "-e", ".")


def versions() -> dict[str, str]:
    """Return the versions of what is installed, of PACKAGES and Python."""
    found = {"python": platform.python_version(), "cuda of torch": str(torch.version.cuda)}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def smi() -> dict[str, str]:
    """Return what nvidia-smi says of the first device; the settings are only read."""
    try:
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader", "--id=0"]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"reason": f"nvidia-smi: {error}"}
    if asked.returncode:
        return {"reason": one_line(asked.stdout + asked.stderr)}
    return dict(zip(QUERY.split(","), (value.strip() for value in asked.stdout.split(",")), strict=False))


def device() -> dict[str, object]:
    """Return the properties of the first device on which the kernels depend."""
    properties = torch.cuda.get_device_properties(0)
    names = ("name", "major", "minor", "multi_processor_count", "total_memory", "L2_cache_size")
    more = ("shared_memory_per_block_optin", "shared_memory_per_multiprocessor", "regs_per_multiprocessor")
    return {name: getattr(properties, name, None) for name in (*names, *more)}


def main(argv: Sequence[str] | None = None) -> int:
    """Record the facts; return the exit status."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--records", type=Path, required=True)
    flags.add_argument("--commit")
    arguments = flags.parse_args(argv)
    common = {"step": "facts", "commit": arguments.commit or runs.commit(), "versions": versions(), "nvidia-smi": smi()}
    tools = {"ncu": find_ncu() is not None, "compute-sanitizer": find_sanitizer() is not None}
    found = device() if torch.cuda.is_available() else None
    append(arguments.records, common | tools | {"device": found})
    print(common, tools, found, sep="\n")
    need_kernels()
    installed = subprocess.run([sys.executable, *INSTALL], cwd=ROOT, stdin=subprocess.DEVNULL)
    append(arguments.records, {"step": "facts", "install": " ".join(INSTALL), "exit": installed.returncode})
    return installed.returncode


if __name__ == "__main__":
    sys.exit(main())
