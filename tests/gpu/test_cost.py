"""What a call may cost beside its kernels: temporaries, and compilations."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ccgpu
from tests.gpu.device import inputs

ROOT = Path(__file__).resolve().parents[2]
COUNTERS = 64 * 1024  # bytes: what orders the blocks


def requested(call):
    """Return the most bytes asked of torch's allocator at once during a call, without its results."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    results = call()
    torch.cuda.synchronize()
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    return peak - sum(x.nbytes for x in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(97, 97), (129, 257), (1000,), (5, 60, 80)])
def test_temporaries_are_lse_and_delta(kernels, sizes, dtype):
    (q, k, v), dout = inputs(sizes, 64, 64, dtype)
    forward = lambda: torch.ops.ccgpu.cca_forward(q, k, v, 1.0, kernels)  # noqa: E731
    assert requested(forward) <= COUNTERS
    out, lse = forward()
    dlse = torch.ones_like(lse)
    backward = lambda: torch.ops.ccgpu.cca_backward(dout, q, k, v, out, lse, dlse, 1.0, kernels)  # noqa: E731
    assert requested(backward) <= lse.nbytes + COUNTERS


def test_no_memory_but_torchs(kernels):
    """CuPy's own pool would take memory that torch cannot see, and that its streams do not order."""
    import cupy

    (q, k, v), _ = inputs((97, 97), 64, 64, torch.bfloat16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    before = cupy.get_default_memory_pool().total_bytes()
    torch.autograd.grad(ccgpu.cca(*leaves, backend=kernels).sum(), leaves)
    assert cupy.get_default_memory_pool().total_bytes() == before


# In a process of its own: what this one has compiled already is not logged again.
COMPILATIONS = """
import logging, random, torch, ccgpu

class Count(logging.Handler):
    messages = []
    def emit(self, record):
        self.messages.append(record.getMessage())

logger = logging.getLogger("ccgpu")
logger.setLevel(logging.INFO)
logger.addHandler(Count())

def run(h, w):
    before = len(Count.messages)
    q, v = (torch.randn(1, n, h, w, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (64, 64))
    torch.autograd.grad(ccgpu.cca(q, q * 1, v, backend="cupy").sum(), (q, v))
    return len(Count.messages) - before

first = run(97, 97)
near = [run(h, w) for h in (98, 105, 112) for w in (97, 99, 110)]
generator = random.Random(0)
many = [run(generator.randint(1, 300), generator.randint(1, 300)) for _ in range(50)]
again = [run(h, w) for h, w in ((97, 97), (112, 100))]
assert all("compiling" in message for message in Count.messages), Count.messages
print(first, sum(near), sum(many), sum(again), len(set(Count.messages)), len(Count.messages))
"""


def test_no_compilation_for_another_image_size(kernels):
    ran = subprocess.run([sys.executable, "-c", COMPILATIONS], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr
    first, near, many, again, different, all_messages = map(int, ran.stdout.split())
    assert 2 <= first <= 4  # forward and backward
    assert near == 0
    assert again == 0
    assert many <= 2 * 12 * 2  # kernels for both passes, by classes of line lengths, not by sizes
    assert different == all_messages
