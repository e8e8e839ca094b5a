"""The backends of the op in order of preference, and the choice of one for a call.

A backend is a module of `ccgpu.bridges` (see `bridges.call.Bridge`). The first one that suits a call and can run it is
chosen. A backend that is asked for by name runs or raises; it is never replaced by another.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ccgpu.bridges import cupy_cuda, numba_cpu, numba_cuda, reference, torch_gemm
from ccgpu.bridges.call import Bridge, Call
from ccgpu.layouts import NAMES

ENVIRONMENT_VARIABLE = "CCGPU_BACKEND"
LOGGER = logging.getLogger("ccgpu")


class Backend(NamedTuple):
    """A way to compute the op: a module, and when it is chosen."""

    name: str
    module: Bridge
    description: str
    made_for: str | None = None  # a kind of device; None: any
    automatic: bool = True  # whether it is chosen without being named
    suits: Callable[[Call], bool] = lambda call: True  # whether it is faster than the next ones for a call
    arithmetic: Callable[[torch.dtype], str] | None = None  # names a dtype and how it is computed, where CPUs differ

    def why_not(self, call: Call) -> str | None:
        """Return why the backend cannot run a call, or None."""
        if self.made_for == "cpu" and call.device.type != "cpu":
            return f"it runs CPU tensors, and these are on {call.device}"
        return self.module.why_not(call)

    def what(self, dtype: torch.dtype) -> str:
        """Return what the backend is, for tensors of a dtype."""
        if self.arithmetic is None or dtype not in NAMES:
            return self.description
        return f"{self.description}: {self.arithmetic(dtype)}"


class BackendStatus(NamedTuple):
    """A line of `ccgpu.backends()`."""

    name: str
    available: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.name:<10} {'available' if self.available else 'unavailable':<12} {self.reason}"


BACKENDS = (
    Backend(
        "numba_cpu",
        numba_cpu,
        "CPU kernels, compiled by Numba at the first call",
        "cpu",
        arithmetic=numba_cpu.arithmetic,
    ),
    Backend("cpu", torch_gemm, "torch's matrix products, line by line, for CPU tensors", "cpu"),
    Backend("cupy", cupy_cuda, "CUDA kernels, compiled by CuPy at the first call", "cuda"),
    Backend(
        "numba_cuda",
        numba_cuda,
        "CUDA kernels in Python, compiled by Numba at the first call; on CPU tensors Numba's simulator, for tests",
        "cuda",
    ),
    Backend("torch", torch_gemm, "torch's matrix products, line by line, on any device"),
    Backend("reference", reference, "the NumPy definition: slow, for checking", "cpu", automatic=False),
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


def choose(
    q: Tensor, name: str | None = None, v: Tensor | None = None, function: str = "cca", *, whole: bool = True
) -> Backend:
    """Return the backend for a call: the named one, CCGPU_BACKEND's, or the first that suits it and can run it.

    Args:
        q: queries (B, D, *S); for a stage, any of its maps.
        name: name of a backend, or None.
        v: values (B, C, *S); None for a stage, which takes any number of channels.
        function: name of the function, for messages.
        whole: False if the lines of the call are a part of each criss-cross; see `Bridge`.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the named backend cannot run the call; the message says why, and which ones can.
    """
    source = "backend"
    if name is None:
        name = os.environ.get(ENVIRONMENT_VARIABLE) or None  # an empty variable is an unset one
        source = ENVIRONMENT_VARIABLE
    check_name(name, function, source)
    shape = q.shape
    depth, channels = (0, shape[1]) if v is None else (shape[1], v.shape[1])
    call = Call(q.device, q.dtype, depth, channels, shape[2:], shape[0], whole)
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
    """Return the first backend that suits a call and can run it; warn if a faster one cannot run."""
    passed_over: list[tuple[str, str]] = []
    for backend in BACKENDS:
        if not backend.automatic or not backend.suits(call):
            continue
        reason = backend.why_not(call)
        if reason is None:
            if passed_over:
                _warn_once(*passed_over[0])
            return backend
        if backend.made_for == call.device.type:
            passed_over.append((backend.name, reason))
    reasons = "; ".join(f"{b.name}: {b.why_not(call)}" for b in BACKENDS)
    raise RuntimeError(
        f"{function}: a backend must be able to run on {call.device}, got none ({reasons}); move the tensors"
    )


@functools.cache
def _warn_once(name: str, reason: str) -> None:
    """Warn that the first choice for this kind of device cannot run, and a slower one does."""
    LOGGER.warning("ccgpu: backend %r cannot run, a slower one does: %s", name, reason)


def backends(
    device: str | torch.device | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    depth: int = 64,
    channels: int = 512,
    sizes: tuple[int, ...] = (97, 97),
) -> list[BackendStatus]:
    """Return the backends in order of preference, with the reason of each that cannot run.

    Args:
        device: device of the tensors; None: the current CUDA device if there is one, else the CPU.
        dtype: dtype of the tensors.
        depth: channels of q and k.
        channels: channels of v.
        sizes: the map, (L,), (H, W) or (T, H, W).

    Returns:
        A `BackendStatus(name, available, reason)` for each backend; an available one's reason says what it is, and for
        `numba_cpu` which arithmetic the dtype gets on this CPU.

    Examples:
        >>> import ccgpu
        >>> [b.name for b in ccgpu.backends("cpu") if b.available][0]
        'numba_cpu'
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    call = Call(torch.device(device), dtype, depth, channels, sizes)
    reasons = [(backend, backend.why_not(call)) for backend in BACKENDS]
    return [BackendStatus(b.name, why is None, b.what(dtype) if why is None else why) for b, why in reasons]
