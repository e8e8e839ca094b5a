"""What compiled code is called with: two blocks of 64-bit integers in memory, which Python passes at little cost.

A plan is all of a call that does not change with the addresses: sizes, strides of the maps, phases. It is kept for the
next call of the same shapes. The other block holds a call's addresses: those of the maps, in the order of the kernel's
operands, then those of arrays of numbers, last that of the memory that the threads of the call share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import carray
from numba.extending import register_jitable
from numpy.typing import NDArray

from ccgpu.kernels.numba_cpu.attention import Sizes
from ccgpu.kernels.numba_cpu.lines import Map
from ccgpu.kernels.numba_cpu.matrices import compiled
from ccgpu.kernels.numba_cpu.tickets import PHASE, Phase, numbers_of

Block = NDArray[np.int64]

MAPS, ADDRESSES = 8, 12  # most maps, and most addresses, of a call
_SIZES, _STATE, _STRIDES = 1, 6, 7  # where the parts of a plan begin, after the number of phases
_PHASES = _STRIDES + 3 * MAPS


def plan_block(sizes: Sizes, state: int, maps: Sequence[Map], phases: Sequence[Phase]) -> Block:
    """Return the block of a plan.

    Args:
        sizes: of the problem, whose scale is left out.
        state: bytes of an array (images, positions) in the shared memory.
        maps: whose strides count.
        phases: of the call.
    """
    block = np.zeros(_PHASES + len(phases) * PHASE, np.int64)
    block[0] = len(phases)
    block[_SIZES:_STATE] = sizes.positions, sizes.depth, sizes.channels, sizes.neighbours, sizes.width
    block[_STATE] = state
    for number, layout in enumerate(maps):
        block[_STRIDES + 3 * number :][:3] = layout.image, layout.position, layout.channel
    block[_PHASES:] = numbers_of(phases).reshape(-1)
    return block


@compiled
def plan_at(pointer: Any) -> Block:
    """Return the block of a plan, which a pointer points to."""
    count = carray(pointer, 1)[0]
    return carray(pointer, _PHASES + count * PHASE)


@compiled
def addresses_at(pointer: Any) -> Block:
    """Return the block of a call's addresses, which a pointer points to."""
    return carray(pointer, ADDRESSES)


@compiled
def phases_of(plan: Block) -> Block:
    """Return the phases of a plan, a row for each."""
    return plan[_PHASES:].reshape(plan[0], PHASE)


@compiled
def sizes_of(plan: Block, scale: float) -> Sizes:
    """Return the sizes of a plan with a call's scale."""
    n = plan[_SIZES:]
    return Sizes(n[0], n[1], n[2], scale, n[3], n[4])


@register_jitable  # which, unlike `compiled`, compiles it once and not for each literal among its arguments
def state_of(plan: Block, shared: int, number: int) -> int:
    """Return the address of an array (images, positions) in the shared memory: the first one, or the second."""
    return shared + number * plan[_STATE]


@register_jitable  # likewise
def map_of(plan: Block, addresses: Any, number: int) -> Map:
    """Return a map of a call: its address, and the strides that the plan has for it."""
    n = plan[_STRIDES + 3 * number :]
    return Map(addresses[number], n[0], n[1], n[2])
