"""Checks of the plain arrays passed to `ccgpu.kernels`, their error messages, and conversions of their memory.

Every message has the form *function: argument must be X, got Y; do Z.*, in NumPy's terms.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ccgpu.kernels.dtypes import NUMPY_DTYPES, energy_dtype


class Description(NamedTuple):
    """Shape and dtype of an array on the host or a device."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class SameMemory:
    """An array's memory under a changed description, as an object with the array interface; keeps the array alive."""

    def __init__(self, owner: Any, interface: str, **changes: Any) -> None:
        """Describe the owner's memory by its `interface` (the attribute's name) with some entries changed."""
        self._owner = owner
        setattr(self, interface, {**getattr(owner, interface), **changes})


def type_name(x: Any) -> str:
    """Return the type of x as error messages name it."""
    return f"{type(x).__module__}.{type(x).__qualname__}"


def check_no_mask(name: str, x: Any, function: str) -> None:
    """Raise TypeError where x is a masked array: whatever computed on its memory would ignore the mask."""
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(
            f"{function}: {name} must be an array without a mask, got {type_name(x)}, whose mask would be ignored; "
            f"pass {name}.filled(0), or {name}.data to attend to masked values as well"
        )


def host_array(x: NDArray[Any]) -> NDArray[Any]:
    """Return x as a plain, aligned, writeable ndarray in native byte order: without a copy if possible.

    A read-only array becomes a writeable view, because compilers and torch reject read-only arrays or warn about them;
    no caller of this function writes to an argument.
    """
    x = np.asarray(x)  # the plain array of a subclass
    if not x.dtype.isnative:
        x = x.astype(x.dtype.newbyteorder("="))
    if not x.flags.aligned or any(stride % x.itemsize for stride in x.strides):
        x = x.copy("K")  # a field of a structured array, for example
    if not x.flags.writeable:
        pointer, _ = x.__array_interface__["data"]
        x = np.asarray(SameMemory(x, "__array_interface__", data=(pointer, False)))
    return x


def is_device_array(x: Any) -> bool:
    """Tell whether x is an array on a CUDA device, or one of the arrays that Numba's simulator has instead."""
    return hasattr(x, "__cuda_array_interface__") or getattr(x, "__cuda_ndarray__", False)


def describe(x: Any) -> Description:
    """Return the shape and the dtype of an array on the host or a device."""
    interface = getattr(x, "__cuda_array_interface__", None)
    if interface is None:
        return Description(tuple(x.shape), x.dtype)
    return Description(tuple(interface["shape"]), np.dtype(interface["typestr"]))


def check_place(function: str, arguments: dict[str, Any]) -> bool:
    """Return whether the arguments are device arrays; raise TypeError unless all are, or all are NumPy arrays."""
    for name, x in arguments.items():
        check_no_mask(name, x, function)
        if not (is_device_array(x) or isinstance(x, np.ndarray)):
            raise TypeError(
                f"{function}: {name} must be a numpy.ndarray or an array with __cuda_array_interface__, "
                f"got {type_name(x)}; convert it with numpy.asarray, or call ccgpu.cca, which takes more kinds"
            )
    on_device = [name for name, x in arguments.items() if is_device_array(x)]
    on_host = [name for name in arguments if name not in on_device]
    if on_device and on_host:
        raise TypeError(
            f"{function}: {', '.join(arguments)} must all be on the host or all on the device, "
            f"got {', '.join(on_host)} on the host; copy them with numba.cuda.to_device or cupy.asarray"
        )
    return bool(on_device)


def _check_like(name: str, x: Any, wanted: Description, reason: str, function: str) -> None:
    """Raise ValueError or TypeError unless x has the wanted shape and dtype; `reason` names whose they are."""
    shape, dtype = describe(x)
    if shape != wanted.shape:
        raise ValueError(
            f"{function}: {name} must have {reason} shape {wanted.shape}, got {shape}; pass it as it was computed"
        )
    if dtype.name != wanted.dtype.name:  # the byte order is free
        raise TypeError(
            f"{function}: {name} must have {reason} dtype {wanted.dtype.name}, got {dtype.name}; "
            f"convert it, for example {name}.astype(numpy.{wanted.dtype.name})"
        )


def check_maps(function: str, q: Any, k: Any, v: Any) -> tuple[Description, Description]:
    """Return the descriptions of q and v; raise TypeError or ValueError unless q, k (B, D, *S), v (B, C, *S) match."""
    described = {"q": describe(q), "k": describe(k), "v": describe(v)}
    for name, (_, dtype) in described.items():
        if dtype.name not in NUMPY_DTYPES:
            raise TypeError(
                f"{function}: {name} must be float32, float16 or float64, got {dtype.name}; "
                f"convert it, for example {name}.astype(numpy.float32)"
            )
    (shape, dtype), (_, _), (v_shape, _) = described.values()
    if len(shape) not in (3, 4, 5):
        raise ValueError(
            f"{function}: q must be (B, D, L), (B, D, H, W) or (B, D, T, H, W), got {len(shape)} axes {shape}; "
            "add or flatten axes so that one to three spatial axes follow batch and channels"
        )
    _check_like("k", k, described["q"], "q's", function)
    if len(v_shape) != len(shape) or v_shape[0] != shape[0] or v_shape[2:] != shape[2:]:
        wanted = ", ".join(str(n) for n in (shape[0], "C", *shape[2:]))
        raise ValueError(
            f"{function}: v must have q's batch and map size ({wanted}), got {v_shape}; only the channels C are free"
        )
    if 0 in (*shape[1:], v_shape[1]):
        raise ValueError(
            f"{function}: q, k and v must have at least one channel and one position, got {shape} and {v_shape}; "
            "only the batch may be empty"
        )
    _check_like("v", v, Description(v_shape, dtype), "q's", function)
    return described["q"], described["v"]


def check_results(function: str, q: Description, v: Description, arguments: dict[str, Any]) -> Description:
    """Return the description of lse; raise ValueError or TypeError unless lse and dlse match it, and out and dout v."""
    energies = Description((q.shape[0], *q.shape[2:]), energy_dtype(q.dtype))
    for name, x in arguments.items():
        if name in ("out", "dout"):
            _check_like(name, x, v, "v's", function)
        else:
            _check_like(name, x, energies, "the log-sum-exp's", function)
    return energies


def check_scale(scale: float, function: str) -> float:
    """Return scale as a float; raise TypeError or ValueError unless it is a finite number."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(
            f"{function}: scale must be a number, got {type(scale).__name__}; pass a float, "
            "or multiply q by it before the call"
        )
    if not -math.inf < scale < math.inf:  # torch.compile knows no isfinite of a number it traces
        raise ValueError(f"{function}: scale must be finite, got {scale}; the paper uses 1.0")
    return float(scale)


def check_stream(stream: Any, on_device: bool, function: str) -> int:
    """Return the address of a CUDA stream; raise TypeError or ValueError unless it is one, or 0 for host arrays."""
    if isinstance(stream, bool) or not hasattr(stream, "__int__"):
        raise TypeError(
            f"{function}: stream must be the address of a CUDA stream, got {type_name(stream)}; "
            "pass an integer, for example stream.ptr of CuPy or stream.cuda_stream of torch"
        )
    address = int(stream)
    if address < 0 or (address and not on_device):
        raise ValueError(
            f"{function}: stream must be {'an address' if on_device else '0 for arrays on the host'}, got {address}; "
            "leave it out"
        )
    return address
