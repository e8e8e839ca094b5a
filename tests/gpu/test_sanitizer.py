"""Small calls of every kernel under compute-sanitizer, which finds accesses out of bounds and races."""

import pytest

from benchmarks.first_gpu_run.sanitize import CLEAN, REFUSED, SCRIPT, UNSUPPORTED, find_sanitizer, sanitized
from tests.gpu.device import why_not

# A kernel that writes beyond its only element, to check that the tool finds such an error.
OUT_OF_BOUNDS = """
import cupy
x = cupy.cuda.alloc(4)
code = 'extern "C" __global__ void f(int *x) { x[threadIdx.x * 1024 * 1024] = 1; }'
cupy.RawKernel(code, "f")((1,), (2,), (x.ptr,))
cupy.cuda.get_current_stream().synchronize()
"""


def run(tool, *arguments):
    """Run Python under a tool of the sanitizer."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed; it comes with the CUDA toolkit")
    status, text = sanitized(sanitizer, tool, *arguments, seconds=550)
    if UNSUPPORTED in text:
        pytest.skip(REFUSED)
    return status, text


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("name", ["cupy", "numba_cuda"])
def test_kernels_under_the_sanitizer(name, tool):
    reason = why_not(name)
    if reason is not None:
        pytest.skip(reason)
    status, text = run(tool, str(SCRIPT), name)
    assert status == 0, text[-4000:]
    assert "ran" in text.splitlines()
    assert any(words in text for words in CLEAN), text[-4000:]


def test_sanitizer_finds_a_write_out_of_bounds(kernels):
    status, text = run("memcheck", "-c", OUT_OF_BOUNDS)
    assert status != 0
    assert "Invalid __global__ write" in text
