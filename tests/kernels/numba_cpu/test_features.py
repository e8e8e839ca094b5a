"""Which instructions the CPU kernels use: those that Numba compiles for."""

import os
import subprocess
import sys
from pathlib import Path

import numba
import pytest
from llvmlite import binding

from ccgpu.kernels.numba_cpu.features import compiled_for

ROOT = Path(__file__).resolve().parents[3]


def test_instructions_of_this_machine():
    host = binding.get_host_cpu_features()
    assert compiled_for() == {name for name, present in host.items() if present}


@pytest.mark.parametrize(
    ("named", "wanted"),
    [
        ("", set()),
        ("+avx,+avx2,-avx512f", {"avx", "avx2"}),
        (" +sse2 , +avx512bf16", {"sse2", "avx512bf16"}),
        ("+avx,+neon,-avx", {"neon"}),
    ],
)
def test_instructions_that_are_named(monkeypatch, named, wanted):
    monkeypatch.setattr(numba.config, "CPU_FEATURES", named)
    assert compiled_for() == wanted


def test_no_avx(monkeypatch):
    monkeypatch.setattr(numba.config, "ENABLE_AVX", 0)
    assert not {name for name in compiled_for() if name.startswith("avx")}


COMPUTED = """
import sys
import torch
import ccgpu
from ccgpu.kernels.numba_cpu import dot_products, vectors
from tests.ccgpu import problems

dtype = getattr(torch, sys.argv[1])
tensors = tuple(torch.randn(1, c, 17, 5).to(dtype) for c in (3, 3, 18))
problem = problems.Problem(tensors, torch.ones(1, 18, 17, 5).to(dtype), torch.ones(1, 17, 5), 1.0)
ours = problems.attend(problem, "numba_cpu")
problems.check_errors(ours, problems.attend_plainly(problem), problems.expected(problem), problem)
print(vectors.VECTOR_BYTES, dot_products.AVAILABLE)
"""


AVX512 = "+avx,+avx2,+fma,+f16c,+avx512f,+avx512bw,+avx512dq,+avx512vl"


@pytest.mark.parametrize(
    ("settings", "dtype", "vector"),
    [
        ({"NUMBA_CPU_NAME": "generic"}, "bfloat16", 16),
        ({"NUMBA_ENABLE_AVX": "0"}, "float16", 16),
        pytest.param(
            {"NUMBA_CPU_NAME": "skylake-avx512", "NUMBA_CPU_FEATURES": AVX512},
            "bfloat16",
            64,
            marks=pytest.mark.skipif("avx512vl" not in compiled_for(), reason="this CPU has no AVX-512"),
        ),
    ],
    ids=["generic", "without AVX", "without BF16"],
)
def test_instructions_of_an_older_machine(settings, dtype, vector, tmp_path):
    """In a process of its own, which LLVM ends if it is asked for an instruction that it may not use."""
    answer = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMPUTED, dtype],
        cwd=ROOT,
        env={**os.environ, **settings, "NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (answer.returncode, answer.stdout.split()) == (0, [str(vector), "False"]), answer.stderr
