"""The items of a launch in the order of their tickets, as schedule.cuh gives them to blocks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ccgpu.kernels.cuda import plans
from ccgpu.kernels.cuda.plans import Axis, Launch


class Schedule(NamedTuple):
    """What a launch tells its kernel about the order of work."""

    images: int
    positions: int  # of an image
    depth: int
    channels: int
    lag: int
    cuts: int
    passes: int
    before: int  # phases of the call in earlier launches
    after: int  # and in later ones
    axes: tuple[Axis, ...]


class Items(NamedTuple):
    """An array element for each ticket, with the names of `Item` in schedule.cuh, where `pass_number` is `pass`."""

    exists: np.ndarray
    first: np.ndarray
    after: np.ndarray
    image: np.ndarray
    pass_number: np.ndarray
    unit: np.ndarray
    wanted: np.ndarray
    axis: np.ndarray
    start: np.ndarray
    inner: np.ndarray
    query: np.ndarray
    key: np.ndarray
    queries: np.ndarray
    keys: np.ndarray
    cut: np.ndarray


def schedule_of(launch: Launch) -> Schedule:
    """Return what a launch tells its kernel about the order of work."""
    numbers = plans._TAIL.unpack(launch.numbers)
    images, positions, depth, channels, _, lag, cuts, passes, axes, before, after = numbers[:11]
    described = [Axis(*numbers[11 + 5 * a : 16 + 5 * a]) for a in range(axes)]
    return Schedule(images, positions, depth, channels, lag, cuts, passes, before, after, tuple(described))


def items_of(launch: Launch) -> Items:
    """Return the items of all tickets of a launch."""
    s = schedule_of(launch)
    ticket = np.arange(launch.blocks)
    phase_items = np.array([axis.segments * axis.lines * s.cuts for axis in s.axes])
    axis_segments = np.array([axis.segments for axis in s.axes])
    axis_items = axis_segments * phase_items
    ends = np.cumsum(axis_items)
    rest = ticket % ends[-1]
    axis = np.searchsorted(ends, rest, side="right")
    length, inner, _, segments, span = np.array([x[:5] for x in s.axes]).T[:, axis]
    rest = rest - (ends - axis_items)[axis]
    shift, part = rest // phase_items[axis], rest % phase_items[axis] // s.cuts
    line, segment = part // segments, part % segments
    phase = (np.cumsum(axis_segments) - axis_segments)[axis] + shift
    unit = ticket // ends[-1] - phase * s.lag
    image, pass_number = unit // s.passes, unit % s.passes
    query, key = segment * span, (segment + shift) % segments * span
    return Items(
        exists=(unit >= 0) & (unit < s.images * s.passes),
        first=s.before + phase == 0,
        after=axis_segments.sum() - 1 - phase + s.after,
        image=image,
        pass_number=pass_number,
        unit=unit,
        wanted=(ends - axis_items)[axis] + shift * phase_items[axis],
        axis=axis,
        start=image * s.positions + line // inner * length * inner + line % inner,
        inner=inner,
        query=query,
        key=key,
        queries=np.minimum(span, length - query),
        keys=np.minimum(span, length - key),
        cut=pass_number * s.cuts + rest % s.cuts,
    )
