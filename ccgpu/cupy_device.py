"""Why the CUDA kernels cannot run a call, in words."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ccgpu.cupy_launch import LAUNCHER
from ccgpu.cupy_lines import NAMES
from ccgpu.kernels import configurations

if TYPE_CHECKING:
    from ccgpu.dispatch import Call

_REASONS: dict[int, str | None] = {}  # what stands against a device, found out once


def install_command() -> str:
    """Return the command that installs CuPy and numba-cuda for this torch's CUDA."""
    major = (torch.version.cuda or "12").split(".")[0]
    return f'pip install "ccgpu[cuda{major}]"'


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _library_reason(cupy: Any) -> str | None:
    """Return what is missing beside CuPy itself: a device, or the compiler."""
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


def _device_reason(index: int) -> str | None:
    if torch.version.hip is not None:
        return "it needs CUDA, and this torch is built for ROCm"
    try:
        cupy = importlib.import_module("cupy")
    except (ImportError, OSError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            return f"CuPy is not installed; {install_command()}"
        return f"CuPy cannot be imported ({first_line(error)}); {install_command()} gives the CuPy for this torch"
    return _library_reason(cupy)


def found_once(device: torch.device, reasons: dict[int, str | None], find: Callable[[int], str | None]) -> str | None:
    """Return what stands against a CUDA device, by `find` of its index, which `reasons` keeps."""
    index = device.index
    if index is None or index not in reasons:
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        index = torch.cuda.current_device() if index is None else index
        if index not in reasons:
            reasons[index] = find(index)
    return reasons[index]


def why_not(call: Call) -> str | None:
    """Return why the kernels cannot run a call, or None: where the tensors are, CuPy, the device, dtype, channels."""
    if call.device.type != "cuda":
        return f"it runs CUDA tensors, and these are on {call.device}"
    reason = found_once(call.device, _REASONS, _device_reason)
    if reason is not None:
        return reason
    if call.dtype not in NAMES:
        return f"it has no kernels for {call.dtype}"
    index = torch.cuda.current_device() if call.device.index is None else call.device.index
    return configurations.why_not(NAMES[call.dtype], call.depth, LAUNCHER.limits(torch.device("cuda", index)))
