"""Two fixes of Numba's CUDA simulator, in which threads of a block run as threads of Python; importing applies them.

Shared arrays. The simulator looks up a block's shared array by the source line that requests it, and creates it at the
first request. Two threads that request it at the same time both create one and do not share it, so results are
sometimes wrong, more often with short switch intervals. Here they request it one after another. A new array is full of
NaN, so an element that is read before it is written, or before a missing barrier, shows in the result.

Device functions. At each call the simulator iterates over the globals of the function's module to replace the name
`cuda`. Another thread may add a name meanwhile, as NumPy does (`__warningregistry__`) at the first warning that a line
of the module causes: "dictionary changed size during iteration". Here it iterates over a copy.
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


FakeCUDAShared.array = _shared_array
kernel.swapped_cuda_module = _swapped_cuda_module
