"""Numba's CUDA simulator made fit for these kernels: its threads get one and the same shared array.

The simulator finds a block's shared array by the source line that asks for it, and makes it where there is none yet.
Two threads that ask at the same time both find none, and compute with an array each: rarely, and more often with short
switch intervals, results are wrong. Here they ask one after another. A fresh array holds NaN, so a thread that reads
what nobody has written, or reads before a barrier that is missing, shows in the result.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
from numba.cuda.cudadrv.devicearray import FakeCUDAArray as FakeCUDAArray
from numba.cuda.simulator.kernelapi import FakeCUDAShared

_LOCK = threading.Lock()


def _shared_array(self: Any, shape: Any, dtype: Any) -> Any:
    """Stand in for FakeCUDAShared.array, for arrays of a given shape and a NumPy type."""
    frame = sys._getframe(1)
    place = (frame.f_code.co_filename, frame.f_lineno)
    with _LOCK:
        if place not in self._allocations:
            self._allocations[place] = np.full(shape, np.nan, dtype)
        return self._allocations[place]


FakeCUDAShared.array = _shared_array
