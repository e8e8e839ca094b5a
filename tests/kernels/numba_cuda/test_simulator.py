"""The fixes of Numba's CUDA simulator."""

from __future__ import annotations

import sys
import threading

import numpy as np
from numba import cuda
from numba.cuda.simulator import kernel

from ccgpu.kernels.numba_cuda import simulator  # noqa: F401 - importing it applies the fixes


def test_device_functions_can_be_called_while_their_module_changes() -> None:
    """NumPy's first warning in a module adds `__warningregistry__` to its globals, from any thread."""
    module = {f"name_{index}": index for index in range(10_000)} | {"cuda": cuda}
    exec("def read(): return cuda", module)
    added = {f"added_{index}": index for index in range(50)}
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            module.update(added)
            for name in added:
                del module[name]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    changing = threading.Thread(target=change)
    changing.start()
    stand_in = object()
    try:
        for _ in range(300):
            with kernel.swapped_cuda_module(module["read"], stand_in):
                assert module["read"]() is stand_in
            assert module["read"]() is cuda
    finally:
        stop.set()
        changing.join()
        sys.setswitchinterval(interval)


def test_a_shared_array_is_full_of_nan() -> None:
    @cuda.jit
    def copy(result):  # type: ignore[no-untyped-def]
        shared = cuda.shared.array(4, np.float32)
        result[cuda.threadIdx.x] = shared[cuda.threadIdx.x]

    result = np.zeros(4, np.float32)
    copy[1, 4](result)
    assert np.isnan(result).all()
