"""Why the CUDA kernels cannot run a call: CuPy, its compiler, a device, its age, the dtype or the channels."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from ccgpu.bridges.call import Call, device_reason, first_line, install_command
from ccgpu.bridges.cupy_cuda.launch import LAUNCHER
from ccgpu.kernels.cuda import configurations
from ccgpu.layouts import NAMES

_REASONS: dict[int, str | None] = {}  # why a device is unavailable, by its index; None: usable


def _library_reason(cupy: Any) -> str | None:
    """Return what CuPy, which is installed, does not find: a device, or the compiler; None: it finds both."""
    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except RuntimeError as error:
        return f"CuPy sees no CUDA device ({first_line(error)}); {install_command()} gives the CuPy for this torch"
    if devices == 0:
        return "CuPy sees no CUDA device"
    try:
        cupy.cuda.nvrtc.getVersion()
    except (RuntimeError, OSError, ImportError) as error:
        built = cupy.cuda.runtime.runtimeGetVersion() // 1000
        return (
            f"CuPy finds no NVRTC, the compiler of CUDA {built} ({first_line(error)}), and torch has CUDA "
            f"{torch.version.cuda}; {install_command()} gives the CuPy for this torch"
        )
    return None


def _find_reason(index: int) -> str | None:
    """Return why a device is unavailable, or None."""
    if torch.version.hip is not None:
        return "it needs CUDA, and this torch is built for ROCm"
    try:
        cupy = importlib.import_module("cupy")
    except (ImportError, OSError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            return f"CuPy is not installed; {install_command()}"
        return f"CuPy cannot be imported ({first_line(error)}); {install_command()} gives the CuPy for this torch"
    return _library_reason(cupy)


def why_not(call: Call) -> str | None:
    """Return why the kernels cannot run a call (the tensors' device, CuPy, the GPU, dtype, channels), or None."""
    if call.device.type != "cuda":
        return f"it runs CUDA tensors, and these are on {call.device}"
    reason = device_reason(call.device, _REASONS, _find_reason)
    if reason is not None:
        return reason
    if call.dtype not in NAMES:
        return f"it has no kernels for {call.dtype}"
    index = torch.cuda.current_device() if call.device.index is None else call.device.index
    return configurations.why_not(NAMES[call.dtype], call.depth, LAUNCHER.limits(torch.device("cuda", index)))
