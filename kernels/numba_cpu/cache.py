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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numba import from_dtype, njit
from numba.core.caching import FunctionCache, NullCache
from numba.core.ccallback import CFunc

from ccgpu.kernels.compilation import Compilation
from ccgpu.kernels.numba_cpu import (
    attention,
    conversions,
    dot_products,
    features,
    gradients,
    lines,
    matrices,
    stages,
    tickets,
    tiles,
    vectors,
)
from ccgpu.kernels.numba_cpu.dot_products import (
    backward,
    forward,
    instructions,
    interleaving,
    multiplication,
    rows,
    weights,
)

LOGGER = logging.getLogger("ccgpu")
COMPILATION = Compilation()


def _source() -> str:
    """Return a hash of the files whose functions the kernels call."""
    modules = (
        attention,
        backward,
        conversions,
        dot_products,
        features,
        forward,
        gradients,
        instructions,
        interleaving,
        lines,
        matrices,
        multiplication,
        rows,
        stages,
        tickets,
        tiles,
        vectors,
        weights,
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
            found = super().load_overload(sig, target_context)
        except Exception as error:  # Numba unpickles its files, which can raise anything
            _forget(self, error)
            found = None
        if found is None:
            COMPILATION.begin(f"CPU kernels, once for this machine; they are kept in {self.cache_path}")
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        """Save the compiled code for a signature; a full disk is no reason not to use it."""
        try:
            super().save_overload(sig, data)
        except OSError as error:
            LOGGER.warning("ccgpu: a compiled CPU kernel cannot be saved in %s (%s)", self.cache_path, error)


class _NoCache(NullCache):
    """The cache of a function where no folder can be written to."""

    def load_overload(self, sig: Any, target_context: Any) -> None:
        """Return None: the function is compiled."""
        COMPILATION.begin("CPU kernels, for this process alone")


def _forget(cache: FunctionCache, error: Exception) -> None:
    """Replace the index of a function's cache by an empty one, so that the function is compiled and saved anew."""
    LOGGER.warning("ccgpu: compiling a CPU kernel anew, since its cache in %s is damaged (%r)", cache.cache_path, error)
    try:
        cache.flush()
    except OSError:  # read-only: the function is compiled in each process
        cache.disable()


def _cache_of(function: Callable[..., None]) -> Any:
    """Return a function's cache on disk, where some folder can be written to."""
    try:
        return _Cache(function)
    except RuntimeError:
        _log_no_cache()
        return _NoCache()


# Both set the cache as Numba's own `enable_caching` does, which would take Numba's class.


def _kernel(function: Callable[..., None]) -> Any:
    """Return a function that is compiled or loaded when it is called."""
    compiled = njit(error_model="numpy", nogil=True)(function)
    compiled._cache = _cache_of(function)
    return compiled


def _callback(function: Callable[..., None], signature: Any) -> Any:
    """Return a function that C code can call, compiled or loaded here."""
    compiled: Any = CFunc(
        function, (signature.args, signature.return_type), locals={}, options={"error_model": "numpy"}
    )
    compiled._cache = _cache_of(function)
    compiled.compile()
    return compiled


def _kernels(source: str) -> tuple[Any, ...]:
    """Return the kernels. Each computes one thread's part of a call: the groups whose tickets it takes (tickets.py)."""

    @_kernel
    def forward(like: Any, kept: Any, phases: Any, counters: Any, memory: int, sizes: Any, *arguments: Any) -> None:
        source  # noqa: B018
        for axis, begin, end in tickets.tickets(phases, counters):
            attention.forward_groups(like, kept, begin, end, memory, axis, sizes, *arguments)

    @_kernel
    def backward(like: Any, kept: Any, phases: Any, counters: Any, memory: int, sizes: Any, *arguments: Any) -> None:
        source  # noqa: B018
        for axis, begin, end in tickets.tickets(phases, counters):
            gradients.backward_groups(like, kept, begin, end, memory, axis, sizes, *arguments)

    @_kernel
    def affinity(like: Any, kept: Any, phases: Any, counters: Any, memory: int, sizes: Any, *arguments: Any) -> None:
        source  # noqa: B018
        for axis, begin, end in tickets.tickets(phases, counters):
            stages.affinity_groups(like, kept, begin, end, memory, axis, sizes, *arguments)

    @_kernel
    def aggregate(like: Any, kept: Any, phases: Any, counters: Any, memory: int, sizes: Any, *arguments: Any) -> None:
        source  # noqa: B018
        for axis, begin, end in tickets.tickets(phases, counters):
            stages.aggregate_groups(like, kept, begin, end, memory, axis, sizes, *arguments)

    return forward, backward, affinity, aggregate


SOURCE = _source()
FORWARD, BACKWARD, AFFINITY, AGGREGATE = _kernels(SOURCE)
_large: dict[str, Any] = {}  # by symbol: keeps the compiled functions alive, since their symbols stay
_prepared: set[tuple[Any, Any]] = set()
_compiling = threading.Lock()


def _large_functions(like: Any, kept: Any) -> Iterator[tuple[Callable[..., None], tuple[Any, ...]]]:
    """Yield the functions that the kernels call by symbol, each with Numba's types of the numbers that it takes."""
    for function in matrices.large_functions(SOURCE):
        for kinds in matrices.kinds_of(function, *(from_dtype(np.dtype(dtype)) for dtype in (like, kept))):
            yield function, kinds
    if dot_products.used_for(kept):
        for function in (*multiplication.large_functions(SOURCE), *interleaving.large_functions(SOURCE)):
            yield function, ()


def prepare(like: Any, kept: Any) -> None:
    """Compile or load the functions that the kernels call by symbol; call it before these kernels.

    Args:
        like: NumPy's type of the arithmetic.
        kept: the type that stands for that of the maps in memory; see conversions.py.
    """
    if (like, kept) in _prepared:
        return
    with _compiling:
        for function, kinds in _large_functions(like, kept):
            symbol = matrices.symbol_of(function, kinds)
            if symbol not in _large:
                _large[symbol] = _callback(function, matrices.signature_of(function, kinds))
                matrices.add_symbol(function, kinds, _large[symbol])
        _prepared.add((like, kept))
