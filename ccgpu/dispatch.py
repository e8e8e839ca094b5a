"""The backends of the op, in order of preference, and the choice among them.

A backend is a module with two functions, `forward(q, k, v, scale)` and
`backward(dout, q, k, v, out, lse, dlse, scale)`, a module with the two stages of the op (`affinity(q, k)`,
`aggregate(weights, v)` and its transpose `aggregate_transposed(weights, x)`), a `why_not(call)` that says why it cannot
run a call, or None, and a `suits(call)` that says whether it is worth while. The first one that suits a call and can
run it, runs. A backend asked for by name runs or raises; it is never replaced by another.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ccgpu import (
    bridge,
    cupy_device,
    cupy_lines,
    cupy_stages,
    numba_cpu_lines,
    numba_cuda_device,
    numba_cuda_lines,
    torch_lines,
    torch_stages,
)

ENVIRONMENT_VARIABLE = "CCGPU_BACKEND"
LOGGER = logging.getLogger("ccgpu")


class Call(NamedTuple):
    """What a backend may look at before it agrees to run a call."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    depth: int = 64  # channels of q and k; 0 in the two stages, which take any number
    channels: int = 512  # of v
    sizes: tuple[int, ...] = (97, 97)
    images: int = 1


class Backend(NamedTuple):
    """One way to compute the op."""

    name: str
    module: ModuleType
    stages: ModuleType
    why_not: Callable[[Call], str | None]
    description: str
    made_for: str | None = None  # the kind of device; None: any
    automatic: bool = True
    suits: Callable[[Call], bool] = lambda call: True  # whether it is the faster choice for a call that it can run


class BackendStatus(NamedTuple):
    """A line of `ccgpu.backends()`."""

    name: str
    available: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.name:<10} {'available' if self.available else 'unavailable':<12} {self.reason}"


def _only_cpu(call: Call) -> str | None:
    return None if call.device.type == "cpu" else f"it runs CPU tensors, and these are on {call.device}"


def _any_device(call: Call) -> str | None:
    if call.device.type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


BACKENDS = (
    Backend(
        "numba_cpu",
        numba_cpu_lines,
        numba_cpu_lines,
        numba_cpu_lines.why_not,
        "CPU kernels, compiled by Numba at the first call",
        "cpu",
        suits=numba_cpu_lines.suits,
    ),
    Backend(
        "cpu", torch_lines, torch_stages, _only_cpu, "torch's matrix products, line by line, for CPU tensors", "cpu"
    ),
    Backend(
        "cupy", cupy_lines, cupy_stages, cupy_device.why_not, "CUDA kernels, compiled by CuPy at the first call", "cuda"
    ),
    Backend(
        "numba_cuda",
        numba_cuda_lines,
        numba_cuda_lines,
        numba_cuda_device.why_not,
        "CUDA kernels in Python, compiled by Numba at the first call; on CPU tensors Numba's simulator, for tests",
        "cuda",
    ),
    Backend("torch", torch_lines, torch_stages, _any_device, "torch's matrix products, line by line, on any device"),
    Backend("reference", bridge, bridge, _only_cpu, "the NumPy definition: slow, for checking", "cpu", automatic=False),
)


def names() -> list[str]:
    """Return the names of all backends, in order of preference."""
    return [backend.name for backend in BACKENDS]


def check_name(name: str | None, function: str = "cca", argument: str = "backend") -> None:
    """Raise TypeError or ValueError unless name is None or the name of a backend."""
    if name is None or name in names():
        return
    if not isinstance(name, str):
        raise TypeError(
            f"{function}: {argument} must be a name or None, got {type(name).__name__}; use one of {names()}"
        )
    raise ValueError(
        f"{function}: {argument} must be one of {names()}, got {name!r}; leave it out for the first that can run"
    )


def choose(q: Tensor, name: str | None = None, v: Tensor | None = None, function: str = "cca") -> Backend:
    """Return the backend for a call: the named one, CCGPU_BACKEND's, or the first that can run.

    Args:
        q: queries (B, D, *S); for a stage, any of its maps.
        name: of a backend.
        v: values (B, C, *S); None for a stage, which takes any number of channels.
        function: which the messages name.

    Raises:
        ValueError: no backend of that name.
        RuntimeError: the named backend cannot run the call; the message says why, and which can.
    """
    source = "backend"
    if name is None:
        name = os.environ.get(ENVIRONMENT_VARIABLE) or None  # an empty variable is an unset one
        source = ENVIRONMENT_VARIABLE
    check_name(name, function, source)
    shape = q.shape
    depth, channels = (0, shape[1]) if v is None else (shape[1], v.shape[1])
    call = Call(q.device, q.dtype, depth, channels, shape[2:], shape[0])
    if name is None:
        return _first(call, function)
    backend = next(b for b in BACKENDS if b.name == name)
    reason = backend.why_not(call)
    if reason is not None:
        able = [b.name for b in BACKENDS if b.why_not(call) is None]
        raise RuntimeError(
            f"{function}: {source}={name!r} cannot run this call: {reason}; use one of {able} or leave it out"
        )
    return backend


def _first(call: Call, function: str) -> Backend:
    """Return the first backend that suits a call and can run it; warn if it takes the place of a faster one."""
    passed_over: list[tuple[str, str]] = []
    for backend in BACKENDS:
        if not backend.automatic or not backend.suits(call):
            continue
        reason = backend.why_not(call)
        if reason is None:
            if passed_over:
                _say_once(*passed_over[0])
            return backend
        if backend.made_for == call.device.type:
            passed_over.append((backend.name, reason))
    reasons = "; ".join(f"{b.name}: {b.why_not(call)}" for b in BACKENDS)
    raise RuntimeError(
        f"{function}: a backend must be able to run on {call.device}, got none ({reasons}); move the tensors"
    )


@functools.cache
def _say_once(name: str, reason: str) -> None:
    """Say that the first choice for this kind of device is passed over: the next ones are slower."""
    LOGGER.warning("ccgpu: backend %r cannot run, a slower one does: %s", name, reason)


def backends(
    device: str | torch.device | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    depth: int = 64,
    channels: int = 512,
    sizes: tuple[int, ...] = (97, 97),
) -> list[BackendStatus]:
    """List the backends in order of preference, each with the reason why it cannot run where it cannot.

    Args:
        device: the device of the tensors in question; by default the current CUDA device if there is one, else the CPU.
        dtype, depth, channels, sizes: the call in question: its dtype, the channels of q and k and those of v, the map.

    Returns:
        One `BackendStatus(name, available, reason)` a backend; an available one's reason says what it is.

    Examples:
        >>> import ccgpu
        >>> [b.name for b in ccgpu.backends("cpu") if b.available][0]
        'numba_cpu'
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    call = Call(torch.device(device), dtype, depth, channels, sizes)
    reasons = [(backend, backend.why_not(call)) for backend in BACKENDS]
    return [BackendStatus(b.name, why is None, b.description if why is None else why) for b, why in reasons]
