"""The threads of a call: any number of them, a team of OpenMP's or helpers from a pool that are late or fail."""

import concurrent.futures
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch

from ccgpu.kernels.numba_cpu import cache, calls, plans, workers
from tests.ccgpu.problems import attend_plainly, check_errors, expected
from tests.kernels.numba_cpu.problems import DTYPES, LAYOUTS, arrays_of, attend, cut_up, problem_of, tensors_of

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32", "float16"])


@every_dtype
@pytest.mark.parametrize("order", ["contiguous", "channels last", "Fortran"])
@pytest.mark.parametrize("channels", [(16, 48), (9, 21)], ids=["whole vectors", "parts of vectors"])
def test_same_bits_by_any_number_of_threads_and_again(monkeypatch, channels, order, dtype):
    cut_up(monkeypatch, SMALL=0, SHEET_BYTES=10000, TOGETHER=1)
    problem = problem_of((29, 33), dtype, d=channels[0], c=channels[1])
    arrays = [LAYOUTS[order](x) for x in arrays_of(problem)]
    weights = np.random.default_rng(0).standard_normal((2, 61, 29, 33)).astype(arrays[0].dtype)
    first = None
    for threads in (1, 2, 3, 7, 7, 1):
        results = attend(*arrays, problem.scale, threads)
        results += (calls.affinity(*arrays[:2], threads=threads),)
        results += (calls.aggregate(weights, arrays[2], threads=threads),)
        results += (calls.aggregate_transposed(weights, arrays[2], threads=threads),)
        first = first or results
        for a, b in zip(first, results, strict=True):
            np.testing.assert_array_equal(a, b)


class Pool:
    """Replaces the thread pool: submitted functions wait until the test runs them."""

    def __init__(self):
        self.late = []

    def submit(self, function):
        self.late.append(function)
        return concurrent.futures.Future()


@pytest.fixture
def pool(monkeypatch):
    """A pool in which no thread wakes up in time."""
    cut_up(monkeypatch, SMALL=0)
    pool = Pool()
    monkeypatch.setattr(workers, "_pool", pool)
    return pool


def check_short_call(threads):
    """Check a call with fewer lines than threads."""
    problem = problem_of((2, 3), torch.float32, batch=1)
    ours = attend(*arrays_of(problem), problem.scale, threads)
    check_errors(tensors_of(ours), attend_plainly(problem), expected(problem), problem)


@pytest.mark.timeout(60)
def test_more_threads_than_groups(monkeypatch):
    cut_up(monkeypatch, SMALL=0)
    for _ in range(20):
        check_short_call(threads=16)


@pytest.mark.timeout(60)
def test_helpers_that_never_come(pool):
    check_short_call(threads=4)
    assert len(pool.late) == 6


@pytest.mark.timeout(60)
def test_helpers_that_come_when_all_is_done_touch_nothing(pool):
    """The memory of the arrays may have been reused by then."""
    arrays = arrays_of(problem_of((2, 3), torch.float32, batch=1))
    results = attend(*arrays, 1.0, threads=4)
    for x in results:
        x[...] = 7
    for helper in pool.late:
        helper()
    assert len(pool.late) == 6
    assert all((x == 7).all() for x in results)


@pytest.mark.timeout(60)
def test_helpers_that_come_in_the_middle(monkeypatch):
    """Each helper begins a moment after the call, on a thread of its own."""
    cut_up(monkeypatch, SMALL=0, PARTS=30)
    problem = problem_of((61, 67), torch.float32, d=16, c=32)
    alone = attend(*arrays_of(problem), problem.scale, threads=1)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:

        class Delayed:
            delays = iter([0.0, 0.001, 0.002, 0.004] * 100)

            def submit(self, function):
                delay = next(self.delays)
                return threads.submit(lambda: (time.sleep(delay), function()))

        monkeypatch.setattr(workers, "_pool", Delayed())
        for _ in range(10):
            together = attend(*arrays_of(problem), problem.scale, threads=4)
            for a, b in zip(alone, together, strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.timeout(60)
def test_helpers_that_fail(monkeypatch):
    """A helper that runs out of memory: the other threads do its part."""

    class Failing:
        def submit(self, function):
            future = concurrent.futures.Future()
            future.set_exception(MemoryError())
            return future

    cut_up(monkeypatch, SMALL=0)
    monkeypatch.setattr(workers, "_pool", Failing())
    check_short_call(threads=4)


@pytest.mark.timeout(60)
def test_a_caller_that_fails_waits_for_helpers_that_began(monkeypatch):
    """Helpers write to arrays that may be freed once the error is raised."""
    began, finished = threading.Barrier(2), []

    def kernel(*arguments):
        if threading.current_thread() is threading.main_thread():
            began.wait()
            raise MemoryError
        began.wait()
        time.sleep(0.2)
        finished.append(True)

    cut_up(monkeypatch, SMALL=0)
    monkeypatch.setattr(plans, "kernel_of", lambda *_: cache.Kernel(0, kernel))
    q = np.ones((1, 2, 3, 4), np.float32)
    with pytest.raises(MemoryError):
        calls.forward(q, q, q, threads=2)
    assert finished


class Interrupted:
    """Replaces the thread pool: Ctrl-C after a helper has begun, but before the pool has said so."""

    def submit(self, function):
        began = threading.Event()
        threading.Thread(target=lambda: (began.set(), function())).start()
        began.wait()
        time.sleep(0.1)
        raise KeyboardInterrupt


@pytest.mark.timeout(60)
def test_a_caller_that_is_interrupted_while_it_asks_for_help_waits_for_that_helper(monkeypatch):
    finished = []

    def help_along():
        time.sleep(0.5)
        finished.append(True)

    monkeypatch.setattr(workers, "_pool", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        workers.together(lambda: None, help_along, 1)
    assert finished


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="this system sends no signal to a thread")
@pytest.mark.timeout(60)
def test_a_caller_that_is_interrupted_again_while_it_waits_for_a_helper_waits_on(monkeypatch):
    """Ctrl-C twice: the helper's memory must not be freed before it has finished, either time."""
    main, finished = threading.main_thread().ident, []

    def help_along():
        for _ in range(3):
            time.sleep(0.2)
            signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.2)
        finished.append(True)

    monkeypatch.setattr(workers, "_pool", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        workers.together(lambda: None, help_along, 1)
    assert finished


@pytest.mark.timeout(60)
def test_helpers_that_cannot_be_started(monkeypatch):
    """At interpreter shutdown, or if the system has no thread left, the caller does all the work."""

    class Exhausted:
        def submit(self, function):
            raise RuntimeError("can't start new thread")

    cut_up(monkeypatch, SMALL=0)
    monkeypatch.setattr(workers, "_pool", Exhausted())
    check_short_call(threads=4)


# A team of OpenMP's ---------------------------------------------------------------------------------------------------


def test_no_team_without_an_openmp_library():
    assert workers.team_of(np._core._multiarray_umath.__file__) is None
    assert workers.team_of("/no/such/library") is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere torch is linked with other libraries")
def test_torch_brings_a_team():
    assert workers.team_of(torch._C.__file__) is not None
