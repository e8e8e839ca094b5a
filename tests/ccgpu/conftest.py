"""A fake GPU: a module instead of CuPy, and torch.cuda patched to see two devices."""

import contextlib
import importlib.machinery
import sys
import threading
import time
import types
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from ccgpu.bridges import numba_cuda
from ccgpu.bridges.cupy_cuda import device
from ccgpu.bridges.cupy_cuda.launch import LAUNCHER, CuPyLauncher
from ccgpu.kernels.cuda.plans import ARGUMENT_BYTES

STATIC_LIMIT = 48 * 1024
OPTIN_LIMIT = 227 * 1024


@dataclass
class Run:
    """A launch that the fake device received."""

    name: str
    device: int
    stream: int
    grid: tuple
    block: tuple
    shared_bytes: int
    arguments: bytes
    thread: int


@dataclass
class FakeGpu:
    """The state of the fake devices: what they report, and a record of what ran on them."""

    capability: tuple = (9, 0)
    devices: int = 2
    compile_error: Exception | None = None
    compile_seconds: float = 0.0
    capturing: bool = False
    streams: dict = field(default_factory=lambda: {0: 0, 1: 0})
    compiled: list = field(default_factory=list)  # (entry, device, options)
    runs: list = field(default_factory=list)
    syncs: list = field(default_factory=list)
    local: threading.local = field(default_factory=threading.local)

    @property
    def current(self):
        """The CUDA runtime's current device, which each thread has its own of."""
        return getattr(self.local, "device", 0)

    @contextlib.contextmanager
    def device(self, device):
        """Replace torch.cuda.device."""
        index = device if isinstance(device, int) else device.index
        before, self.local.device = self.current, index
        try:
            yield
        finally:
            self.local.device = before

    def stream(self, device):
        """Replace torch.cuda.current_stream."""
        return types.SimpleNamespace(cuda_stream=self.streams[device.index])


class CompileException(Exception):
    """The exception of CuPy's compiler, which is not a RuntimeError."""


class Kernel:
    """A fake cupy.RawKernel, which runs on the device that loaded it only, and enforces the driver's limits."""

    def __init__(self, gpu, name):
        self._gpu, self._name, self._device = gpu, name, gpu.current
        self.max_dynamic_shared_size_bytes = STATIC_LIMIT

    def __call__(self, grid, block, args, *, shared_mem=0, stream=None):
        gpu = self._gpu
        assert gpu.current == self._device, "invalid device context"
        assert stream is not None, "CuPy's own current stream"
        assert 0 < grid[0] < 2**31
        assert all(0 < n <= 65535 for n in grid[1:])
        assert 0 < block[0] <= 1024
        assert shared_mem <= self.max_dynamic_shared_size_bytes <= OPTIN_LIMIT, "invalid argument"
        (argument,) = args
        # CuPy passes arrays of one element by value, and nothing else of this size.
        assert isinstance(argument, np.ndarray)
        assert argument.size == 1
        assert argument.nbytes == ARGUMENT_BYTES
        place = (self._name, gpu.current, stream.ptr, tuple(grid), tuple(block), shared_mem)
        gpu.runs.append(Run(*place, argument.tobytes(), threading.get_ident()))


def fake_cupy(gpu):
    """Return a module with the parts of CuPy that ccgpu uses."""
    cupy = types.ModuleType("cupy")
    cupy.__spec__ = importlib.machinery.ModuleSpec("cupy", None)

    class RawModule:
        def __init__(self, *, code, options=(), backend="nvrtc"):
            assert backend == "nvrtc"
            assert isinstance(options, tuple)
            self._code, self._options = code, options

        def get_function(self, name):
            if gpu.compile_error is not None:
                raise gpu.compile_error
            assert f"{name}(const __grid_constant__ Arguments a)" in self._code
            time.sleep(gpu.compile_seconds)
            gpu.compiled.append((name, gpu.current, self._options))
            return Kernel(gpu, name)

    class Device:
        def __init__(self, index):
            assert 0 <= index < gpu.devices
            self.id = index
            self.attributes = {
                "MaxSharedMemoryPerBlockOptin": OPTIN_LIMIT,
                "MultiProcessorCount": 132,
                "L2CacheSize": 50 * 2**20,
            }

    cupy.RawModule = RawModule
    cupy.cuda = types.SimpleNamespace(
        Device=Device,
        runtime=types.SimpleNamespace(getDeviceCount=lambda: gpu.devices, runtimeGetVersion=lambda: 12090),
        nvrtc=types.SimpleNamespace(getVersion=lambda: (12, 9)),
        compiler=types.SimpleNamespace(CompileException=CompileException),
    )
    return cupy


@pytest.fixture
def gpu(monkeypatch):
    """Two devices of compute capability 9.0, and a launcher that has compiled nothing."""
    fake = FakeGpu()
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(fake))
    monkeypatch.setattr(device, "_REASONS", {})
    monkeypatch.setattr(numba_cuda, "simulated", lambda: True)  # then it runs no CUDA tensors
    monkeypatch.setattr(LAUNCHER, "_kernels", {})
    monkeypatch.setattr(LAUNCHER, "_limits", {})
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: fake.current)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: fake.capability)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.capturing)
    monkeypatch.setattr(torch.cuda, "device", fake.device)
    monkeypatch.setattr(torch.cuda, "current_stream", fake.stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *a: fake.syncs.append(a))
    return fake


@pytest.fixture
def launcher(gpu):
    """A new launcher."""
    return CuPyLauncher()
