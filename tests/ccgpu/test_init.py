"""`import ccgpu`: what it offers, and that torch is imported at the first use alone."""

import subprocess
import sys
from pathlib import Path

import pytest

import ccgpu
from tests.forked import run_forked

ROOT = Path(__file__).resolve().parents[2]


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_is_imported_at_the_first_use():
    assert python("import sys, ccgpu; assert 'torch' not in sys.modules; print(ccgpu.cca.__module__)") == "ccgpu.ops\n"


def after_torch(code):
    done = run_forked(code)
    assert done.returncode == 0, done.stderr


def test_any_first_use_registers_all_operators():
    names = "cca_forward", "cca_backward", "affinity", "aggregate", "aggregate_transposed"
    for use in ("ccgpu.backends", "ccgpu.affinity", "ccgpu.cca"):
        after_torch(f"import ccgpu, torch; {use}; [getattr(torch.ops.ccgpu, name) for name in {names}]")


def test_the_first_use_may_be_traced():
    after_torch(
        "import ccgpu, torch\n"
        "x = torch.randn(1, 4, 5, 6)\n"
        "compiled = torch.compile(lambda x: ccgpu.cca(x, x, x), fullgraph=True, backend='eager')\n"
        "torch.testing.assert_close(compiled(x), ccgpu.cca(x, x, x))\n"
    )


def test_names():
    assert {*ccgpu.__all__} <= {*dir(ccgpu)}
    assert all(hasattr(ccgpu, name) for name in ccgpu.__all__)
    with pytest.raises(AttributeError, match="module 'ccgpu' has no attribute 'ccca'"):
        assert ccgpu.ccca
