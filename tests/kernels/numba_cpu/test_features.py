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
import numpy as np
from ccgpu.kernels import reference
from ccgpu.kernels.numba_cpu import calls, vectors

q, k, v = np.random.default_rng(0).standard_normal((3, 1, 5, 3, 4)).astype(np.float32)
out, lse = calls.forward(q, k, v)
wanted, wanted_lse = reference.forward(q, k, v, 1.0)
np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-5)
np.testing.assert_allclose(lse, wanted_lse, rtol=1e-5, atol=1e-5)
print(vectors.VECTOR_BYTES)
"""


@pytest.mark.parametrize("variable", ["NUMBA_CPU_NAME=generic", "NUMBA_ENABLE_AVX=0"])
def test_instructions_of_an_older_machine(variable, tmp_path):
    """In a process of its own, which LLVM ends if it is asked for an instruction that it may not use."""
    name, value = variable.split("=")
    answer = subprocess.run(
        [sys.executable, "-c", COMPUTED],
        cwd=ROOT,
        env={**os.environ, name: value, "NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (answer.returncode, answer.stdout.strip()) == (0, "16"), answer.stderr
