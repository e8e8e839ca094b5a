"""Three fixes of Numba's CUDA simulator, in which threads of a block run as threads of Python; importing applies them.

Shared arrays. The simulator looks up a block's shared array by the source line that requests it, and creates it at the
first request. Two threads that request it at the same time both create one and do not share it, so results are
sometimes wrong, more often with short switch intervals. Here they request it one after another. A new array is full of
NaN, so an element that is read before it is written, or before a missing barrier, shows in the result.

Device functions. At each call the simulator iterates over the globals of the function's module to replace the name
`cuda`. Another thread may add a name meanwhile, as NumPy does (`__warningregistry__`) at the first warning that a line
of the module causes: "dictionary changed size during iteration". Here it iterates over a copy.

Waiting. While a block runs, the simulator asks all its threads again and again whether they wait at a barrier, and
takes the interpreter from them each time. Here each thread says when it has come to a barrier or to its end.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda.cudadrv.devicearray import FakeCUDAArray as FakeCUDAArray
from numba.cuda.simulator import kernel
from numba.cuda.simulator.kernelapi import FakeCUDAShared

_LOCK = threading.Lock()


def _shared_array(self: Any, shape: Any, dtype: Any) -> Any:
    """Return the block's shared array for the calling source line: a drop-in replacement of FakeCUDAShared.array."""
    frame = sys._getframe(1)
    place = (frame.f_code.co_filename, frame.f_lineno)
    with _LOCK:
        if place not in self._allocations:
            self._allocations[place] = np.full(shape, np.nan, dtype)
        return self._allocations[place]


@contextlib.contextmanager
def _swapped_cuda_module(function: Callable[..., Any], stand_in: Any) -> Iterator[None]:
    """Replace `cuda` in the function's module: a drop-in replacement of kernel.swapped_cuda_module."""
    names = [name for name, value in function.__globals__.copy().items() if value is cuda]
    function.__globals__.update(dict.fromkeys(names, stand_in))
    try:
        yield
    finally:
        function.__globals__.update(dict.fromkeys(names, cuda))


class _Barrier(threading.Event):
    """What a thread waits for at a barrier; it says first that it has come."""

    def __init__(self, came: threading.Semaphore) -> None:
        super().__init__()
        self._came = came

    def wait(self, timeout: float | None = None) -> bool:
        self._came.release()
        return super().wait(timeout)


def _run(self: Any, grid_point: tuple[int, ...], *args: Any) -> None:
    """Run a block from barrier to barrier: a drop-in replacement of kernel.BlockManager.run.

    Raises:
        Exception: that of the first thread that has failed; the others are ended at their barrier.
    """
    came = threading.Semaphore(0)

    def target() -> None:
        try:
            self._f(*args)
        finally:
            came.release()

    places = np.ndindex(*self._block_dim)
    running = [kernel.BlockThread(target, self, grid_point, place, self._debug) for place in places]
    for thread in running:
        thread.syncthreads_event = _Barrier(came)
    for thread in running:
        thread.start()
    while running:
        for _ in running:
            came.acquire()
        ended = [thread for thread in running if not thread.syncthreads_blocked]
        for thread in ended:
            thread.join()  # what it raised is noted after its function has ended
        failed = next((thread.exception for thread in ended if thread.exception), None)
        running = [thread for thread in running if thread.syncthreads_blocked]
        for thread in running:
            thread.abort = failed is not None
            thread.syncthreads_blocked = False
            thread.syncthreads_event.set()
        if failed:
            error, traceback = failed
            raise error.with_traceback(traceback)


FakeCUDAShared.array = _shared_array
kernel.BlockManager.run = _run
kernel.swapped_cuda_module = _swapped_cuda_module
