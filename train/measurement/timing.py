"""Times of calls, and of the parts of one call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Clock:
    """What time is read from.

    Attributes:
        device: where the calls compute; the clock waits for a CUDA device.
        processor: whether to read the processor time of this process instead of the time of day. On the CPU, with one
            thread, both are the same on an idle machine, and processor time does not count the time that other
            processes take. It adds up all threads, so with several it says nothing about how long a call takes.
    """

    device: torch.device
    processor: bool = False

    def now(self) -> float:
        """Return the time in seconds, from any start."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.processor else time.perf_counter()


def milliseconds(call: Callable[[], object], clock: Clock, repeats: int) -> float:
    """Return the median time of a call; it must have been warmed up."""
    times = []
    for _ in range(repeats):
        start = clock.now()
        call()
        times.append(1e3 * (clock.now() - start))
    return statistics.median(times)


class Stopwatch:
    """The time that a computation spends in each of its parts: `enter` begins one and pauses the one before.

    Attributes:
        milliseconds: part -> its time so far; they add up to the time between the first and the last `enter`.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.milliseconds: dict[str, float] = {}
        self._part: str | None = None
        self._since = 0.0

    def enter(self, part: str | None) -> None:
        """Go over to a part, or stop with None."""
        now = self.clock.now()
        if self._part is not None:
            spent = 1e3 * (now - self._since)
            self.milliseconds[self._part] = self.milliseconds.get(self._part, 0.0) + spent
        self._part, self._since = part, now
