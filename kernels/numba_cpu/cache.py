"""The compiled CPU kernels, which Numba caches on disk for later processes.

Numba compiles a function anew when the file that defines it, or the contents of its closure, have changed. The kernels
call functions of other files, which Numba does not look at, so a hash of all these files is in their closure. A file of
the cache that is damaged, by a full disk or a machine that was switched off, is replaced.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import config, from_dtype, types
from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache
from numba.core.ccallback import CFunc

from ccgpu.kernels.compilation import Compilation
from ccgpu.kernels.numba_cpu import (
    attention,
    blocks,
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
from ccgpu.kernels.numba_cpu.dot_products import backward as pairs_backward
from ccgpu.kernels.numba_cpu.dot_products import forward as pairs_forward
from ccgpu.kernels.numba_cpu.dot_products import instructions, interleaving, multiplication, rows, sheets, weights

LOGGER = logging.getLogger("ccgpu")
COMPILATION = Compilation()


def _source() -> str:
    """Return a hash of the files whose functions the kernels call."""
    modules = (
        attention,
        blocks,
        conversions,
        dot_products,
        features,
        gradients,
        instructions,
        interleaving,
        lines,
        matrices,
        multiplication,
        pairs_backward,
        pairs_forward,
        rows,
        sheets,
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


class _Files(IndexDataCacheFile):
    """The files of a function's cache: an index, and machine code in files that are named after what it is the code of.

    Numba counts these files in its index, which two processes may write at once, and which names a file before it is
    written. A process that saves at the same moment, is killed or finds the disk full can then leave a number that
    stands for the code of another dtype or CPU, which nobody notices when it is loaded.
    """

    def load(self, key: Any) -> Any:
        """Return what was saved under a key, or None."""
        return super().load(key) if self._load_index().get(key) == self._name_of(key) else None

    def save(self, key: Any, data: Any) -> None:
        """Save data under a key: first the file, then its line in the index."""
        name = self._name_of(key)
        self._save_data(name, data)
        self._save_index({**self._load_index(), key: name})

    def _name_of(self, key: Any) -> str:
        return str(self._data_name(int(hashlib.sha256(repr(key).encode()).hexdigest()[:15], 16)))


class _Cache(FunctionCache):
    """Numba's cache on disk of one function; damaged files count as none, and are replaced."""

    def __init__(self, function: Callable[..., None]) -> None:
        super().__init__(function)
        locator = self._impl.locator
        self._cache_file = _Files(self.cache_path, self._impl.filename_base, locator.get_source_stamp())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the compiled code for a signature; None where there is none that can be read."""
        try:
            found = super().load_overload(sig, target_context)
        except Exception as error:  # Numba unpickles its files, which can raise anything
            _forget(self, error)
            found = None
        if found is None:
            folder = config.CACHE_DIR or self.cache_path  # the whole setting: not all kernels lie in one part of it
            COMPILATION.begin(f"CPU kernels, once for this machine; they are kept in {folder}")
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


def _callback(function: Callable[..., None], signature: Any) -> Any:
    """Return a function that C code can call, compiled or loaded here.

    Its cache is set as Numba's own `enable_caching` does, which would take Numba's class.
    """
    compiled: Any = CFunc(
        function, (signature.args, signature.return_type), locals={}, options={"error_model": "numpy"}
    )
    compiled._cache = _cache_of(function)
    compiled.compile()
    return compiled


# The kernels ----------------------------------------------------------------------------------------------------------
#
# Each computes one thread's part of a call: the groups whose tickets it takes (tickets.py). `source` only stands in the
# closure, and `like` and `kept` decide the dtypes.


def _forward(source: str, like: Any, kept: Any) -> Callable[..., None]:
    pairs = dot_products.used_for(type(kept))  # Numba compiles only the branch that this constant leaves

    def forward(address: int) -> None:
        source  # noqa: B018
        call, at = blocks.call_at(address), blocks.addresses_at(address)
        block, memory = blocks.plan_at(call.plan), blocks.own_memory(call)
        q, k = blocks.map_of(block, at, 0), blocks.map_of(block, at, 1)
        v, out = blocks.map_of(block, at, 2), blocks.map_of(block, at, 3)
        maxima, sums = blocks.state_of(block, at[5], 0), blocks.state_of(block, at[5], 1)
        sizes = blocks.sizes_of(block, call.scale)
        for axis, _, begin, end in tickets.tickets(blocks.phases_of(block), call.counters):
            if pairs:
                pairs_forward.forward_groups(
                    like, kept, begin, end, memory, axis, sizes, q, k, v, out, at[4], maxima, sums
                )
            else:
                attention.forward_groups(like, kept, begin, end, memory, axis, sizes, q, k, v, out, at[4], maxima, sums)

    return forward


def _backward(source: str, like: Any, kept: Any) -> Callable[..., None]:
    pairs = dot_products.used_for(type(kept))

    def backward(address: int) -> None:
        source  # noqa: B018
        call, at = blocks.call_at(address), blocks.addresses_at(address)
        block, memory = blocks.plan_at(call.plan), blocks.own_memory(call)
        dout, q = blocks.map_of(block, at, 0), blocks.map_of(block, at, 1)
        k, v = blocks.map_of(block, at, 2), blocks.map_of(block, at, 3)
        out, dq = blocks.map_of(block, at, 4), blocks.map_of(block, at, 5)
        dk, dv = blocks.map_of(block, at, 6), blocks.map_of(block, at, 7)
        lse, dlse, delta, shared = at[8], at[9], at[10], blocks.state_of(block, at[10], 1)
        sizes = blocks.sizes_of(block, call.scale)
        maps = gradients.Maps(dout, q, k, v, out, lse, dlse, delta, dq, dk, dv)
        for axis, task, begin, end in tickets.tickets(blocks.phases_of(block), call.counters):
            if pairs:
                pairs_backward.backward_groups(like, kept, begin, end, memory, axis, task, sizes, shared, maps)
            else:
                gradients.backward_groups(like, kept, begin, end, memory, axis, task, sizes, shared, maps)

    return backward


def _affinity(source: str, like: Any, kept: Any) -> Callable[..., None]:
    def affinity(address: int) -> None:
        source  # noqa: B018
        call, at = blocks.call_at(address), blocks.addresses_at(address)
        block, memory = blocks.plan_at(call.plan), blocks.own_memory(call)
        q, k, sizes = blocks.map_of(block, at, 0), blocks.map_of(block, at, 1), blocks.sizes_of(block, call.scale)
        for axis, _, begin, end in tickets.tickets(blocks.phases_of(block), call.counters):
            stages.affinity_groups(like, kept, begin, end, memory, axis, sizes, q, k, at[2])

    return affinity


def _aggregate(source: str, like: Any, kept: Any) -> Callable[..., None]:
    def aggregate(address: int) -> None:
        source  # noqa: B018
        call, at = blocks.call_at(address), blocks.addresses_at(address)
        block, memory = blocks.plan_at(call.plan), blocks.own_memory(call)
        v, out, sizes = blocks.map_of(block, at, 0), blocks.map_of(block, at, 1), blocks.sizes_of(block, call.scale)
        for axis, _, begin, end in tickets.tickets(blocks.phases_of(block), call.counters):
            stages.aggregate_groups(like, kept, begin, end, memory, axis, sizes, at[2], v, out, at[3] != 0)

    return aggregate


KERNELS: dict[str, Callable[[str, Any, Any], Callable[..., None]]] = {
    "forward": _forward,
    "backward": _backward,
    "affinity": _affinity,
    "aggregate": _aggregate,
}
SOURCE = _source()
_SIGNATURE = types.void(types.int64)
_ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
LOADED: dict[tuple[str, Any, Any], Any] = {}  # the kernels that have been compiled or loaded; see `kernel_of`
_large: dict[str, Any] = {}  # by symbol: keeps the compiled functions alive, since their symbols stay
_compiling = threading.RLock()

if hasattr(os, "register_at_fork"):
    # A process forked while another thread compiles would inherit this lock, and Numba's own, locked for ever.
    os.register_at_fork(
        before=_compiling.acquire, after_in_parent=_compiling.release, after_in_child=_compiling.release
    )


class Kernel(NamedTuple):
    """A compiled kernel."""

    address: int  # of a C function that takes the address of a call's block (blocks.py)
    run: Callable[[bytes], None]  # the same for Python: it takes the block, and runs without Python's lock


@functools.cache
def kernel_of(kernel: str, like: Any, kept: Any) -> Kernel:
    """Return a kernel: a thread's part of a call, or all of it."""
    key = kernel, like, kept
    with _compiling:
        try:
            if key not in LOADED:
                if dot_products.used_for(kept) and kernel in ("forward", "backward"):
                    prepare_pairs()
                else:
                    prepare(like, kept)
                made = _callback(KERNELS[kernel](SOURCE, like(0), kept(0)), _SIGNATURE)
                LOADED.setdefault(key, made)  # a signal handler that ran meanwhile may have made and used its own
        finally:
            COMPILATION.end()
    address = LOADED[key].address
    return Kernel(address, _ENTRY(address))


def prepare(like: Any, kept: Any) -> None:
    """Compile or load the functions that the kernels call by symbol, before these are compiled or loaded.

    Args:
        like: NumPy's type of the arithmetic.
        kept: the type that stands for that of the maps in memory; see conversions.py.
    """
    for function in matrices.large_functions(SOURCE):
        for kinds in matrices.kinds_of(function, *(from_dtype(np.dtype(dtype)) for dtype in (like, kept))):
            _add(function, kinds)


def prepare_pairs() -> None:
    """Compile or load the functions that the kernels of dot_products/ call by symbol, before these."""
    for module in (multiplication, interleaving, rows):  # each calls functions of those before
        for function in module.large_functions(SOURCE):
            _add(function, ())


def _add(function: Callable[..., None], kinds: tuple[Any, ...]) -> None:
    """Compile or load a large function for Numba's types of the numbers that it takes, unless that has been done."""
    symbol = matrices.symbol_of(function, kinds)
    with _compiling:
        if symbol in _large:
            return
        made = _callback(function, matrices.signature_of(function, kinds))
        if symbol not in _large:  # a signal handler that ran meanwhile may have made its own, which kernels now call
            _large[symbol] = made
            matrices.add_symbol(function, kinds, made)
