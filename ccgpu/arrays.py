"""Arrays of other libraries: `ccgpu.cca` and its stages take them, compute on the same memory and return their kind.

An entry of KINDS for each library, and a last one for whatever speaks DLPack. They are looked at only where an argument
is no tensor, and only if the library is imported already, so they cost calls with tensors nothing and import nothing.

An exporter that has no importer (a library without `from_dlpack`) gets tensors back:

    Examples:
        >>> import types, numpy, torch, ccgpu
        >>> q = numpy.zeros((1, 2, 3, 4))
        >>> exporter = types.SimpleNamespace(__dlpack__=q.__dlpack__, __dlpack_device__=q.__dlpack_device__)
        >>> type(ccgpu.cca(exporter, exporter, exporter))
        <class 'torch.Tensor'>
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ccgpu.kernels.array_checks import SameMemory, check_no_mask, host_array, type_name
from ccgpu.kernels.dtypes import DTYPES
from ccgpu.layouts import energy_dtype

DLPACK_CPU = 1  # kDLCPU of DLPack's DLDeviceType


class ArrayKind(NamedTuple):
    """How arrays of a library become tensors and back, without a copy of their own."""

    owns: Callable[[Any], bool]
    stream: Callable[[str, tuple[Any, ...]], AbstractContextManager[Any]]  # makes the arrays' stream torch's as well
    to_tensor: Callable[[str, str, Any], Tensor]  # of a function and an argument's name, for messages, and its array
    from_tensor: Callable[[Tensor, Any], Any]  # of a tensor and an array of the kind that the result is to be
    importer: Callable[[Any], str | None]  # what other arrays are converted with to be of an array's kind
    cast: Callable[[str, Any, str], str]  # of a name, its array and a dtype: the words that convert it
    has_view: bool  # x.view(dtype): bfloat16, which the interfaces have no word for, crosses as int16


def _library(x: Any) -> str:
    return type(x).__module__.partition(".")[0]


def _is_instance(x: Any, module: str, name: str) -> bool:
    """Tell whether x is of a type of a module that may not be there."""
    array_type = getattr(sys.modules.get(module), name, None)
    return array_type is not None and isinstance(x, array_type)


def _torch_stream(function: str, pointer: int, device: torch.device) -> Any:
    """Return the stream of a pointer as torch's; 0 is the legacy default stream."""
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"{function}: torch must see the CUDA device that the arrays are on, got a build or a process without "
            "CUDA; install torch with CUDA"
        )
    return torch.cuda.ExternalStream(pointer, device) if pointer else torch.cuda.default_stream(device)


# NumPy ----------------------------------------------------------------------------------------------------------------


def _no_stream(function: str, arrays: tuple[Any, ...]) -> AbstractContextManager[Any]:
    return nullcontext()


def _host_tensor(x: Any) -> Tensor:
    x = host_array(x)
    return torch.from_numpy(x.copy("K") if min(x.strides, default=0) < 0 else x)  # torch has no negative strides


def _numpy_to_tensor(function: str, name: str, x: Any) -> Tensor:
    check_no_mask(name, x, function)
    return _host_tensor(x)


def _numpy_cast(name: str, x: Any, dtype: str) -> str:
    return f"{name}.astype({'ml_dtypes' if dtype == 'bfloat16' else 'numpy'}.{dtype})"


# CuPy -----------------------------------------------------------------------------------------------------------------


def _cupy_stream(function: str, arrays: tuple[Any, ...]) -> AbstractContextManager[Any]:
    """Make CuPy's current stream on the arrays' device torch's: then neither library waits for the other."""
    with arrays[-1].device:
        pointer = sys.modules["cupy"].cuda.get_current_stream().ptr
    return torch.cuda.stream(_torch_stream(function, pointer, torch.device("cuda", arrays[-1].device.id)))


def _cupy_to_tensor(function: str, name: str, x: Any) -> Tensor:
    return torch.from_dlpack(x.copy() if min(x.strides, default=0) < 0 else x)  # torch has no negative strides


# Numba ----------------------------------------------------------------------------------------------------------------


def _numba_device(x: Any) -> torch.device:
    return torch.device("cuda", x.gpu_data.context.device.id)


@contextmanager
def _numba_stream(function: str, arrays: tuple[Any, ...]) -> Iterator[None]:
    """Make the last array's stream torch's, after what the others' streams hold, and those wait for it in turn."""
    pointers = dict.fromkeys(x.__cuda_array_interface__.get("stream") or 0 for x in reversed(arrays))
    stream, *others = (_torch_stream(function, pointer, _numba_device(arrays[-1])) for pointer in pointers)
    for other in others:
        stream.wait_stream(other)
    with torch.cuda.stream(stream):
        yield
    for other in others:
        other.wait_stream(stream)


def _numba_to_tensor(function: str, name: str, x: Any) -> Tensor:
    # torch has no negative strides: it sees the memory from its lowest address on, and turns a copy round.
    turned = [axis for axis, stride in enumerate(x.strides) if stride < 0 and x.size]
    pointer, _ = x.__cuda_array_interface__["data"]
    pointer += sum((x.shape[axis] - 1) * x.strides[axis] for axis in turned)
    strides = tuple(abs(stride) for stride in x.strides)
    memory = SameMemory(x, "__cuda_array_interface__", data=(pointer, False), strides=strides)
    tensor = torch.as_tensor(memory, device=_numba_device(x))
    return tensor.flip(turned) if turned else tensor


def _numba_from_tensor(tensor: Tensor, like: Any) -> Any:
    cuda = sys.modules["numba.cuda"]
    with cuda.gpus[tensor.device.index]:
        return cuda.as_cuda_array(tensor).bind(like.stream)


def _numba_cast(name: str, x: Any, dtype: str) -> str:
    return f"numba.cuda.to_device({_numpy_cast(f'{name}.copy_to_host()', x, dtype)})"


# In Numba's simulator (NUMBA_ENABLE_CUDASIM=1) a device array is a wrapper around one of NumPy.


def _simulated_to_tensor(function: str, name: str, x: Any) -> Tensor:
    return _host_tensor(np.asarray(x))


def _simulated_from_tensor(tensor: Tensor, like: Any) -> Any:
    return type(like)(tensor.numpy(), stream=like.stream)


# DLPack ---------------------------------------------------------------------------------------------------------------


def _from_dlpack(x: Any) -> tuple[str, Callable[[Any], Any]] | None:
    """Return the name and the function that makes arrays of x's library of tensors, or None where it has none."""
    namespace = x.__array_namespace__() if hasattr(x, "__array_namespace__") else None
    library = sys.modules.get(_library(x))
    for module in (namespace, library, getattr(library, "dlpack", None)):
        function = getattr(module, "from_dlpack", None)
        if function is not None:
            return f"{getattr(module, '__name__', _library(x))}.from_dlpack", function
    return None


def _share(x: Any) -> Tensor:
    """Return the memory of an exporter as a tensor. torch would end the process at a negative stride."""
    if x.__dlpack_device__()[0] != DLPACK_CPU:
        strides = getattr(x, "strides", None)
        if isinstance(strides, tuple) and min(strides, default=0) < 0:
            raise ValueError(f"torch has no negative strides, these are {strides}")
        return torch.from_dlpack(x)  # orders the exporter's stream before torch's, as the protocol has it
    try:
        array = np.from_dlpack(x)
    except (BufferError, RuntimeError):
        return torch.from_dlpack(x)  # bfloat16, which NumPy does not know
    return _host_tensor(array)


def _dlpack_to_tensor(function: str, name: str, x: Any) -> Tensor:
    try:
        return _share(x)
    except (AttributeError, BufferError, ImportError, RuntimeError, TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"{function}: {name} must be an array whose memory torch can share by __dlpack__, got {type_name(x)} "
            f"({error}); copy it into an array that exports its memory, or into a tensor"
        ) from error


def _dlpack_from_tensor(tensor: Tensor, like: Any) -> Any:
    found = _from_dlpack(like)
    return tensor if found is None else found[1](tensor)


def _dlpack_importer(x: Any) -> str | None:
    found = _from_dlpack(x)
    return None if found is None else found[0]


def _dlpack_cast(name: str, x: Any, dtype: str) -> str:
    if not hasattr(x, "__array_namespace__"):
        return f"{name} to {dtype} in {_library(x)}"
    namespace = getattr(x.__array_namespace__(), "__name__", _library(x))
    return f"{namespace}.astype({name}, {namespace}.{dtype})"


CUPY = ArrayKind(
    lambda x: _is_instance(x, "cupy", "ndarray"),
    _cupy_stream,
    _cupy_to_tensor,
    lambda tensor, like: sys.modules["cupy"].from_dlpack(tensor),
    lambda x: "cupy.asarray",
    lambda name, x, dtype: f"{name}.astype({'ml_dtypes' if dtype == 'bfloat16' else 'cupy'}.{dtype})",
    has_view=True,
)
NUMBA = ArrayKind(
    lambda x: _is_instance(x, "numba.cuda.cudadrv.devicearray", "DeviceNDArrayBase"),
    _numba_stream,
    _numba_to_tensor,
    _numba_from_tensor,
    lambda x: "numba.cuda.as_cuda_array or, from the host, numba.cuda.to_device",
    _numba_cast,
    has_view=True,
)
NUMBA_SIMULATED = ArrayKind(
    lambda x: _is_instance(x, "numba.cuda.simulator.cudadrv.devicearray", "FakeCUDAArray"),
    _no_stream,
    _simulated_to_tensor,
    _simulated_from_tensor,
    lambda x: "numba.cuda.to_device",
    _numba_cast,
    has_view=True,
)
NUMPY = ArrayKind(
    lambda x: isinstance(x, np.ndarray),
    _no_stream,
    _numpy_to_tensor,
    lambda tensor, like: tensor.numpy(),
    lambda x: "numpy.asarray",
    _numpy_cast,
    has_view=True,
)
DLPACK = ArrayKind(
    lambda x: hasattr(x, "__dlpack__"),
    _no_stream,
    _dlpack_to_tensor,
    _dlpack_from_tensor,
    _dlpack_importer,
    _dlpack_cast,
    has_view=False,
)
# Numba before NumPy: its mapped and managed arrays are ndarrays too. DLPack last: the others export it as well.
KINDS = (CUPY, NUMBA, NUMBA_SIMULATED, NUMPY, DLPACK)


def _importer(kind: ArrayKind | None, x: Any) -> str | None:
    """Return what other arrays are converted with to be of the kind of x, or None where there is nothing."""
    if isinstance(x, Tensor):
        return "torch.as_tensor or torch.from_dlpack"
    return None if kind is None else kind.importer(x)


def kind_of(function: str, **arguments: Any) -> ArrayKind | None:
    """Return the kind of the arguments, or None where none of them is of a kind: tensors, and what nobody takes.

    Raises:
        TypeError: some are of a kind and others are not.
    """
    groups: dict[tuple[ArrayKind | None, str], list[str]] = {}  # the names of the arguments of a kind and library
    for name, x in arguments.items():
        kind = None if isinstance(x, Tensor) else next((kind for kind in KINDS if kind.owns(x)), None)
        told_apart = kind in (None, DLPACK) and not isinstance(x, Tensor)
        groups.setdefault((kind, _library(x) if told_apart else ""), []).append(name)
    kinds = [kind for kind, _ in groups]
    if not any(kinds):
        return None
    if len(kinds) == 1:
        return kinds[0]
    types = ", ".join(f"{name} {type_name(x)}" for name, x in arguments.items())
    importers = ((names, _importer(kind, arguments[names[0]])) for (kind, _), names in groups.items())
    ways = ", or ".join(
        f"{' and '.join(name for name in arguments if name not in names)} with {importer}"
        for names, importer in importers
        if importer is not None
    )
    raise TypeError(
        f"{function}: {', '.join(arguments)} must be arrays of one kind, got {types}; "
        f"convert {ways or 'all with torch.from_dlpack'}"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_float(function: str, kind: ArrayKind, name: str, x: Any, dtype: str) -> None:
    """Raise TypeError unless a dtype, by its name, is one that the op computes in."""
    if dtype not in DTYPES:
        raise TypeError(
            f"{function}: {name} must be float32, bfloat16, float16 or float64, got {dtype}; convert it, "
            f"for example {kind.cast(name, x, 'float32')}"
        )


def _tensor(function: str, kind: ArrayKind, name: str, x: Any) -> Tensor:
    """Return an array's memory as a tensor."""
    dtype = getattr(x, "dtype", None)
    if isinstance(dtype, np.dtype):
        _check_float(function, kind, name, x, dtype.name)  # before a library refuses it in words of its own
        if kind.has_view and dtype.name == "bfloat16":
            return kind.to_tensor(function, name, x.view(np.int16)).view(torch.bfloat16)
    tensor = kind.to_tensor(function, name, x)
    _check_float(function, kind, name, x, _name(tensor.dtype))
    return tensor


def _array(kind: ArrayKind, x: Tensor, like: Any) -> Any:
    """Return a tensor's memory as an array of the kind, on the stream of `like`."""
    if kind.has_view and x.dtype == torch.bfloat16:
        return kind.from_tensor(x.view(torch.int16), like).view(like.dtype)
    return kind.from_tensor(x, like)


def _check_alike(
    function: str, kind: ArrayKind, arguments: dict[str, Any], tensors: dict[str, Tensor], wide: str
) -> None:
    """Raise TypeError or ValueError unless the arrays share dtype and device, in the caller's words."""
    first = next(name for name in tensors if name != wide)
    dtype, device = tensors[first].dtype, tensors[first].device
    for name, x in tensors.items():
        wanted = (dtype, energy_dtype(dtype)) if name == wide else (dtype,)
        if x.dtype not in wanted:
            raise TypeError(
                f"{function}: {name} must have {first}'s dtype {' or '.join(map(_name, dict.fromkeys(wanted)))}"
                f"{', that of energies,' if len(set(wanted)) > 1 else ','} got {_name(x.dtype)}; convert one of them, "
                f"for example {kind.cast(name, arguments[name], _name(dtype))}"
            )
        if x.device != device:
            raise ValueError(
                f"{function}: {name} must be on {first}'s device {device}, got {x.device}; copy it there first"
            )


def call(function: str, kind: ArrayKind, operation: Callable[..., Any], wide: str = "", **arguments: Any) -> Any:
    """Return operation(*tensors) as arrays of the kind (one, or a tuple), on their stream, without autograd.

    torch's autocast is for tensors: arrays are computed in their own dtype. `wide` is the argument that may have the
    dtype of energies. Results are like the last argument, which has their dtype.
    """
    arrays = tuple(arguments.values())
    with kind.stream(function, arrays), torch.no_grad():
        tensors = {name: _tensor(function, kind, name, x) for name, x in arguments.items()}
        _check_alike(function, kind, arguments, tensors, wide)
        with torch.autocast(next(iter(tensors.values())).device.type, enabled=False):
            result = operation(*tensors.values())
        if isinstance(result, tuple):
            return tuple(_array(kind, x, arrays[-1]) for x in result)
        return _array(kind, result, arrays[-1])
