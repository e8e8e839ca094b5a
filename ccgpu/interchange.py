"""How arrays cross between torch, NumPy, CuPy and Numba on the same memory: one function for each crossing.

Each function says why it takes its way; a copy is made only of memory that the other library cannot represent.
`python -m benchmarks.interchange` measures the crossings; docs/results/interchange.jsonl has the times.
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
    """Return a CPU tensor's memory as an array, by torch's own method: DLPack takes 1.8 times as long."""
    return x.detach().numpy()


def address(x: Tensor) -> int:
    """Return the address of a tensor's first element.

    A launch of the CUDA kernels passes a struct of addresses, which costs no array object. The tensors may be dropped
    once it is enqueued: torch's allocator reuses memory in the order of the stream.
    """
    return x.data_ptr()


def numba_array(x: Tensor) -> Any:
    """Return a CUDA tensor's memory as a Numba device array, by the CUDA array interface: Numba has no DLPack.

    torch's interface names no stream, so Numba waits for none. The caller launches on torch's current stream.
    """
    return importlib.import_module("numba.cuda").as_cuda_array(x.detach())


def simulated_numba_array(x: Tensor, stream: Any = 0) -> Any:
    """Return a CPU tensor's memory as a device array of Numba's simulator, which wraps a NumPy array."""
    simulator = importlib.import_module("ccgpu.kernels.numba_cuda.simulator")
    return simulator.FakeCUDAArray(numpy_view(x), stream)


def cupy_array(x: Tensor) -> Any:
    """Return a CUDA tensor's memory as a CuPy array, by DLPack, which both libraries implement in compiled code."""
    return sys.modules["cupy"].from_dlpack(x)


# Arrays to tensors ----------------------------------------------------------------------------------------------------


def from_numpy(x: NDArray[Any]) -> Tensor:
    """Return an array of our own kernels as a tensor, by torch's own function: DLPack takes twice as long."""
    return torch.from_numpy(x)


def from_any_numpy(x: NDArray[Any]) -> Tensor:
    """Return any array as a tensor, by the same function.

    torch refuses the other byte order, misaligned elements and negative strides, of which a copy is made, and warns of
    read-only memory, which is passed as a writable view.
    """
    x = host_array(x)
    return torch.from_numpy(x.copy("K") if min(x.strides, default=0) < 0 else x)


def from_cupy(x: Any) -> Tensor:
    """Return a CuPy array as a tensor, by DLPack; a copy if strides are negative, which torch does not have."""
    return torch.from_dlpack(x.copy() if min(x.strides, default=0) < 0 else x)


def numba_device(x: Any) -> torch.device:
    """Return the device of a Numba device array, which the CUDA array interface does not name."""
    return torch.device("cuda", x.gpu_data.context.device.id)


def from_numba(x: Any) -> Tensor:
    """Return a Numba device array as a tensor, by the CUDA array interface: Numba has no DLPack.

    torch has no negative strides: it gets the memory from the lowest address on, and `flip` makes a reversed copy.
    """
    reversed_axes = [axis for axis, stride in enumerate(x.strides) if stride < 0 and x.size]
    pointer, _ = x.__cuda_array_interface__["data"]
    pointer += sum((x.shape[axis] - 1) * x.strides[axis] for axis in reversed_axes)
    strides = tuple(abs(stride) for stride in x.strides)
    memory = SameMemory(x, "__cuda_array_interface__", data=(pointer, False), strides=strides)
    tensor = torch.as_tensor(memory, device=numba_device(x))
    return tensor.flip(reversed_axes) if reversed_axes else tensor


def from_simulated_numba(x: Any) -> Tensor:
    """Return a device array of Numba's simulator as a CPU tensor, on the NumPy array that it wraps."""
    return from_any_numpy(np.asarray(x))


def from_exporter(x: Any) -> Tensor:
    """Return an array of any other library as a tensor, by DLPack, the protocol that they share.

    Host memory goes through NumPy, which accepts read-only arrays and negative strides; at the latter torch would end
    the process.

    Raises:
        ValueError: the array is on a device and has negative strides.
        Exception: an error of the exporter, or of torch for memory that it cannot use.
    """
    if x.__dlpack_device__()[0] != DLPACK_CPU:
        strides = getattr(x, "strides", None)
        if isinstance(strides, tuple) and min(strides, default=0) < 0:
            raise ValueError(f"torch has no negative strides, these are {strides}")
        return torch.from_dlpack(x)  # makes torch's stream wait for the exporter's
    try:
        array = np.from_dlpack(x)
    except (BufferError, RuntimeError):
        return torch.from_dlpack(x)  # bfloat16, which NumPy does not have
    return from_any_numpy(array)
