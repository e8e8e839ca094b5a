"""Every crossing of an array's memory between torch, NumPy, CuPy and Numba; none copies what the other side can see.

Each function says why it takes its way. `python -m benchmarks.interchange` measures them.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ccgpu.kernels.array_checks import SameMemory, host_array

DLPACK_CPU = 1  # kDLCPU of DLPack's DLDeviceType


# Tensors to kernels ---------------------------------------------------------------------------------------------------


def numpy_view(x: Tensor) -> NDArray[Any]:
    """Return a CPU tensor's memory as an array: by torch's own method, the shortest way; DLPack takes twice as long."""
    return x.detach().numpy()


def address(x: Tensor) -> int:
    """Return the address of a tensor's first element.

    The CUDA kernels take a struct of addresses, so a launch makes no array objects; the tensors outlive it in torch's
    allocator, which reuses memory in the order of the stream.
    """
    return x.data_ptr()


def numba_array(x: Tensor) -> Any:
    """Return a CUDA tensor's memory as a Numba device array, by the CUDA array interface: Numba reads no DLPack.

    torch's interface names no stream, so Numba waits for none: the caller's launches are on torch's current stream.
    """
    return importlib.import_module("numba.cuda").as_cuda_array(x.detach())


def simulated_numba_array(x: Tensor, stream: Any = 0) -> Any:
    """Return a CPU tensor's memory as a device array of Numba's simulator, which wraps one of NumPy."""
    simulator = importlib.import_module("ccgpu.kernels.numba_cuda.simulator")
    return simulator.FakeCUDAArray(numpy_view(x), stream)


def cupy_array(x: Tensor) -> Any:
    """Return a CUDA tensor's memory as a CuPy array, by DLPack: the protocol that both libraries speak in C."""
    return sys.modules["cupy"].from_dlpack(x)


# Arrays to tensors ----------------------------------------------------------------------------------------------------


def from_numpy(x: NDArray[Any]) -> Tensor:
    """Return an array of ours as a tensor on its memory: by torch's own function, the shortest way."""
    return torch.from_numpy(x)


def from_any_numpy(x: NDArray[Any]) -> Tensor:
    """Return a user's array as a tensor: on its memory, or on a copy where torch cannot see it.

    torch refuses the other byte order, elements out of line and negative strides, and warns of read-only memory.
    """
    x = host_array(x)
    return torch.from_numpy(x.copy("K") if min(x.strides, default=0) < 0 else x)


def from_cupy(x: Any) -> Tensor:
    """Return a CuPy array as a tensor, by DLPack as above; a copy where strides are negative, which torch has not."""
    return torch.from_dlpack(x.copy() if min(x.strides, default=0) < 0 else x)


def numba_device(x: Any) -> torch.device:
    """Return the device of a Numba device array, which the CUDA array interface does not name."""
    return torch.device("cuda", x.gpu_data.context.device.id)


def from_numba(x: Any) -> Tensor:
    """Return a Numba device array as a tensor, by the CUDA array interface: Numba exports no DLPack.

    torch has no negative strides: it gets the memory from its lowest address on, and reverses a copy.
    """
    reversed_axes = [axis for axis, stride in enumerate(x.strides) if stride < 0 and x.size]
    pointer, _ = x.__cuda_array_interface__["data"]
    pointer += sum((x.shape[axis] - 1) * x.strides[axis] for axis in reversed_axes)
    strides = tuple(abs(stride) for stride in x.strides)
    memory = SameMemory(x, "__cuda_array_interface__", data=(pointer, False), strides=strides)
    tensor = torch.as_tensor(memory, device=numba_device(x))
    return tensor.flip(reversed_axes) if reversed_axes else tensor


def from_simulated_numba(x: Any) -> Tensor:
    """Return a device array of Numba's simulator as a CPU tensor: that of the NumPy array in it."""
    return from_any_numpy(np.asarray(x))


def from_exporter(x: Any) -> Tensor:
    """Return an array with `__dlpack__` as a tensor: all that is known of libraries that are not named above.

    Host memory goes through NumPy, which takes read-only arrays and negative strides: torch would end the process at
    the latter.

    Raises:
        ValueError: negative strides on a device.
        Exception: whatever the exporter raises, or torch of memory that it cannot use.
    """
    if x.__dlpack_device__()[0] != DLPACK_CPU:
        strides = getattr(x, "strides", None)
        if isinstance(strides, tuple) and min(strides, default=0) < 0:
            raise ValueError(f"torch has no negative strides, these are {strides}")
        return torch.from_dlpack(x)  # makes torch's stream wait for the exporter's, as the protocol demands
    try:
        array = np.from_dlpack(x)
    except (BufferError, RuntimeError):
        return torch.from_dlpack(x)  # bfloat16, which NumPy does not know
    return from_any_numpy(array)
