"""The threads that share a call: a team of the OpenMP library that the caller names, or helpers from a pool.

torch's operations run on OpenMP threads, which wait for the next operation by spinning for a while. Helpers of our own
then find no free core and come too late for a call of a few milliseconds; the same team, asked next, has its threads
awake. The pool is for callers without such a library and for forked processes, where it would wait for threads that the
fork has not copied. Both run outside Numba's threading layers, so that calls from several threads at once and from
forked processes (data loaders) work.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

from numba import config


def thread_count(threads: int | None) -> int:
    """Return the number of threads to use; for None, NUMBA_NUM_THREADS, or all cores if that is not set."""
    return int(config.NUMBA_NUM_THREADS) if threads is None else threads


# A team of OpenMP threads ---------------------------------------------------------------------------------------------


class Team(NamedTuple):
    """The threads of an OpenMP library."""

    parallel: Callable[[int, bytes, int, int], None]  # GOMP_parallel(function, its argument, number of threads, flags)
    number: int  # address of omp_get_thread_num


@functools.cache
def team_of(library: str) -> Team | None:
    """Return the threads of the OpenMP library that a loaded library calls; None where it is linked with none.

    GNU's library has these functions, and Intel's and LLVM's on Linux have them for programs that GNU's compiler built.
    A library that LD_PRELOAD names, as guides to torch's speed do with Intel's, is called in the place of the one that
    was linked: what the whole process sees comes first.
    """
    try:
        linked = ctypes.CDLL(library)
        parallel, number = linked.GOMP_parallel, linked.omp_get_thread_num
        process = ctypes.CDLL(None)
        if hasattr(process, "GOMP_parallel") and hasattr(process, "omp_get_thread_num"):
            parallel, number = process.GOMP_parallel, process.omp_get_thread_num
    except (OSError, AttributeError):
        return None
    parallel.argtypes = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint
    parallel.restype = None
    return Team(parallel, ctypes.cast(number, ctypes.c_void_p).value or 0)


_forked = False


def team_works() -> bool:
    """Tell whether OpenMP threads can run here: a forked process would wait for those of its parent for ever."""
    return not _forked


# A pool of Python's threads -------------------------------------------------------------------------------------------

_pool: ThreadPoolExecutor | None = None


def _after_fork() -> None:
    global _pool, _forked
    _pool, _forked = None, True  # the pool object is inherited, but not its threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _helpers() -> ThreadPoolExecutor:
    """Return the pool of threads that help the calling one."""
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max_workers=max(32, os.cpu_count() or 1), thread_name_prefix="ccgpu")
    return _pool


def _wait_for(helpers: list[Future[None]]) -> None:
    """Return when no helper runs and none will, however often Ctrl-C is pressed meanwhile."""
    running = True
    while running:
        with contextlib.suppress(BaseException):  # the caller raises the first one
            wait([helper for helper in helpers if not helper.cancel()])
            running = False


def together(part: Callable[[], None], help_along: Callable[[], None], helpers: int) -> None:
    """Call `part` here and `help_along` on as many other threads; return when all that has begun is done.

    `part` alone does all the work if no helper comes in time, and a helper that comes later finds nothing to do.
    """
    # One for each helper, made here: Ctrl-C in the middle of `submit` would lose the pool's own, and with it a helper.
    begun: list[Future[None]] = []

    def help_unless_cancelled(helper: Future[None]) -> None:
        if helper.set_running_or_notify_cancel():
            try:
                help_along()
            finally:
                helper.set_result(None)

    try:
        with contextlib.suppress(RuntimeError):  # no thread can be started, for example at interpreter shutdown
            for _ in range(helpers):
                begun.append(Future())
                _helpers().submit(functools.partial(help_unless_cancelled, begun[-1]))
        part()
    except BaseException:  # helpers may still be writing to this call's arrays
        _wait_for(begun)
        raise
    for helper in begun:  # all work is done: a helper that starts now would find no ticket
        helper.cancel()
