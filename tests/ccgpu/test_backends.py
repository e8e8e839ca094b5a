"""The choice of a backend: the first that can run, or the one asked for, never another."""

import ast
import subprocess
import sys

import pytest
import torch

import ccgpu
from ccgpu import dispatch

Q = torch.randn(1, 2, 3, 4)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("CCGPU_BACKEND", raising=False)


@pytest.fixture
def ran(monkeypatch):
    """Record which backends run."""
    names = []

    class Recorder:
        def __init__(self, backend):
            self.backend = backend

        def forward(self, *arguments):
            names.append(self.backend.name)
            return self.backend.module.forward(*arguments)

        def backward(self, *arguments):
            names.append(f"{self.backend.name} backward")
            return self.backend.module.backward(*arguments)

    monkeypatch.setattr(dispatch, "BACKENDS", tuple(b._replace(module=Recorder(b)) for b in dispatch.BACKENDS))
    return names


def test_first_that_can_run(ran):
    q = Q.clone().requires_grad_()
    ccgpu.cca(q, Q, Q).sum().backward()
    assert ran == ["cpu", "cpu backward"]


def test_other_devices_take_the_torch_formulation():
    meta = torch.empty(1, device="meta")
    assert dispatch.choose(meta).name == "torch"


@pytest.mark.parametrize("name", ["cpu", "torch", "reference"])
def test_argument_forces_forward_and_backward(ran, name):
    q = Q.clone().requires_grad_()
    ccgpu.cca(q, Q, Q, backend=name).sum().backward()
    assert ran == [name, f"{name} backward"]


def test_environment_variable_forces_and_the_argument_wins(ran, monkeypatch):
    monkeypatch.setenv("CCGPU_BACKEND", "reference")
    ccgpu.cca(Q, Q, Q)
    ccgpu.cca(Q, Q, Q, backend="torch")
    assert ran == ["reference", "torch"]
    monkeypatch.setenv("CCGPU_BACKEND", "")
    ccgpu.cca(Q, Q, Q)
    assert ran[-1] == "cpu"


def test_bad_environment_variable_is_named(monkeypatch):
    monkeypatch.setenv("CCGPU_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"cca: CCGPU_BACKEND must be one of \[.*\], got 'cuda'; "):
        ccgpu.cca(Q, Q, Q)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_named_backend_that_cannot_run_raises(name):
    meta = torch.empty(1, device="meta")
    with pytest.raises(
        RuntimeError, match=rf"backend='{name}' cannot run this call: .*on meta; use one of \['torch'\]"
    ):
        dispatch.choose(meta, name)


def test_backends_lists_all_with_reasons(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    on_cpu, on_cuda = ccgpu.backends("cpu"), ccgpu.backends("cuda")
    assert [b.name for b in on_cpu] == [b.name for b in on_cuda] == ["cpu", "torch", "reference"]
    assert [b.available for b in on_cpu] == [True, True, True]
    assert [b.available for b in on_cuda] == [False, True, False]
    assert "on cuda" in on_cuda[0].reason
    assert "unavailable" in str(on_cuda[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not any(b.available for b in ccgpu.backends("cuda"))
    assert "no CUDA device" in ccgpu.backends("cuda")[1].reason


def test_reference_backend_differs_in_bits_only():
    q, v = Q.clone().requires_grad_(), Q.clone().requires_grad_()
    a, b = ccgpu.cca(q, Q, v, backend="reference"), ccgpu.cca(q, Q, v, backend="cpu")
    torch.testing.assert_close(a, b)
    for x, y in zip(torch.autograd.grad(a.sum(), (q, v)), torch.autograd.grad(b.sum(), (q, v)), strict=True):
        torch.testing.assert_close(x, y)


def test_import_is_light():
    """Nothing that is heavy or optional is imported along: no Numba, CuPy, TensorBoard, PIL."""
    code = (
        "import sys, torch; before = set(sys.modules); import ccgpu; new = set(sys.modules) - before;"
        "print(sorted({name.split('.')[0] for name in new}))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(ast.literal_eval(answer.stdout)) <= {"ccgpu", "numpy", "torch"}


def test_no_backend_for_a_device(monkeypatch):
    monkeypatch.setattr(dispatch, "BACKENDS", tuple(b for b in dispatch.BACKENDS if b.name != "torch"))
    with pytest.raises(RuntimeError, match=r"cca: a backend must be able to run on meta, got none \(cpu: it runs CPU"):
        dispatch.choose(torch.empty(1, device="meta"))
