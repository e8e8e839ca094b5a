"""The compiled CPU kernels, which Numba caches on disk for later processes.

Numba compiles a function anew when the file that defines it, or the contents of its closure, have changed. The kernels
call functions of other files, which Numba does not look at, so a hash of all these files is in their closure. A file of
the cache that is damaged, by a full disk or a machine that was switched off, is replaced.
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
from numba.core.caching import FunctionCache

from ccgpu.kernels.numba_cpu import attention, lines, matrices, stages, tickets, vectors

LOGGER = logging.getLogger("ccgpu")


def _source() -> str:
    """Return a hash of the files whose functions the kernels call."""
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
def _log_no_cache() -> None:
    LOGGER.info("ccgpu: the CPU kernels are compiled anew in each process: set NUMBA_CACHE_DIR to a writable folder")


class _Cache(FunctionCache):
    """Numba's cache on disk of one function; damaged files count as none, and are replaced."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the compiled code for a signature; None where there is none that can be read."""
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # Numba unpickles its files, which can raise anything
            _forget(self, error)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Save the compiled code for a signature; a full disk is no reason not to use it."""
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _warn_not_saved(self, error)


def _warn_not_saved(cache: FunctionCache, error: OSError) -> None:
    LOGGER.warning("ccgpu: a compiled CPU kernel cannot be saved in %s (%s)", cache.cache_path, error)


def _forget(cache: FunctionCache, error: Exception) -> None:
    """Replace the index of a function's cache by an empty one, so that the function is compiled and saved anew."""
    LOGGER.warning("ccgpu: compiling a CPU kernel anew, since its cache in %s is damaged (%r)", cache.cache_path, error)
    try:
        cache.flush()
    except OSError:  # read-only: the function is compiled in each process
        cache.disable()


def _cached(decorator: Callable[..., Any], *arguments: Any) -> Callable[[Callable[..., None]], Any]:
    """Return Numba's decorator, `njit` or `cfunc`, with a cache on disk where some folder can be written to."""

    def decorate(function: Callable[..., None]) -> Any:
        options: dict[str, Any] = {"error_model": "numpy"}
        if decorator is njit:
            options["nogil"] = True
        try:
            cache = _Cache(function)
        except RuntimeError:  # no folder can be written to
            _log_no_cache()
            return decorator(*arguments, **options)(function)
        if decorator is njit:
            compiled = njit(**options)(function)
            compiled._cache = cache  # as its method enable_caching does with Numba's own class
            return compiled
        try:  # a callback is compiled here, with Numba's own class
            return decorator(*arguments, **options, cache=True)(function)
        except OSError as error:
            _warn_not_saved(cache, error)
            return decorator(*arguments, **options)(function)
        except Exception as error:  # of the cache; one of the function itself comes again
            _forget(cache, error)
            return decorator(*arguments, **options, cache=True)(function)

    return decorate


def _kernels(source: str) -> tuple[Any, ...]:
    """Return the kernels. Each computes one thread's part of a call: the groups whose tickets it takes (tickets.py)."""

    @_cached(njit)
    def forward(like: Any, phases: Any, counters: Any, memory: int, sizes: Any, *arguments: Any) -> None:
        source  # noqa: B018
        for axis, begin, end in tickets.tickets(phases, counters):
            attention.forward_groups(like, begin, end, memory, axis, sizes, *arguments)

    @_cached(njit)
    def backward(like: Any, phases: Any, counters: Any, memory: int, sizes: Any, *arguments: Any) -> None:
        source  # noqa: B018
        for axis, begin, end in tickets.tickets(phases, counters):
            attention.backward_groups(like, begin, end, memory, axis, sizes, *arguments)

    @_cached(njit)
    def affinity(like: Any, phases: Any, counters: Any, memory: int, sizes: Any, *arguments: Any) -> None:
        source  # noqa: B018
        for axis, begin, end in tickets.tickets(phases, counters):
            stages.affinity_groups(like, begin, end, memory, axis, sizes, *arguments)

    @_cached(njit)
    def aggregate(like: Any, phases: Any, counters: Any, memory: int, sizes: Any, *arguments: Any) -> None:
        source  # noqa: B018
        for axis, begin, end in tickets.tickets(phases, counters):
            stages.aggregate_groups(like, begin, end, memory, axis, sizes, *arguments)

    return forward, backward, affinity, aggregate


SOURCE = _source()
FORWARD, BACKWARD, AFFINITY, AGGREGATE = _kernels(SOURCE)
_large: dict[Any, list[Any]] = {}  # by dtype: keeps the compiled functions alive, since their symbols stay
_compiling = threading.Lock()


def prepare(dtype: Any) -> None:
    """Compile or load the functions that the kernels of a dtype call by symbol; call it before these kernels."""
    if dtype in _large:
        return
    with _compiling:
        if dtype in _large:
            return
        LOGGER.info(
            "ccgpu: loading the CPU kernels for %s; if Numba has none cached, it compiles them", np.dtype(dtype)
        )
        kind, functions = from_dtype(np.dtype(dtype)), []
        for function in matrices.large_functions(SOURCE):
            compiled = _cached(cfunc, matrices.signature_of(function, kind))(function)
            matrices.add_symbol(function, kind, compiled)
            functions.append(compiled)
        _large[dtype] = functions
