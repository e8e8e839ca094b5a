"""What compiled code is called with: two blocks of 64-bit words in memory, which cost Python little to pass.

A plan is all of a call that does not change with the addresses: sizes, strides of the maps, phases. It is kept for the
next call of the same shapes. The other block is the call: the plan's address, the threads' memory, and the addresses of
the maps, in the order of the kernel's operands, then those of arrays of numbers, last that of the memory that the
threads of the call share. A kernel takes the address of that block alone, as OpenMP's threads call functions.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic, register_jitable
from numpy.typing import NDArray

from ccgpu.kernels.numba_cpu.attention import Sizes
from ccgpu.kernels.numba_cpu.lines import Map
from ccgpu.kernels.numba_cpu.matrices import compiled
from ccgpu.kernels.numba_cpu.tickets import PHASE, Phase, numbers_of
from ccgpu.kernels.numba_cpu.vectors import load

Block = NDArray[np.int64]

MAPS, ADDRESSES = 8, 12  # most maps, and most addresses, of a call
_SIZES, _STATE, _STRIDES = 1, 6, 7  # where the parts of a plan begin, after the number of phases
_PHASES = _STRIDES + 3 * MAPS
_CALL = "qdqqqq"  # the words of a call before its addresses: the fields of `Call`
_PACK = [struct.Struct(f"{_CALL}{n}q").pack for n in range(ADDRESSES + 1)]
_I64 = ir.IntType(64)


class Call(NamedTuple):
    """What a call says besides its addresses."""

    plan: int  # address of the plan
    scale: float  # factor of the energies
    counters: int  # address of `tickets.new_counters`; 0: one thread works alone
    memory: int  # address of the memory of the thread that has number 0; those of the others follow
    size: int  # bytes of a thread's memory
    number: int  # address of the function that returns a thread's number; 0: it is 0


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


def call_block(call: Call, addresses: Sequence[int]) -> bytes:
    """Return the block of a call: with the addresses of its maps and numbers, and of the shared memory."""
    return _PACK[len(addresses)](*call, *addresses)


@intrinsic
def words_at(typingctx: Any, address: Any) -> Any:
    """Return a pointer to the 64-bit words at an address."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], _I64.as_pointer())

    return types.CPointer(types.int64)(types.int64), codegen


@intrinsic
def _number_by(typingctx: Any, function: Any) -> Any:
    """Return what the C function at an address returns: an int; it takes nothing."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        return builder.sext(builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), []), _I64)

    return types.int64(types.int64), codegen


@compiled
def call_at(address: int) -> Call:
    """Return what the block of a call says."""
    n = carray(words_at(address), len(_CALL))
    return Call(n[0], load(np.float64(0), address + 8), n[2], n[3], n[4], n[5])


@compiled
def own_memory(call: Call) -> int:
    """Return the address of the memory of the thread that asks."""
    return call.memory + (call.size * _number_by(call.number) if call.number else 0)


@compiled
def plan_at(address: int) -> Block:
    """Return the block of a plan."""
    count = carray(words_at(address), 1)[0]
    return carray(words_at(address), _PHASES + count * PHASE)


@compiled
def addresses_at(call: int) -> Block:
    """Return the addresses of the call at an address."""
    return carray(words_at(call + 8 * len(_CALL)), ADDRESSES)


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
