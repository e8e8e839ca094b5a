"""The choice of a backend: the first that can run, or the one asked for, never another."""

import ast
import subprocess
import sys
import types

import pytest
import torch

import ccgpu
from ccgpu import cupy_device, dispatch
from ccgpu.dispatch import Call

Q = torch.randn(1, 2, 3, 4)
META = torch.empty(1, 2, 3, 4, device="meta")


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
    assert dispatch.choose(META, v=META).name == "torch"


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


@pytest.mark.parametrize("name", ["cpu", "cupy", "reference"])
def test_named_backend_that_cannot_run_raises(name):
    with pytest.raises(
        RuntimeError, match=rf"affinity: backend='{name}' cannot run this call: .*on meta; use one of \['torch'\]"
    ):
        dispatch.choose(META, name, function="affinity")


def test_backends_lists_all_with_reasons(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cupy_device, "_REASONS", {0: "no such thing"})
    on_cpu, on_cuda = ccgpu.backends("cpu"), ccgpu.backends("cuda")
    assert [b.name for b in on_cpu] == [b.name for b in on_cuda] == ["cpu", "cupy", "torch", "reference"]
    assert [b.available for b in on_cpu] == [True, False, True, True]
    assert [b.available for b in on_cuda] == [False, False, True, False]
    assert "on cuda" in on_cuda[0].reason
    assert on_cuda[1].reason == "no such thing"
    assert "unavailable" in str(on_cuda[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cupy_device, "_REASONS", {})
    assert not any(b.available for b in ccgpu.backends("cuda"))
    assert "no CUDA device" in ccgpu.backends("cuda")[1].reason
    assert "no CUDA device" in ccgpu.backends("cuda")[2].reason


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
        dispatch.choose(META)


# The CUDA kernels, on a device that is not there ----------------------------------------------------------------------

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


def test_cupy_leaves_what_it_has_no_kernel_for(gpu):
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
    monkeypatch.setattr(cupy_device, "_REASONS", {})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert status().reason.endswith('"ccgpu[cuda13]"')


def test_cupy_cannot_be_imported(gpu, monkeypatch):
    def fail(name):
        raise ImportError("libcudart.so.12: no such file\nand more")

    monkeypatch.setattr(cupy_device.importlib, "import_module", fail)
    assert status().reason.startswith("CuPy cannot be imported (libcudart.so.12: no such file); pip install")


def test_cupy_sees_no_device(gpu, monkeypatch):
    def fail():
        raise RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")

    monkeypatch.setattr(sys.modules["cupy"].cuda.runtime, "getDeviceCount", fail)
    assert status().reason.startswith("CuPy sees no CUDA device (cudaErrorInsufficientDriver: CUDA driver")
    monkeypatch.setattr(cupy_device, "_REASONS", {})
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
    monkeypatch.setattr(cupy_device, "_REASONS", {})
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in status().reason


def test_reasons_are_found_out_once_for_each_device(gpu, monkeypatch):
    counted = []
    monkeypatch.setattr(cupy_device, "_device_reason", lambda index: counted.append(index))
    for index in (0, 1, 0, 1):
        assert cupy_device.why_not(Call(torch.device("cuda", index))) is None
    assert counted == [0, 1]


def test_passing_over_the_kernels_is_said_once(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cupy_device, "_REASONS", {})
    dispatch._say_once.cache_clear()
    on_cuda = types.SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32, shape=torch.Size((1, 8, 3, 4)))
    for _ in range(2):
        assert dispatch.choose(on_cuda, None, on_cuda).name == "torch"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "'cupy' cannot run, a slower one does: CuPy" in record.getMessage()
    caplog.clear()
    assert dispatch.choose(torch.zeros(1, 8, 3, 4)).name == "cpu"
    assert not caplog.records
