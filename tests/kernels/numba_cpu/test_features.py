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
from ccgpu.kernels.numba_cpu import vectors
from tests.ccgpu import problems

for dtype in (getattr(torch, name) for name in sys.argv[1:]):
    tensors = tuple(torch.randn(1, c, 17, 5).to(dtype) for c in (3, 3, 18))
    problem = problems.Problem(tensors, torch.ones(1, 18, 17, 5).to(dtype), torch.ones(1, 17, 5), 1.0)
    ours = problems.attend(problem, "numba_cpu")
    problems.check_errors(ours, problems.attend_plainly(problem), problems.expected(problem), problem)
print(vectors.VECTOR_BYTES)
"""


@pytest.mark.parametrize(
    ("variable", "dtypes"),
    [("NUMBA_CPU_NAME=generic", ["bfloat16", "float16"]), ("NUMBA_ENABLE_AVX=0", ["float16"])],
)
def test_instructions_of_an_older_machine(variable, dtypes, tmp_path):
    """In a process of its own, which LLVM ends if it is asked for an instruction that it may not use."""
    name, value = variable.split("=")
    answer = subprocess.run(
        [sys.executable, "-c", COMPUTED, *dtypes],
        cwd=ROOT,
        env={**os.environ, name: value, "NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (answer.returncode, answer.stdout.strip()) == (0, "16"), answer.stderr
