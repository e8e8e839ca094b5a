"""Arrays of other libraries in `ccgpu.cca` and its stages, which return arrays of the same kind.

KINDS has an entry for each library, and a last one for any array with `__dlpack__`; `interchange` has the crossings.
Kinds are looked up only if an argument is no tensor, and no library is imported for it.

Arrays of a library that has `__dlpack__` and no `from_dlpack` give tensors:

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

from ccgpu import autocast, interchange
from ccgpu.kernels.array_checks import check_no_mask, type_name
from ccgpu.kernels.dtypes import DTYPES, NUMPY_DTYPES
from ccgpu.layouts import NAMES, energy_dtype

# Names of the dtypes of torch and NumPy that the op has: NumPy takes 2 us to find one.
_DTYPE_NAMES: dict[Any, str] = {**NAMES, **{np.dtype(name): name for name in NUMPY_DTYPES}}


class ArrayKind(NamedTuple):
    """How arrays of a library become tensors and back, and the words of messages about them.

    Attributes:
        owns: array -> whether it is of this kind.
        stream: function, arrays -> a context in which the arrays' stream is torch's current one.
        to_tensor: function, argument's name, array -> tensor; the first two are for messages.
        from_tensor: tensor, array of the kind -> the tensor as an array of the same kind and stream.
        importer: array -> the name of a function that converts other arrays to its kind; None: there is none.
        cast: argument's name, array, dtype -> an expression that converts the array to the dtype.
        has_view: whether arrays have `view(dtype)`: the interfaces have no bfloat16, which crosses as int16.
    """

    owns: Callable[[Any], bool]
    stream: Callable[[str, tuple[Any, ...]], AbstractContextManager[Any]]
    to_tensor: Callable[[str, str, Any], Tensor]
    from_tensor: Callable[[Tensor, Any], Any]
    importer: Callable[[Any], str | None]
    cast: Callable[[str, Any, str], str]
    has_view: bool


def _library(x: Any) -> str:
    """Return the name of the library that x's type comes from."""
    return type(x).__module__.partition(".")[0]


def _is_instance(x: Any, module: str, name: str) -> bool:
    """Return whether x has a type of this name of a module that may not be imported."""
    array_type = getattr(sys.modules.get(module), name, None)
    return array_type is not None and isinstance(x, array_type)


# Streams --------------------------------------------------------------------------------------------------------------


def _torch_stream(function: str, pointer: int, device: torch.device) -> Any:
    """Return the stream of a pointer as torch's; 0 is the legacy default stream."""
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"{function}: torch must see the CUDA device that the arrays are on, got a build or a process without "
            "CUDA; install torch with CUDA"
        )
    return torch.cuda.ExternalStream(pointer, device) if pointer else torch.cuda.default_stream(device)


def _no_stream(function: str, arrays: tuple[Any, ...]) -> AbstractContextManager[Any]:
    return nullcontext()


def _cupy_stream(function: str, arrays: tuple[Any, ...]) -> AbstractContextManager[Any]:
    """Make CuPy's current stream on the arrays' device torch's current one, so that neither library waits."""
    with arrays[-1].device:
        pointer = sys.modules["cupy"].cuda.get_current_stream().ptr
    return torch.cuda.stream(_torch_stream(function, pointer, torch.device("cuda", arrays[-1].device.id)))


@contextmanager
def _numba_stream(function: str, arrays: tuple[Any, ...]) -> Iterator[None]:
    """Make the last array's stream torch's current one; it waits for the other arrays' streams, and they for it."""
    pointers = dict.fromkeys(x.__cuda_array_interface__.get("stream") or 0 for x in reversed(arrays))
    device = interchange.numba_device(arrays[-1])
    stream, *others = (_torch_stream(function, pointer, device) for pointer in pointers)
    for other in others:
        stream.wait_stream(other)
    with torch.cuda.stream(stream):
        yield
    for other in others:
        other.wait_stream(stream)


# Crossings, and their words in messages -------------------------------------------------------------------------------


def _numpy_to_tensor(function: str, name: str, x: Any) -> Tensor:
    check_no_mask(name, x, function)
    return interchange.from_any_numpy(x)


def _numpy_cast(name: str, x: Any, dtype: str) -> str:
    return f"{name}.astype({'ml_dtypes' if dtype == 'bfloat16' else 'numpy'}.{dtype})"


def _numba_from_tensor(tensor: Tensor, like: Any) -> Any:
    with sys.modules["numba.cuda"].gpus[tensor.device.index]:
        return interchange.numba_array(tensor).bind(like.stream)


def _numba_cast(name: str, x: Any, dtype: str) -> str:
    return f"numba.cuda.to_device({_numpy_cast(f'{name}.copy_to_host()', x, dtype)})"


def _dlpack_maker(x: Any) -> tuple[str, Callable[[Any], Any]] | None:
    """Return name and function that make arrays of x's library out of tensors, or None where it has none."""
    namespace = x.__array_namespace__() if hasattr(x, "__array_namespace__") else None
    library = sys.modules.get(_library(x))
    for module in (namespace, library, getattr(library, "dlpack", None)):
        function = getattr(module, "from_dlpack", None)
        if function is not None:
            return f"{getattr(module, '__name__', _library(x))}.from_dlpack", function
    return None


def _dlpack_to_tensor(function: str, name: str, x: Any) -> Tensor:
    try:
        return interchange.from_exporter(x)
    except (AttributeError, BufferError, ImportError, RuntimeError, TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"{function}: {name} must be an array whose memory torch can share by __dlpack__, got {type_name(x)} "
            f"({error}); copy it into an array that exports its memory, or into a tensor"
        ) from error


def _dlpack_from_tensor(tensor: Tensor, like: Any) -> Any:
    found = _dlpack_maker(like)
    return tensor if found is None else found[1](tensor)


def _dlpack_importer(x: Any) -> str | None:
    found = _dlpack_maker(x)
    return None if found is None else found[0]


def _dlpack_cast(name: str, x: Any, dtype: str) -> str:
    if not hasattr(x, "__array_namespace__"):
        return f"{name} to {dtype} in {_library(x)}"
    namespace = getattr(x.__array_namespace__(), "__name__", _library(x))
    return f"{namespace}.astype({name}, {namespace}.{dtype})"


# Kinds ----------------------------------------------------------------------------------------------------------------

CUPY = ArrayKind(
    lambda x: _is_instance(x, "cupy", "ndarray"),
    _cupy_stream,
    lambda function, name, x: interchange.from_cupy(x),
    lambda tensor, like: interchange.cupy_array(tensor),
    lambda x: "cupy.asarray",
    lambda name, x, dtype: f"{name}.astype({'ml_dtypes' if dtype == 'bfloat16' else 'cupy'}.{dtype})",
    has_view=True,
)
NUMBA = ArrayKind(
    lambda x: _is_instance(x, "numba.cuda.cudadrv.devicearray", "DeviceNDArrayBase"),
    _numba_stream,
    lambda function, name, x: interchange.from_numba(x),
    _numba_from_tensor,
    lambda x: "numba.cuda.as_cuda_array or, from the host, numba.cuda.to_device",
    _numba_cast,
    has_view=True,
)
NUMBA_SIMULATED = ArrayKind(
    lambda x: _is_instance(x, "numba.cuda.simulator.cudadrv.devicearray", "FakeCUDAArray"),
    _no_stream,
    lambda function, name, x: interchange.from_simulated_numba(x),
    lambda tensor, like: interchange.simulated_numba_array(tensor, like.stream),
    lambda x: "numba.cuda.to_device",
    _numba_cast,
    has_view=True,
)
NUMPY = ArrayKind(
    lambda x: isinstance(x, np.ndarray),
    _no_stream,
    _numpy_to_tensor,
    lambda tensor, like: interchange.numpy_view(tensor),
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
    """Return the name of a function that converts other arrays to x's kind; None: there is none."""
    if isinstance(x, Tensor):
        return "torch.as_tensor or torch.from_dlpack"
    return None if kind is None else kind.importer(x)


def kind_of(function: str, **arguments: Any) -> ArrayKind | None:
    """Return the kind of the arguments, or None where all are tensors or no arrays.

    Raises:
        TypeError: the arguments are of several kinds, or of one in part.
    """
    if all(type(x) is np.ndarray for x in arguments.values()):  # the usual case, for which the rest takes 6 us
        return NUMPY
    groups: dict[tuple[ArrayKind | None, str], list[str]] = {}  # names of arguments by kind and library
    for name, x in arguments.items():
        kind = None if isinstance(x, Tensor) else next((kind for kind in KINDS if kind.owns(x)), None)
        is_any_library = kind in (None, DLPACK) and not isinstance(x, Tensor)
        groups.setdefault((kind, _library(x) if is_any_library else ""), []).append(name)
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


def _name(dtype: Any) -> str:
    """Return the name of a dtype of torch or NumPy."""
    name = _DTYPE_NAMES.get(dtype)
    if name is not None:
        return name
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else str(dtype.name)


def _check_float(function: str, kind: ArrayKind, name: str, x: Any, dtype: Any) -> None:
    """Raise TypeError unless the op computes in a dtype of torch or NumPy."""
    if _name(dtype) not in DTYPES:
        raise TypeError(
            f"{function}: {name} must be float32, bfloat16, float16 or float64, got {_name(dtype)}; convert it, "
            f"for example {kind.cast(name, x, 'float32')}"
        )


def _tensor(function: str, kind: ArrayKind, name: str, x: Any) -> Tensor:
    """Return an array's memory as a tensor."""
    dtype = getattr(x, "dtype", None)
    if isinstance(dtype, np.dtype):
        _check_float(function, kind, name, x, dtype)  # before a library refuses it in words of its own
        if kind.has_view and _name(dtype) == "bfloat16":
            return kind.to_tensor(function, name, x.view(np.int16)).view(torch.bfloat16)
    tensor = kind.to_tensor(function, name, x)
    _check_float(function, kind, name, x, tensor.dtype)
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
    """Return operation(*tensors) as arrays of the kind (one, or a tuple), computed on their stream.

    torch's autocast is for tensors: arrays are computed in their own dtype.

    Args:
        function: name of the public function, for messages.
        kind: kind of the arguments.
        operation: function of tensors on the arguments' memory.
        wide: name of the argument that may have the dtype of energies instead of the others'.
        arguments: arrays by name, in the order of the operation; results get the stream and the dtype of the last one.
    """
    arrays = tuple(arguments.values())
    with kind.stream(function, arrays):
        tensors = {name: _tensor(function, kind, name, x) for name, x in arguments.items()}
        _check_alike(function, kind, arguments, tensors, wide)
        with autocast.off(next(iter(tensors.values())).device.type):
            result = operation(*tensors.values())
        if isinstance(result, tuple):
            return tuple(_array(kind, x, arrays[-1]) for x in result)
        return _array(kind, result, arrays[-1])
