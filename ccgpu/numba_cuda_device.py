"""Why the Numba kernels cannot run a call, in words."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

import torch

from ccgpu.cupy_device import first_line, found_once, install_command

if TYPE_CHECKING:
    from ccgpu.dispatch import Call

SIMULATOR_VARIABLE = "NUMBA_ENABLE_CUDASIM"
DTYPES = (torch.float32, torch.float16, torch.float64)
_REASONS: dict[int, str | None] = {}  # what stands against a device, found out once


def simulated() -> bool:
    """Tell whether Numba's CUDA is its simulator, without importing Numba: it decides when it is imported."""
    numba: Any = sys.modules.get("numba")
    if hasattr(numba, "config"):
        return bool(numba.config.ENABLE_CUDASIM)
    value = os.environ.get(SIMULATOR_VARIABLE, "0")
    return value.isdigit() and int(value) != 0


def _device_reason(index: int) -> str | None:
    if torch.version.hip is not None:
        return "it needs CUDA, and this torch is built for ROCm"
    if importlib.util.find_spec("numba_cuda") is None:
        return f"numba-cuda is not installed; {install_command()}"
    try:
        cuda = importlib.import_module("numba.cuda")
        devices = len(cuda.gpus) if cuda.is_available() else 0
    except (ImportError, OSError, RuntimeError) as error:
        return f"numba-cuda cannot be used ({first_line(error)}); {install_command()} gives the one for this torch"
    if index >= devices:
        problem = str(cuda.cuda_error() or "").strip()  # of the driver
        why = f" ({problem.splitlines()[0]})" if problem else ""
        return f"Numba sees no CUDA device {index}{why}; {install_command()} gives the numba-cuda for this torch"
    return None


def why_not(call: Call) -> str | None:
    """Return why the kernels cannot run a call, or None: where the tensors are, numba-cuda, the device, the dtype."""
    if call.device.type == "cpu":
        if not simulated():
            return f"it runs CUDA tensors, and CPU tensors only in Numba's simulator ({SIMULATOR_VARIABLE}=1)"
    elif call.device.type != "cuda":
        return f"it runs CUDA tensors, and these are on {call.device}"
    elif simulated():
        return f"Numba runs in its simulator ({SIMULATOR_VARIABLE}), which takes CPU tensors"
    else:
        reason = found_once(call.device, _REASONS, _device_reason)
        if reason is not None:
            return reason
    return None if call.dtype in DTYPES else f"it has no kernels for {call.dtype}"
