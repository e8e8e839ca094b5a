"""Measure the time and memory of a step, and the machine's own rates of copying and multiplying."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccgpu.train import memory

CPU = torch.device("cpu")
WARM_UPS = 3
LONG = 2.0  # seconds of warming up after which the rest of WARM_UPS is skipped
FEWEST = 3  # turns that a step gets even after it has used up its seconds
CYCLES_PER_SECOND = 2.0e9  # assumed clock of a GPU, for `torch.cuda._sleep`, which takes cycles


class Timing(NamedTuple):
    """Seconds of a step: the median and the 20 and 80 % quantiles over `turns` turns."""

    median: float
    low: float
    high: float
    turns: int


class Step(NamedTuple):
    """A step to measure: `run` is timed on the result of `prepare(number)`, which chooses a set of inputs, untimed."""

    prepare: Callable[[int], Any]
    run: Callable[[Any], object]


def step(call: Callable[[], object]) -> Step:
    """Return a call without inputs as a step."""
    return Step(lambda number: None, lambda state: call())


class Clock:
    """Times a step: on the CPU by the wall clock, on a GPU by events around its kernels.

    The GPU starts only after the host has enqueued the step, so that its time contains no gaps in which it waits for
    Python. `host` measures the time of enqueuing alone.
    """

    def __init__(self, device: torch.device = CPU) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            self._start, self._stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def wait(self) -> None:
        """Wait until the device has done everything."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def host(self, measured: Step, number: int) -> float:
        """Return the seconds until the step's Python call returns, whether or not the device has finished."""
        state = measured.prepare(number)
        self.wait()
        start = time.perf_counter()
        result = measured.run(state)
        seconds = time.perf_counter() - start
        self.wait()
        del result
        return seconds

    def seconds(self, measured: Step, number: int, head_start: float = 0.0) -> float:
        """Return the seconds that the step takes; a GPU first sleeps `head_start` seconds while the host enqueues."""
        if not self.on_gpu:
            return self.host(measured, number)
        state = measured.prepare(number)
        self.wait()
        torch.cuda._sleep(int(head_start * CYCLES_PER_SECOND))
        self._start.record()
        result = measured.run(state)
        self._stop.record()
        self._stop.synchronize()
        del result
        return self._start.elapsed_time(self._stop) / 1e3


def warm_up(measured: Step, clock: Clock) -> float:
    """Run a step until caches, allocators and compilers are warm; return its seconds on the host.

    It runs WARM_UPS times, or only twice if that takes long, as it does with compilers.
    """
    start = time.perf_counter()
    for number in range(WARM_UPS):
        seconds = clock.host(measured, number)
        if number > 0 and time.perf_counter() - start > LONG:
            break
    return seconds


def interleaved(
    steps: Mapping[str, Step], turns: int, clock: Clock | None = None, share: float = float("inf")
) -> dict[str, Timing | Exception]:
    """Time every step `turns` times, in turns, so that anything that slows the machine down slows all of them.

    Each call gets the next set of inputs. A step that has taken `share` seconds skips its remaining turns; a step that
    raises is left out, and the exception is its result instead of a Timing.
    """
    clock = Clock() if clock is None else clock
    results: dict[str, Timing | Exception] = {}
    head_starts: dict[str, float] = {}
    seconds: dict[str, list[float]] = {}
    for name, measured in steps.items():
        try:
            head_starts[name] = 2 * warm_up(measured, clock) + 2e-5
            seconds[name] = []
        except Exception as error:  # whatever a peer raises is its result
            results[name] = error
    number = 0
    for turn in range(turns):
        for name in list(seconds):
            if turn >= FEWEST and sum(seconds[name]) >= share:
                continue
            try:
                seconds[name].append(clock.seconds(steps[name], number, head_starts[name]))
            except Exception as error:
                results[name] = error
                del seconds[name]
            number += 1
    return results | {name: quantiles(values) for name, values in seconds.items()}


def alone(measured: Step, turns: int, clock: Clock) -> float:
    """Return the median seconds of one step; raise what it raises."""
    result = interleaved({"": measured}, turns, clock)[""]
    if isinstance(result, Exception):
        raise result
    return result.median


def host_time(measured: Step, clock: Clock, turns: int = 100) -> Timing:
    """Return the seconds that enqueuing a step takes; the device is idle when it begins."""
    warm_up(measured, clock)
    return quantiles([clock.host(measured, number) for number in range(turns)])


def quantiles(values: list[float]) -> Timing:
    """Return the median and the 20 and 80 % quantiles."""
    if len(values) < 2:
        return Timing(values[0], values[0], values[0], len(values))
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return Timing(statistics.median(values), cuts[0], cuts[-1], len(values))


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the peak bytes that torch's CPU allocator and NumPy's hold during a call, beyond those held before."""
    call()
    return memory.peak_bytes(call, CPU)[0]


def temporaries(measured: Step, clock: Clock) -> int:
    """Return the peak bytes that a step, already warm, holds beyond its inputs and its results."""
    state = measured.prepare(0)
    peak, result = memory.peak_bytes(lambda: measured.run(state), clock.device)
    return peak - _bytes(result)


def _bytes(result: object) -> int:
    return sum(x.nbytes for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, Tensor))


def matrix_rate(clock: Clock | None = None, dtype: torch.dtype = torch.float32, turns: int = 5) -> float:
    """Return the FLOP/s of a large matrix product: the rate from which lower bounds of time are computed."""
    clock = Clock() if clock is None else clock
    size = 8192 if clock.on_gpu else 2048
    if dtype == torch.float64:
        size //= 2
    a = torch.randn(size, size, device=clock.device).to(dtype)
    return 2 * size**3 / alone(step(lambda: a @ a), turns, clock)


def copy_rate(clock: Clock | None = None, turns: int = 9) -> float:
    """Return the bytes/s of a large copy within the device's memory; bytes read and bytes written both count."""
    clock = Clock() if clock is None else clock
    a = torch.randn(2**28 if clock.on_gpu else 2**24, device=clock.device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / alone(step(lambda: b.copy_(a)), turns, clock)
