"""The compiled CPU kernels, kept on disk by Numba between processes.

Numba compiles a function anew when the file that it stands in has changed, or what is in its closure. These stand on
functions of other files, so a number for the text of all of them is in their closure.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import cfunc, from_dtype, njit

from ccgpu.kernels.numba_cpu import attention, lines, matrices, stages, tickets, vectors

LOGGER = logging.getLogger("ccgpu")


def _source() -> str:
    """Return a number for the text of all that the kernels are made of."""
    modules = (
        attention,
        lines,
        matrices,
        stages,
        tickets,
        vectors,
    )
    texts = (Path(str(module.__file__)).read_bytes() for module in modules)
    return hashlib.sha256(b"".join(texts)).hexdigest()


@functools.cache
def _say_once() -> None:
    LOGGER.info("ccgpu: the CPU kernels are compiled anew in each process: set NUMBA_CACHE_DIR to a writable folder")


def _kept(decorator: Callable[..., Any], *arguments: Any) -> Callable[[Callable[..., None]], Any]:
    """Return a decorator of Numba's that keeps the machine code on disk, if there is a place for it."""

    def decorate(function: Callable[..., None]) -> Any:
        options: dict[str, Any] = {"error_model": "numpy"}
        if decorator is njit:
            options["nogil"] = True
        try:
            return decorator(*arguments, **options, cache=True)(function)
        except RuntimeError:  # no folder that can be written to
            _say_once()
            return decorator(*arguments, **options)(function)

    return decorate


def _kernels(source: str) -> tuple[Any, ...]:
    """Return the kernels, each: the part of a call's groups that falls to a thread; see `numba_cpu_tickets`."""

    @_kept(njit)
    def forward(like: Any, phases: Any, counters: Any, memory: int, sizes: Any, *arguments: Any) -> None:
        source  # noqa: B018
        for axis, begin, end in tickets.tickets(phases, counters):
            attention.forward_groups(like, begin, end, memory, axis, sizes, *arguments)

    @_kept(njit)
    def backward(like: Any, phases: Any, counters: Any, memory: int, sizes: Any, *arguments: Any) -> None:
        source  # noqa: B018
        for axis, begin, end in tickets.tickets(phases, counters):
            attention.backward_groups(like, begin, end, memory, axis, sizes, *arguments)

    @_kept(njit)
    def affinity(like: Any, phases: Any, counters: Any, memory: int, sizes: Any, *arguments: Any) -> None:
        source  # noqa: B018
        for axis, begin, end in tickets.tickets(phases, counters):
            stages.affinity_groups(like, begin, end, memory, axis, sizes, *arguments)

    @_kept(njit)
    def aggregate(like: Any, phases: Any, counters: Any, memory: int, sizes: Any, *arguments: Any) -> None:
        source  # noqa: B018
        for axis, begin, end in tickets.tickets(phases, counters):
            stages.aggregate_groups(like, begin, end, memory, axis, sizes, *arguments)

    return forward, backward, affinity, aggregate


SOURCE = _source()
FORWARD, BACKWARD, AFFINITY, AGGREGATE = _kernels(SOURCE)
_large: dict[Any, list[Any]] = {}  # alive as long as their symbols
_compiling = threading.Lock()


def prepare(dtype: Any) -> None:
    """Make ready what the kernels of a dtype call by symbol: before the kernels are compiled or loaded."""
    if dtype in _large:
        return
    with _compiling:
        if dtype in _large:
            return
        LOGGER.info("ccgpu: loading the CPU kernels for %s; if Numba has none kept, it compiles them", np.dtype(dtype))
        kind, functions = from_dtype(np.dtype(dtype)), []
        for name, function in matrices.large_functions(SOURCE).items():
            compiled = _kept(cfunc, matrices.signature_of(name, kind))(function)
            matrices.make_known(name, kind, compiled)
            functions.append(compiled)
        _large[dtype] = functions
