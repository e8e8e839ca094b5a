"""The least times of a call on an H100, of DRAM, L2, shared memory, products and instructions, at assumed rates.

Bytes, wavefronts and products are counted by `benchmarks.counts`, instructions by `issue`, and DRAM's bytes come from
the model of L2. Times follow from the rates below; none is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.counts import CHANNELS, DEPTH, IMAGES, MULTIPLY_ADDS, Item, N, multiply_adds
from benchmarks.limits.gpus import H100, resident_blocks
from benchmarks.limits.issue import Issued
from benchmarks.limits.l2 import Traffic, simulate
from benchmarks.limits.schedule import items_of, schedule_of
from ccgpu.kernels.cuda.configurations import ARITHMETICS
from ccgpu.kernels.cuda.plans import Launch, plan

MULTIPROCESSORS = H100.limits.multiprocessors
CLOCK = 1.755e9  # Hz
DRAM = 3.0e12  # bytes/s, reads and writes together: a large copy on an H100
L2 = 5.5e12  # bytes/s, likewise
SCHEDULERS = 4  # of a multiprocessor; each issues one instruction a clock
# Clocks of a scheduler for an mma.sync, m16n8k16 in 16 bits or m16n8k8 in TF32: 64 % of the data sheet's rate.
PRODUCT = 6.26
FMAS = 128  # multiply-adds a clock and multiprocessor


class Times(NamedTuple):
    """What a call of `IMAGES` maps of N x N takes, at least; MB are 10^6 bytes, times are in microseconds.

    None: not counted. In the two stages DRAM's bytes are those of every tensor once.
    """

    kernel: str
    arithmetic: str
    entry: str
    blocks: int | None  # that the GPU holds
    passes: int  # through an image
    least_mb: float  # bytes of DRAM if nothing moves twice
    dram_mb: float
    l2_mb: float
    instructions_least: int | None  # of all warps
    instructions_most: int | None
    dram_us: float
    l2_us: float
    shared_us: float
    products_us: float
    issue_us: float | None  # of instructions_most

    @property
    def parts(self) -> tuple[float, ...]:
        """The times that are known."""
        return tuple(x for x in self[-5:] if x is not None)

    @property
    def largest(self) -> float:
        """The time if everything overlaps."""
        return max(self.parts)

    @property
    def sum(self) -> float:
        """The time if nothing overlaps."""
        return sum(self.parts)


class Parts(NamedTuple):
    """What the model of L2 alone says of a call's times, in microseconds, on an H100."""

    dram: float
    l2: float
    products: float

    @property
    def largest(self) -> float:
        """The time if these overlap."""
        return max(self)


def parts_of(launches: Sequence[Launch], traffic: Traffic) -> Parts:
    """Return the times of a call in an arithmetic of matrix products, from its traffic."""
    products = 0
    for launch in launches:
        s, items, configuration = schedule_of(launch), items_of(launch), launch.configuration
        each = MULTIPLY_ADDS[configuration.arithmetic]
        for first in (True, False):
            number = int((items.exists & (items.first == first)).sum())
            channels = s.channels // (s.cuts * s.passes)
            products += number * multiply_adds(configuration, first, s.depth, channels) // each
    clocks = SCHEDULERS * MULTIPROCESSORS * CLOCK
    return Parts(traffic.dram / DRAM * 1e6, traffic.asked / L2 * 1e6, products * PRODUCT / clocks * 1e6)


def _dram(item: Item, lag: int, cuts: int, hints: bool) -> tuple[int | None, float, float]:
    """Return resident blocks, the least bytes of DRAM and those of the model."""
    if item.kernel in ("forward", "backward"):
        launches = plan(
            item.kernel, item.arithmetic, IMAGES, (N, N), DEPTH, CHANNELS, H100.limits, lag, cuts, item.passes
        )
        blocks = [resident_blocks(launch.configuration, H100) for launch in launches]
        traffic = simulate(launches, H100.l2_bytes, blocks, hints)
        return blocks[0], traffic.least, traffic.dram
    kind = ARITHMETICS[item.arithmetic]
    operands = 2 * (DEPTH if item.kernel == "affinity" else CHANNELS) * kind.size
    least = IMAGES * N * N * (operands + (2 * N - 1) * kind.sum)
    return None, least, least


def times(
    first: Item, later: Item, issued: Mapping[str, Issued], lag: int = 0, cuts: int = 1, hints: bool = True
) -> Times:
    """Return what a call takes, from the items of its two phases and their instructions, by phase if these are known.

    With `cuts`, only DRAM's bytes are those of a call whose channels are cut.
    """
    lines = IMAGES * N * first.passes  # of one axis, in all passes
    blocks, least, dram = _dram(first, lag, cuts, hints)
    asked = lines * (first.bytes + later.bytes)
    clocks = MULTIPROCESSORS * CLOCK
    if first.matrix_multiplies:
        products = (first.matrix_multiplies + later.matrix_multiplies) * PRODUCT / SCHEDULERS
    else:
        products = (first.multiply_adds + later.multiply_adds) / FMAS
    few = lines * sum(x.least for x in issued.values()) if issued else None
    most = lines * sum(x.most for x in issued.values()) if issued else None
    return Times(
        first.kernel,
        first.arithmetic,
        first.entry,
        blocks,
        first.passes,
        least / 1e6,
        dram / 1e6,
        asked / 1e6,
        few,
        most,
        dram / DRAM * 1e6,
        asked / L2 * 1e6,
        lines * (first.wavefronts + later.wavefronts) / clocks * 1e6,
        lines * products / clocks * 1e6,
        None if most is None else most / (SCHEDULERS * clocks) * 1e6,
    )
