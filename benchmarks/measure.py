"""Measure the time and memory of a step, and the machine's own rates of copying and multiplying."""

from __future__ import annotations

import itertools
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
PRODUCT = 0.2  # seconds that a product may take of which the rate is measured
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


def warm_up(measured: Step, clock: Clock, ran_before: bool = False) -> float:
    """Run a step until caches, allocators and compilers are warm; return its seconds on the host.

    It runs WARM_UPS times, or only twice if that takes long, as it does with compilers; only once if a step that ran
    before takes long.
    """
    start = time.perf_counter()
    fewest, long = (1, LONG / 20) if ran_before else (2, LONG)
    for number in range(WARM_UPS):
        seconds = clock.host(measured, number)
        if number + 1 >= fewest and time.perf_counter() - start > long:
            break
    return seconds


def interleaved(
    steps: Mapping[str, Step],
    turns: int,
    clock: Clock | None = None,
    share: float = float("inf"),
    ran_before: bool = False,
) -> dict[str, Timing | Exception]:
    """Time every step `turns` times, in turns, so that anything that slows the machine down slows all of them.

    Each call gets the next set of inputs. A step that needs more than `share` seconds for its turns gets fewer, but
    at least FEWEST, spread over the time of the others; a step that raises is left out, and the exception is its
    result instead of a Timing.
    """
    clock = Clock() if clock is None else clock
    results: dict[str, Timing | Exception] = {}
    head_starts: dict[str, float] = {}
    seconds: dict[str, list[float]] = {}
    for name, measured in steps.items():
        try:
            head_starts[name] = 2 * warm_up(measured, clock, ran_before) + 2e-5
            seconds[name] = []
        except Exception as error:  # whatever a peer raises is its result
            results[name] = error
    numbers = itertools.count()

    def turn(name: str) -> None:
        try:
            seconds[name].append(clock.seconds(steps[name], next(numbers), head_starts[name]))
        except Exception as error:
            results[name] = error
            del seconds[name]

    for _ in range(min(FEWEST, turns)):
        for name in list(seconds):
            turn(name)
    more = {name: _more_turns(values, turns, share) for name, values in seconds.items()}
    rounds = max(more.values(), default=0)
    for number in range(rounds):
        for name, count in more.items():
            if name in seconds and (number + 1) * count // rounds > number * count // rounds:
                turn(name)
    return results | {name: quantiles(values) for name, values in seconds.items()}


def _more_turns(values: list[float], turns: int, share: float) -> int:
    """Return how many more turns a step gets after its first ones: up to `turns` in `share` seconds, all together."""
    left, mean = max(0.0, share - sum(values)), max(statistics.fmean(values), 1e-9)
    return int(min(max(0, turns - len(values)), left / mean))


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
    """Return the FLOP/s of a large matrix product: the rate from which lower bounds of time are computed.

    On a CPU the product is as large as PRODUCT seconds allow, because some multiply float16 a hundred times more slowly
    than float32.
    """
    clock = Clock() if clock is None else clock
    largest = 8192 if clock.on_gpu else 2048
    if dtype == torch.float64:
        largest //= 2
    size = largest if clock.on_gpu else largest // 8
    while True:
        a = torch.randn(size, size, device=clock.device).to(dtype)
        product = step(lambda a=a: a @ a)  # type: ignore[misc]
        if size == largest or warm_up(product, clock) > PRODUCT / 8:
            return 2 * size**3 / alone(product, turns, clock)
        size *= 2


def copy_rate(clock: Clock | None = None, turns: int = 9) -> float:
    """Return the bytes/s of a large copy within the device's memory; bytes read and bytes written both count."""
    clock = Clock() if clock is None else clock
    a = torch.randn(2**28 if clock.on_gpu else 2**24, device=clock.device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / alone(step(lambda: b.copy_(a)), turns, clock)
