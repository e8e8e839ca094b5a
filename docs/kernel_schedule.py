"""Read the order of work and the places in shared memory from the CUDA sources, for the figures of docs/kernels.md.

The headers of kernels/cuda/ are compiled for the CPU, so the figures show what the shipped source does.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from benchmarks.counts import CHANNELS, DEPTH, H100
from ccgpu.kernels.cuda.configurations import FOLDER
from ccgpu.kernels.cuda.plans import Launch, Pointers, plan
from tests.cuda_on_cpu import device

BEFORE = 1 / 9  # the share of an item's work that precedes its wait in `simulate`: as much as a chunk, of eight


class Item(NamedTuple):
    """The item of work that kernels/cuda/schedule.cuh assigns to a ticket; `query` and `key` are segments of a line."""

    exists: bool
    image: int
    axis: int
    wanted: int
    query: int
    key: int
    unit: int
    cut: int


KERNELS = """
extern "C" __global__ void order(const __grid_constant__ Arguments a) {
  const Item x = item_of(a, blockIdx.x);
  const int span = a.axis[x.axis].span, row[8] = {x.exists, x.image, x.axis, x.wanted,
                                                  x.query / span, x.key / span, x.unit, x.cut};
  for (int i = 0; i < 8; i++)
    store_global<int>((int *)a.out + blockIdx.x * 8 + i, row[i]);
}
extern "C" __global__ void swizzle(const __grid_constant__ Arguments a) {
  for (int row = 0; row < 8; row++)
    for (int unit = 0; unit < 8; unit++)
      store_global<int>((int *)a.out + row * 8 + unit, offset<8>(row, unit) / 16 - row * 8);
}
"""


def look_up(entry: str, launch: Launch, shape: tuple[int, int]) -> np.ndarray:
    """Run one of KERNELS, with the shipped headers, on the CPU and return the int32 array that it writes."""
    headers = "".join((FOLDER / name).read_text() for name in ("tiles.cuh", "schedule.cuh"))
    lines = [line for line in headers.splitlines() if not line.startswith(("#pragma once", "#include"))]
    text = "\n".join(['#include "primitives.cuh"', *lines, KERNELS])
    out = np.zeros(shape, np.int32)
    arguments = launch.arguments(Pointers(out=out.ctypes.data), 0)
    blocks = launch.blocks if entry == "order" else 1
    device.compile(text, ["order", "swizzle"]).launch(entry, blocks, 1, arguments, 0, [("out", out, True)])
    return out


def order(images: int, sizes: tuple[int, ...], lag: int = 0, cuts: int = 1, passes: int = 1) -> list[Item]:
    """Return the items of a forward call of a single launch, in the order of tickets."""
    (launch,) = plan("forward", "bf16", images, sizes, DEPTH, CHANNELS, H100, lag=lag, cuts=cuts, passes=passes)
    rows = look_up("order", launch, (launch.blocks, len(Item._fields))).tolist()
    return [Item(bool(exists), *rest) for exists, *rest in rows]


def places() -> list[list[int]]:
    """Return the place, in units from the row's start, of each of the 8 units of rows 0 ... 7 of 128 bytes."""
    (launch,) = plan("forward", "bf16", 1, (2, 2), DEPTH, CHANNELS, H100)
    return look_up("swizzle", launch, (8, 8)).tolist()


def simulate(items: list[Item], slots: int) -> list[tuple[int, float, float, float]]:
    """Simulate block slots; return (slot, begin, end of the wait, end) of each item.

    Every item takes one unit of time beside its wait. Blocks begin in the order of tickets, as slots become free.
    """
    free = [0.0] * slots
    ends: dict[int, list[float]] = {}
    times = []
    for item in items:
        slot = min(range(slots), key=lambda s: free[s])
        begin = free[slot]
        if not item.exists:
            times.append((slot, begin, begin, begin))
            continue
        done = sorted(ends.setdefault(item.unit, []))
        ready = done[item.wanted - 1] if item.wanted else 0.0
        resumed = max(begin + BEFORE, ready)
        free[slot] = resumed + 1 - BEFORE
        ends[item.unit].append(free[slot])
        times.append((slot, begin, resumed, free[slot]))
    return times
