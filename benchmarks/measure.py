"""Time and memory of a callable, and the machine's own rates."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

# The profiler, which counts the memory, announces every start and stop on stderr otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from torch.profiler import ProfilerActivity, profile


class Timing(NamedTuple):
    """Seconds: the median and the 20 and 80 % quantiles."""

    median: float
    low: float
    high: float


def interleaved(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Time every call `repeats` times, taking turns, so that what slows the machine down slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn > 0:  # the first turn warms caches and allocators
                seconds[name].append(time.perf_counter() - start)
    return {name: _quantiles(values) for name, values in seconds.items()}


def _quantiles(values: list[float]) -> Timing:
    if len(values) < 2:
        return Timing(values[0], values[0], values[0])
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return Timing(statistics.median(values), cuts[0], cuts[-1])


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the most bytes that torch's CPU allocator holds at once during the call, over what it held before."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    del result
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def matrix_rate(size: int = 2048, repeats: int = 5) -> float:
    """Return the FLOP/s of a large float32 matrix product, the rate that arithmetic floors are stated in."""
    a = torch.randn(size, size)
    timing = interleaved({"mm": lambda: a @ a}, repeats)["mm"]
    return 2 * size**3 / timing.median
