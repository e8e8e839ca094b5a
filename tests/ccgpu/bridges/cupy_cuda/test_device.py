"""Why the CUDA kernels cannot run a call, and when they are chosen, on fake GPUs."""

import sys
import types

import pytest
import torch

import ccgpu
from ccgpu import dispatch
from ccgpu.bridges import numba_cuda
from ccgpu.bridges.call import Call
from ccgpu.bridges.cupy_cuda import device

CUDA = torch.device("cuda", 0)


def status(name="cupy", **call):
    return next(b for b in ccgpu.backends("cuda", **call) if b.name == name)


def test_cupy_is_the_first_choice_for_cuda_tensors(gpu):
    assert [b.name for b in ccgpu.backends() if b.available] == ["cupy", "torch"]
    tensor = types.SimpleNamespace(device=CUDA, dtype=torch.float16, shape=torch.Size((2, 64, 9, 9)))
    assert dispatch.choose(tensor, v=tensor).name == "cupy"
    assert dispatch.choose(tensor, "torch", tensor).name == "torch"
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert status(dtype=dtype, depth=256, sizes=(2000, 3, 5)).available


def test_cupy_is_not_chosen_without_a_kernel(gpu):
    wide = types.SimpleNamespace(device=CUDA, dtype=torch.float32, shape=torch.Size((2, 300, 9, 9)))
    assert dispatch.choose(wide, v=wide).name == "torch"
    assert dispatch.choose(wide).name == "cupy"  # a stage, which takes any number of channels
    with pytest.raises(
        RuntimeError, match=r"'cupy' cannot run this call: its kernels hold at most 256 .* these have 300"
    ):
        dispatch.choose(wide, "cupy", wide)
    assert status(dtype=torch.int32).reason == "it has no kernels for torch.int32"


def test_cupy_is_not_installed(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert status().reason == 'CuPy is not installed; pip install "ccgpu[cuda12]"'
    assert status("torch").available
    monkeypatch.setattr(device, "_REASONS", {})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert status().reason.endswith('"ccgpu[cuda13]"')


def test_cupy_cannot_be_imported(gpu, monkeypatch):
    def fail(name):
        raise ImportError("libcudart.so.12: no such file\nand more")

    monkeypatch.setattr(device.importlib, "import_module", fail)
    assert status().reason.startswith("CuPy cannot be imported (libcudart.so.12: no such file); pip install")


def test_cupy_sees_no_device(gpu, monkeypatch):
    def fail():
        raise RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")

    monkeypatch.setattr(sys.modules["cupy"].cuda.runtime, "getDeviceCount", fail)
    assert status().reason.startswith("CuPy sees no CUDA device (cudaErrorInsufficientDriver: CUDA driver")
    monkeypatch.setattr(device, "_REASONS", {})
    monkeypatch.setattr(sys.modules["cupy"].cuda.runtime, "getDeviceCount", lambda: 0)
    assert status().reason == "CuPy sees no CUDA device"


def test_cupy_of_another_cuda_finds_no_compiler(gpu, monkeypatch):
    def fail():
        raise RuntimeError("CuPy failed to load libnvrtc.so.12: OSError")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(sys.modules["cupy"].cuda.nvrtc, "getVersion", fail)
    reason = status().reason
    assert "CuPy finds no NVRTC, the compiler of CUDA 12 (CuPy failed to load libnvrtc.so.12" in reason
    assert 'torch has CUDA 13.0; pip install "ccgpu[cuda13]"' in reason


def test_old_gpu_and_rocm_are_named(gpu, monkeypatch):
    gpu.capability = (7, 0)
    assert status().reason == "its kernels need compute capability 7.5, and this GPU has 7.0"
    monkeypatch.setattr(device, "_REASONS", {})
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in status().reason


def test_reasons_are_cached_for_each_device(gpu, monkeypatch):
    counted = []
    monkeypatch.setattr(device, "_find_reason", lambda index: counted.append(index))
    for index in (0, 1, 0, 1):
        assert device.why_not(Call(torch.device("cuda", index))) is None
    assert counted == [0, 1]


def test_fallback_from_the_kernels_is_logged_once(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "_REASONS", {})
    monkeypatch.setattr(numba_cuda, "simulated", lambda: True)
    dispatch._warn_once.cache_clear()
    on_cuda = types.SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32, shape=torch.Size((1, 8, 3, 4)))
    for _ in range(2):
        assert dispatch.choose(on_cuda, None, on_cuda).name == "torch"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "'cupy' cannot run, a slower one does: CuPy" in record.getMessage()
    caplog.clear()
    assert dispatch.choose(torch.zeros(1, 8, 3, 4)).name == "numba_cpu"
    assert not caplog.records
