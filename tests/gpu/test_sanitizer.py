"""Small calls of every kernel under compute-sanitizer, which finds accesses out of bounds and races."""

import glob
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.device import why_not

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("small_cases.py")
ERROR = 86  # the exit status that the tool returns, by its flags, if it found an error
# A kernel that writes beyond its only element, to check that the tool finds such an error.
OUT_OF_BOUNDS = """
import cupy
x = cupy.cuda.alloc(4)
code = 'extern "C" __global__ void f(int *x) { x[threadIdx.x * 1024 * 1024] = 1; }'
cupy.RawKernel(code, "f")((1,), (2,), (x.ptr,))
cupy.cuda.get_current_stream().synchronize()
"""


def sanitizer():
    installed = sorted(glob.glob("/usr/local/cuda*/bin/compute-sanitizer"))
    path = shutil.which("compute-sanitizer") or (installed[-1] if installed else None)
    if path is None:
        pytest.skip("compute-sanitizer is not installed; it comes with the CUDA toolkit")
    return path


def run(tool, *arguments):
    """Run Python under a tool of the sanitizer; every tensor is an allocation of its own."""
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    command = [sanitizer(), "--tool", tool, "--error-exitcode", str(ERROR), "--print-limit", "5"]
    ran = subprocess.run(
        [*command, sys.executable, *arguments],
        **{"cwd": ROOT, "env": os.environ | alone, "capture_output": True, "text": True, "timeout": 550},
    )
    text = ran.stdout + ran.stderr
    if "Device not supported" in text:
        pytest.skip("compute-sanitizer does not support this device or driver")
    return ran.returncode, text


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("name", ["cupy", "numba_cuda"])
def test_kernels_under_the_sanitizer(name, tool):
    reason = why_not(name)
    if reason is not None:
        pytest.skip(reason)
    status, text = run(tool, str(SCRIPT), name)
    assert status == 0, text[-4000:]
    assert "ran" in text.splitlines()
    assert "ERROR SUMMARY: 0 errors" in text or "RACECHECK SUMMARY: 0 hazards" in text, text[-4000:]


def test_sanitizer_finds_a_write_out_of_bounds(kernels):
    status, text = run("memcheck", "-c", OUT_OF_BOUNDS)
    assert status != 0
    assert "Invalid __global__ write" in text
