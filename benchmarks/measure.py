"""Time and memory of a step, and the machine's own rates."""

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
LONG = 2.0  # seconds of warming up
FEWEST = 3  # turns of a step that has used up its seconds
CYCLES_PER_SECOND = 2.0e9  # of the GPU's clock, at least: what a wait is stated in


class Timing(NamedTuple):
    """Seconds: the median and the 20 and 80 % quantiles of so many turns."""

    median: float
    low: float
    high: float
    turns: int


class Step(NamedTuple):
    """What is measured: `run` on what `prepare` gives for one of several sets of inputs. `prepare` is not timed."""

    prepare: Callable[[int], Any]
    run: Callable[[Any], object]


def step(call: Callable[[], object]) -> Step:
    """Return a call without inputs as a step."""
    return Step(lambda number: None, lambda state: call())


class Clock:
    """Times a step: on the CPU by the wall clock, on a GPU by events around its kernels.

    The GPU is kept waiting until the host has issued the step, so that what is timed is the kernels and not the gaps in
    which a GPU waits for Python. `host` is the time of issuing alone.
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
        """Return the seconds that the step takes; a GPU waits `head_start` seconds first."""
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

    Two runs do where they take long, in which compilers have their part.
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
    """Time every step `turns` times, taking turns, so that what slows the machine down slows all of them.

    Each call gets the next set of inputs. A step that has taken `share` seconds sits out what is left of its turns; one
    that raises is left out, and what it raised stands in the place of its times.
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
    """Return the seconds that issuing a step takes; the device is idle when it begins."""
    warm_up(measured, clock)
    return quantiles([clock.host(measured, number) for number in range(turns)])


def quantiles(values: list[float]) -> Timing:
    """Return the median and the 20 and 80 % quantiles."""
    if len(values) < 2:
        return Timing(values[0], values[0], values[0], len(values))
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return Timing(statistics.median(values), cuts[0], cuts[-1], len(values))


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the most bytes that torch's CPU allocator and NumPy's hold at once in a call, over those held before."""
    call()
    return memory.peak_bytes(call, CPU)[0]


def temporaries(measured: Step, clock: Clock) -> int:
    """Return the most bytes that a step, already warm, holds at once over its inputs and its results."""
    state = measured.prepare(0)
    peak, result = memory.peak_bytes(lambda: measured.run(state), clock.device)
    return peak - _bytes(result)


def _bytes(result: object) -> int:
    return sum(x.nbytes for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, Tensor))


def matrix_rate(clock: Clock | None = None, dtype: torch.dtype = torch.float32, turns: int = 5) -> float:
    """Return the FLOP/s of a large matrix product, the rate that arithmetic floors are stated in."""
    clock = Clock() if clock is None else clock
    size = 8192 if clock.on_gpu else 2048
    if dtype == torch.float64:
        size //= 2
    a = torch.randn(size, size, device=clock.device).to(dtype)
    return 2 * size**3 / alone(step(lambda: a @ a), turns, clock)


def copy_rate(clock: Clock | None = None, turns: int = 9) -> float:
    """Return the bytes/s of a large copy within the device's memory, counting those read and those written."""
    clock = Clock() if clock is None else clock
    a = torch.randn(2**28 if clock.on_gpu else 2**24, device=clock.device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / alone(step(lambda: b.copy_(a)), turns, clock)
