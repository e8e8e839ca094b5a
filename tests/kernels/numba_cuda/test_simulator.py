"""The fixes of Numba's CUDA simulator."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest
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


def test_no_thread_passes_a_barrier_before_all_have_come() -> None:
    @cuda.jit
    def turn(result):  # type: ignore[no-untyped-def]
        shared = cuda.shared.array(6, np.float32)
        place = 2 * cuda.threadIdx.y + cuda.threadIdx.x
        for step in range(20):
            shared[place] = 10 * step + place
            cuda.syncthreads()
            result[cuda.blockIdx.x, step, place] = shared[(place + 1) % 6]
            cuda.syncthreads()

    result = np.zeros((2, 20, 6), np.float32)
    turn[2, (2, 3)](result)
    expected = 10 * np.arange(20)[:, None] + (np.arange(6) + 1) % 6
    assert np.array_equal(result, np.broadcast_to(expected, result.shape))


def test_threads_that_have_ended_are_not_waited_for() -> None:
    @cuda.jit
    def leave(result):  # type: ignore[no-untyped-def]
        for step in range(cuda.threadIdx.x):
            cuda.syncthreads()
            result[cuda.threadIdx.x] = step + 1

    result = np.zeros(5, np.float32)
    leave[1, 5](result)
    assert result.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("failing", [0, 2])
def test_the_error_of_a_thread_ends_the_others(failing: int) -> None:
    @cuda.jit
    def fail(result):  # type: ignore[no-untyped-def]
        if cuda.threadIdx.x == failing:
            raise ValueError("wrong")
        cuda.syncthreads()
        result[cuda.threadIdx.x] = 1

    before = threading.active_count()
    result = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=rf"tid=\[{failing}, 0, 0\] ctaid=\[0, 0, 0\]: wrong"):
        fail[1, 3](result)
    for thread in threading.enumerate():
        if isinstance(thread, kernel.BlockThread):
            thread.join(60)
    assert threading.active_count() == before
    assert not result.any()
