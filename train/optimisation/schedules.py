"""Learning-rate schedules: functions of the iteration, counted from 0, for a run of N iterations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

Schedule: TypeAlias = Callable[[int], float]
SCHEDULES = ("poly", "mmseg-poly", "cosine", "constant")
POWER = 0.9


def build_schedule(
    name: str, lr: float, iterations: int, *, power: float = POWER, min_lr: float = 0.0, warmup_steps: int = 0
) -> Schedule:
    """Return the schedule `name` with its warm-up.

    Args:
        name: one of `SCHEDULES`.
        lr: the learning rate from which the schedule starts, more than 0.
        iterations: N, the iterations of the run, 1 or more.
        power: of the poly schedules.
        min_lr: the learning rate towards which the schedule falls, 0 .. lr; the constant schedule has none.
        warmup_steps: see `warmed_up`; 0: no warm-up.

    Raises:
        ValueError: there is no such schedule.
    """
    if name == "poly":
        schedule = poly(lr, iterations, power, min_lr)
    elif name == "mmseg-poly":
        schedule = mmseg_poly(lr, iterations, power, min_lr)
    elif name == "cosine":
        schedule = cosine(lr, iterations, min_lr)
    elif name == "constant":
        schedule = constant(lr)
    else:
        raise ValueError(f"build_schedule: name must be one of {', '.join(SCHEDULES)}, got {name!r}.")
    return warmed_up(schedule, warmup_steps) if warmup_steps else schedule


def poly(lr: float, iterations: int, power: float = POWER, min_lr: float = 0.0) -> Schedule:
    """Return the schedule i -> (lr - min_lr) * (1 - i / N) ** power + min_lr.

    With min_lr = 0 it is the paper's and the authors' (Huang et al., TPAMI 2020, section 4.2).
    """
    return lambda iteration: (lr - min_lr) * (1 - iteration / iterations) ** power + min_lr


def mmseg_poly(lr: float, iterations: int, power: float = POWER, min_lr: float = 0.0) -> Schedule:
    """Return the schedule i -> (lr - min_lr) * (1 - i / (N - 1)) ** power + min_lr, whose last value is min_lr.

    It is mmsegmentation's (`PolyLR` of mmengine, with `eta_min`). A single iteration has lr.
    """
    return lambda iteration: (lr - min_lr) * (1 - iteration / max(iterations - 1, 1)) ** power + min_lr


def cosine(lr: float, iterations: int, min_lr: float = 0.0) -> Schedule:
    """Return the schedule i -> (lr - min_lr) * (1 + cos(pi * i / N)) / 2 + min_lr.

    It is that of Loshchilov & Hutter, "SGDR", 2017, without restarts.
    """
    return lambda iteration: (lr - min_lr) * (1 + math.cos(math.pi * iteration / iterations)) / 2 + min_lr


def constant(lr: float) -> Schedule:
    """Return the schedule i -> lr."""
    return lambda iteration: lr


def warmed_up(schedule: Schedule, steps: int) -> Schedule:
    """Return the schedule i -> schedule(i) * (i + 1) / steps for i < steps, and schedule(i) from there on.

    Args:
        schedule: the schedule without warm-up.
        steps: iterations of the warm-up, 1 or more.
    """
    return lambda iteration: schedule(iteration) * min((iteration + 1) / steps, 1.0)
