"""A fix of Numba's CUDA simulator, whose threads sometimes do not share their block's shared arrays.

The simulator looks up a block's shared array by the source line that requests it, and creates it at the first request.
Two threads that request it at the same time both create one and do not share it, so results are sometimes wrong, more
often with short switch intervals. Importing this module makes them request it one after another. A new array is full of
NaN, so an element that is read before it is written, or before a missing barrier, shows in the result.
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
    """Return the block's shared array for the calling source line: a drop-in replacement of FakeCUDAShared.array."""
    frame = sys._getframe(1)
    place = (frame.f_code.co_filename, frame.f_lineno)
    with _LOCK:
        if place not in self._allocations:
            self._allocations[place] = np.full(shape, np.nan, dtype)
        return self._allocations[place]


FakeCUDAShared.array = _shared_array
