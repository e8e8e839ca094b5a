"""Why the Numba kernels cannot run a call, and when they are chosen, on fake GPUs."""

import importlib
import importlib.util
import types

import pytest
import torch

import ccgpu
from ccgpu import dispatch
from ccgpu.bridges import numba_cuda
from ccgpu.bridges.call import Call
from tests.forked import run_forked

CUDA = torch.device("cuda", 0)


def reason(device="cuda", **call):
    return numba_cuda.why_not(Call(torch.device(device), **call))


@pytest.fixture
def numba_cuda_package(monkeypatch, gpu):
    """A fake numba-cuda that sees two devices, without its simulator."""
    fake = types.SimpleNamespace(gpus=[0, 1], is_available=lambda: True, cuda_error=lambda: None)
    monkeypatch.setattr(numba_cuda, "_REASONS", {})
    monkeypatch.setattr(numba_cuda, "simulated", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", lambda name: fake)
    return fake


def test_simulator_runs_cpu_tensors_by_name_only(monkeypatch):
    monkeypatch.setattr(numba_cuda, "simulated", lambda: True)
    listed = {b.name: b for b in ccgpu.backends("cpu")}
    assert listed["numba_cuda"].available
    assert "simulator" in listed["numba_cuda"].reason
    q = torch.zeros(1, 2, 3, 4)
    assert dispatch.choose(q, v=q).name in ("numba_cpu", "cpu")
    assert dispatch.choose(q, "numba_cuda", q).name == "numba_cuda"
    assert reason("cpu", dtype=torch.bfloat16) == "it has no kernels for torch.bfloat16"
    assert reason() == "Numba runs in its simulator (NUMBA_ENABLE_CUDASIM), which takes CPU tensors"
    assert reason("meta") == "it runs CUDA tensors, and these are on meta"


def test_cpu_tensors_need_the_simulator(monkeypatch):
    monkeypatch.setattr(numba_cuda, "simulated", lambda: False)
    assert "only in Numba's simulator (NUMBA_ENABLE_CUDASIM=1)" in reason("cpu")
    with pytest.raises(RuntimeError, match="backend='numba_cuda' cannot run this call: it runs CUDA tensors, and CPU"):
        ccgpu.cca(*[torch.zeros(1, 2, 3)] * 3, backend="numba_cuda")


def test_available_devices(numba_cuda_package):
    for index in (0, 1):
        assert reason(f"cuda:{index}") is None
    assert reason() is None
    assert reason(dtype=torch.bfloat16) == "it has no kernels for torch.bfloat16"
    assert all(reason(dtype=dtype, depth=1000) is None for dtype in (torch.float32, torch.float16, torch.float64))
    assert reason("cuda:2").startswith("Numba sees no CUDA device 2; pip install")


def test_without_cupy_it_is_the_first_choice(numba_cuda_package, monkeypatch, caplog):
    monkeypatch.setattr(importlib, "import_module", _no_cupy(numba_cuda_package))
    dispatch._warn_once.cache_clear()
    on_cuda = types.SimpleNamespace(device=CUDA, dtype=torch.float32, shape=torch.Size((1, 8, 3, 4)))
    for _ in range(2):
        assert dispatch.choose(on_cuda, None, on_cuda).name == "numba_cuda"
    (record,) = caplog.records
    assert "'cupy' cannot run, a slower one does: CuPy is not installed" in record.getMessage()
    on_cuda.dtype = torch.bfloat16
    assert dispatch.choose(on_cuda, None, on_cuda).name == "torch"


def _no_cupy(numba):
    def import_module(name):
        if name == "cupy":
            raise ModuleNotFoundError("No module named 'cupy'", name="cupy")
        return numba

    return import_module


def test_numba_cuda_is_not_installed(numba_cuda_package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert reason() == 'numba-cuda is not installed; pip install "ccgpu[cuda12]"'
    monkeypatch.setattr(numba_cuda, "_REASONS", {})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert reason().endswith('"ccgpu[cuda13]"')


def test_no_device_broken_library_and_rocm_are_named(numba_cuda_package, monkeypatch):
    numba_cuda_package.is_available = lambda: False
    numba_cuda_package.cuda_error = lambda: "CUDA driver library cannot be found.\nAnd more."
    assert reason().startswith("Numba sees no CUDA device 0 (CUDA driver library cannot be found.); pip install")
    monkeypatch.setattr(numba_cuda, "_REASONS", {})
    monkeypatch.setattr(importlib, "import_module", _raise(ImportError("libnvvm.so: no such file\nand more")))
    assert reason().startswith("numba-cuda cannot be used (libnvvm.so: no such file); pip install")
    monkeypatch.setattr(numba_cuda, "_REASONS", {})
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in reason()
    monkeypatch.setattr(numba_cuda, "_REASONS", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason() == "torch sees no CUDA device"


def _raise(error):
    def function(*arguments):
        raise error

    return function


def test_reasons_are_cached_for_each_device(numba_cuda_package, monkeypatch):
    counted = []
    monkeypatch.setattr(numba_cuda, "_find_reason", counted.append)
    for index in (0, 1, 0, 1):
        assert reason(f"cuda:{index}") is None
    assert counted == [0, 1]


@pytest.mark.parametrize("value", [None, "0"])
def test_asking_about_cpu_tensors_imports_no_numba(value, monkeypatch):
    code = (
        "import sys, torch; from ccgpu import dispatch; from ccgpu.bridges import call, numba_cuda;"
        "reason = numba_cuda.why_not(call.Call(torch.device('cpu')));"
        "dispatch.choose(torch.zeros(1, 2, 3, device='meta'));"
        "print(reason is None, 'numba' in sys.modules)"
    )
    monkeypatch.delenv("NUMBA_ENABLE_CUDASIM", raising=False)
    answer = run_forked(code, **({} if value is None else {"NUMBA_ENABLE_CUDASIM": value}))
    assert answer.stdout.split() == ["False", "False"], answer.stderr
