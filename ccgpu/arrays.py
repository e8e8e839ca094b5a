"""Arrays of other libraries: `ccgpu.cca` takes them, computes on the same memory and returns their kind.

An entry of KINDS for each library. It is looked at only where an argument is no tensor, and only if its library is
imported already, so it costs calls with tensors nothing and imports nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ArrayKind(NamedTuple):
    """How arrays of a library become tensors and back, without a copy of their own."""

    module: str  # of the library
    type_name: str  # of its arrays, within the module
    stream: Callable[[Any], AbstractContextManager[Any]]  # makes the library's current stream torch's as well
    to_tensor: Callable[[Any], Tensor]
    from_tensor: Callable[[Tensor], Any]


def _cupy_stream(x: Any) -> AbstractContextManager[Any]:
    """Make CuPy's current stream on the array's device torch's: then neither library waits for the other."""
    cupy = sys.modules["cupy"]
    with x.device:
        pointer = cupy.cuda.get_current_stream().ptr
    device = torch.device("cuda", x.device.id)
    if pointer == 0:
        return torch.cuda.stream(torch.cuda.default_stream(device))
    return torch.cuda.stream(torch.cuda.ExternalStream(pointer, device))


def _cupy_to_tensor(x: Any) -> Tensor:
    # torch has no negative strides, so a reversed view is copied.
    return torch.from_dlpack(x.copy() if min(x.strides, default=0) < 0 else x)


def _cupy_from_tensor(x: Tensor) -> Any:
    return sys.modules["cupy"].from_dlpack(x)


KINDS = (ArrayKind("cupy", "ndarray", _cupy_stream, _cupy_to_tensor, _cupy_from_tensor),)


def _name(x: Any) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}"


def kind_of(function: str, **arguments: Any) -> ArrayKind | None:
    """Return the kind of the arguments, or None where none of them is of a known kind.

    Raises:
        TypeError: some are of a kind and others are not.
    """
    for kind in KINDS:
        library = sys.modules.get(kind.module)
        array_type = getattr(library, kind.type_name, None)
        if array_type is None:
            continue
        others = [name for name, x in arguments.items() if not isinstance(x, array_type)]
        if not others:
            return kind
        if len(others) < len(arguments):
            types = ", ".join(f"{name} {_name(x)}" for name, x in arguments.items())
            raise TypeError(
                f"{function}: {', '.join(arguments)} must be arrays of one kind, got {types}; "
                f"convert {' and '.join(others)} with {kind.module}.from_dlpack, or the others with torch.from_dlpack"
            )
    return None


def call(kind: ArrayKind, function: Callable[..., Any], *arrays: Any) -> Any:
    """Return function(*tensors) as arrays of the kind (one, or a tuple), on the library's stream, without autograd."""
    with kind.stream(arrays[0]), torch.no_grad():
        result = function(*(kind.to_tensor(x) for x in arrays))
        if isinstance(result, tuple):
            return tuple(kind.from_tensor(x) for x in result)
        return kind.from_tensor(result)
