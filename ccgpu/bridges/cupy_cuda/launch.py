"""Compile and launch the CUDA kernels with CuPy, on the tensors' device and torch's current stream.

A kernel is compiled once for each configuration and device, never for a new image size, and CuPy caches the machine
code on disk for later processes. A launch neither waits for the device nor allocates, so a CUDA graph can record it; a
compilation cannot be recorded. CuPy is imported at the first use.

The environment variable CCGPU_CUDA_DEFINES sets macros of the kernels, for tests and measurements: NAME=VALUE,
separated by spaces, for example "CCGPU_WAIT_LIMIT=4000000".
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ccgpu.interchange import address
from ccgpu.kernels.compilation import told
from ccgpu.kernels.cuda.configurations import FOLDER, OPTIONS, Configuration, Limits, source
from ccgpu.kernels.cuda.plans import ARGUMENT_BYTES, Launch, Pointers

STRUCT = np.dtype(f"V{ARGUMENT_BYTES}")  # CuPy passes an array of one element by value, whatever its size
DEFAULT_SHARED_BYTES = 48 * 1024  # for more, a kernel's attribute must be raised
ERROR_LINES = 8
# The kernels' reads of global memory bypass L1, so shared memory gets all that the two share, in percent.
CARVEOUT = 100
DEFINES = "CCGPU_CUDA_DEFINES"


class Launcher(Protocol):
    """What the bridge needs of a device; the tests put others in CuPy's place."""

    def limits(self, device: torch.device) -> Limits:
        """Return the device's limits, on which the choice of a configuration depends."""

    def launch(self, launches: tuple[Launch, ...], tensors: dict[str, Tensor], counters: Tensor, scale: float) -> None:
        """Run the launches in order; counters (launches, `Launch.counters`) are zeros, a row for each."""


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


@lru_cache(maxsize=1)
def _macros() -> frozenset[str]:
    """Return the macros that the kernels' sources test: #ifdef NAME, #ifndef NAME, #if NAME ..."""
    conditions = (re.findall(r"^ *# *(?:el)?if(.*)", path.read_text(), re.M) for path in FOLDER.glob("*.cu*"))
    return frozenset(re.findall(r"\bCCGPU_\w+", " ".join(line for lines in conditions for line in lines)))


def compiler_options(defines: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return NVRTC's options for the kernels, with macros NAME=VALUE; None: those of CCGPU_CUDA_DEFINES.

    Raises:
        ValueError: no kernel tests such a macro, so it would change nothing.
    """
    words = os.environ.get(DEFINES, "").split() if defines is None else defines
    for word in words:
        if not re.fullmatch(r"\w+=-?\w+", word) or word.split("=")[0] not in _macros():
            raise ValueError(
                f"{DEFINES}: a definition must be NAME=VALUE with one of the kernels' macros, got {word!r}; "
                f"take one of {', '.join(sorted(_macros()))}"
            )
    return (*OPTIONS, *(f"-D{word}" for word in words))


class CuPyLauncher:
    """Compiles configurations with NVRTC and launches them, from any thread.

    `defines` are macros of the kernels, NAME=VALUE; None: those of the environment variable CCGPU_CUDA_DEFINES.
    """

    def __init__(self, defines: Sequence[str] | None = None) -> None:
        self._defines = defines
        self._kernels: dict[tuple[int, Configuration], _Kernel] = {}
        self._limits: dict[int, Limits] = {}
        self._compiling = threading.Lock()

    def limits(self, device: torch.device) -> Limits:
        """Return the properties of a device that decide which kernels it runs, and how."""
        index = device.index
        try:
            return self._limits[index]
        except KeyError:
            import cupy

            attributes = cupy.cuda.Device(index).attributes
            limits = self._limits[index] = Limits(
                capability=torch.cuda.get_device_capability(index),
                shared_bytes=attributes["MaxSharedMemoryPerBlockOptin"],
                multiprocessors=attributes["MultiProcessorCount"],
                l2_bytes=attributes["L2CacheSize"],
            )
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
            with told(f"CUDA kernel {name} for {target}, once for this machine; it is kept in CuPy's cache"):
                self._kernels[key] = _compile(configuration, target, compiler_options(self._defines))
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


def _compile(configuration: Configuration, target: str, options: tuple[str, ...]) -> _Kernel:
    """Compile a configuration for the current device, whose architecture `target` names."""
    import cupy

    try:
        module = cupy.RawModule(code=source(configuration), options=options, backend="nvrtc")
        function = module.get_function(configuration.entry)
        if configuration.shared_bytes > DEFAULT_SHARED_BYTES:
            function.max_dynamic_shared_size_bytes = configuration.shared_bytes
        function.preferred_shared_memory_carveout = CARVEOUT
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
