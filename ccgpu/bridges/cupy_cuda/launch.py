"""Compile and launch the CUDA kernels with CuPy, on the tensors' device and torch's current stream.

A kernel is compiled once for each configuration and device, never for a new image size, and CuPy caches the machine
code on disk for later processes. A launch neither waits for the device nor allocates, so a CUDA graph can record it; a
compilation cannot be recorded. CuPy is imported at the first use.
"""

from __future__ import annotations

import logging
import threading
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ccgpu.interchange import address
from ccgpu.kernels.cuda.configurations import OPTIONS, Configuration, Limits, source
from ccgpu.kernels.cuda.plans import ARGUMENT_BYTES, Launch, Pointers

LOGGER = logging.getLogger("ccgpu")
STRUCT = np.dtype(f"V{ARGUMENT_BYTES}")  # CuPy passes an array of one element by value, whatever its size
DEFAULT_SHARED_BYTES = 48 * 1024  # for more, a kernel's attribute must be raised
ERROR_LINES = 8


class Launcher(Protocol):
    """What the bridge needs of a device; the tests put others in CuPy's place."""

    def limits(self, device: torch.device) -> Limits:
        """Return the device's limits, on which the choice of a configuration depends."""

    def launch(self, launches: tuple[Launch, ...], tensors: dict[str, Tensor], counters: Tensor, scale: float) -> None:
        """Run the launches in order; counters (launches, images + 1) are zeros, a row for each launch."""


class _Stream(NamedTuple):
    """torch's stream, with the one attribute that a launch of CuPy reads.

    None of CuPy's own classes fits: `ExternalStream` warns since CuPy 14, `Stream.from_external` is missing before, and
    a `Stream` may destroy the stream that it wraps.
    """

    ptr: int


class _Kernel(NamedTuple):
    """A compiled kernel with the block size and shared memory of its launches."""

    function: Any  # cupy.RawKernel
    block: tuple[int]
    shared_bytes: int


class CuPyLauncher:
    """Compiles configurations with NVRTC and launches them, from any thread."""

    def __init__(self) -> None:
        self._kernels: dict[tuple[int, Configuration], _Kernel] = {}
        self._limits: dict[int, Limits] = {}
        self._compiling = threading.Lock()

    def limits(self, device: torch.device) -> Limits:
        """Return a device's compute capability and the most shared memory of a block."""
        index = device.index
        try:
            return self._limits[index]
        except KeyError:
            import cupy

            shared_bytes = cupy.cuda.Device(index).attributes["MaxSharedMemoryPerBlockOptin"]
            limits = self._limits[index] = Limits(torch.cuda.get_device_capability(index), shared_bytes)
            return limits

    def compile(self, configuration: Configuration, device: torch.device) -> bool:
        """Compile a configuration for a device unless that has been done; return whether it was done now.

        Raises:
            RuntimeError: the kernel does not compile or load, or torch's stream is recording a CUDA graph.
        """
        key = device.index, configuration
        with self._compiling, torch.cuda.device(device):
            if key in self._kernels:
                return False
            name, target = configuration.entry, "sm_{}{}".format(*torch.cuda.get_device_capability(device))
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"cca: kernel {name} must be compiled before a CUDA graph is recorded, got its first call there; "
                    "call once before, or ccgpu.warmup.warmup in the same process"
                )
            LOGGER.info("ccgpu: compiling %s for %s (once; kept in CuPy's cache)", name, target)
            self._kernels[key] = _compile(configuration, target)
            return True

    def launch(self, launches: tuple[Launch, ...], tensors: dict[str, Tensor], counters: Tensor, scale: float) -> None:
        """Enqueue the launches on torch's current stream of the counters' device; compile new configurations first."""
        device = counters.device
        pointers = Pointers(**{name: address(tensor) for name, tensor in tensors.items()})
        row, row_bytes = address(counters), counters.shape[1] * counters.element_size()
        stream = _Stream(torch.cuda.current_stream(device).cuda_stream)
        with torch.cuda.device(device):  # the CUDA runtime's current device, so CuPy's too
            for launch in launches:
                key = device.index, launch.configuration
                kernel = self._kernels.get(key)
                if kernel is None:
                    self.compile(launch.configuration, device)
                    kernel = self._kernels[key]
                argument = np.ndarray((), STRUCT, launch.arguments(pointers, row, scale))
                kernel.function(
                    (launch.blocks,), kernel.block, (argument,), shared_mem=kernel.shared_bytes, stream=stream
                )
                row += row_bytes


def _compile(configuration: Configuration, target: str) -> _Kernel:
    """Compile a configuration for the current device, whose architecture `target` names."""
    import cupy

    try:
        module = cupy.RawModule(code=source(configuration), options=OPTIONS, backend="nvrtc")
        function = module.get_function(configuration.entry)
        if configuration.shared_bytes > DEFAULT_SHARED_BYTES:
            function.max_dynamic_shared_size_bytes = configuration.shared_bytes
    # NVRTC and the driver raise RuntimeErrors; a missing library raises one, an OSError or an ImportError.
    except (cupy.cuda.compiler.CompileException, RuntimeError, OSError, ImportError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()][:ERROR_LINES]
        if isinstance(error, cupy.cuda.compiler.CompileException):
            advice = "report it"
        else:
            advice = "see that CuPy finds NVRTC and can write its cache (CUPY_CACHE_DIR)"
        raise RuntimeError(
            f"cca: kernel {configuration.entry} must compile for {target}, got {type(error).__name__}; "
            f'{advice}; backend="torch" runs without kernels:\n' + "\n".join(lines)
        ) from error
    return _Kernel(function, (configuration.threads,), configuration.shared_bytes)


LAUNCHER = CuPyLauncher()
