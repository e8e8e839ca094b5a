"""Instructions that the warps of a block execute for an item of work, from the machine code of the shipped kernels.

tests/cuda_on_cpu executes an item and counts its operations (`benchmarks.counts`); the machine code must hold ways
whose operations add up to the same numbers. So a wrong reading of the code is an error and not a wrong number.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from benchmarks import nvrtc
from benchmarks.counts import Item
from benchmarks.limits import sass
from benchmarks.limits.paths import NAMES, Marks, Way, Ways, marks_of, ways
from benchmarks.registers import CUPY_OPTIONS, REPORT, read_report
from ccgpu.kernels.cuda.configurations import ARITHMETICS, OPTIONS, UNIT, Configuration, source

SHORT_LOOPS = 16  # most turns of a loop that is not over the chunks of channels
# Stores of numbers, one for a position, which not all warps of a block execute; results of a tile are many more.
UNEVEN_STORES = 3  # most of a warp


class Kernel(NamedTuple):
    """A kernel as compiled for a GPU."""

    configuration: Configuration
    code: sass.Function
    registers: int
    stack_bytes: int
    spill_bytes: int  # stores and loads

    @property
    def local_accesses(self) -> int:
        """Instructions that access local memory."""
        count = self.code.count()
        return count["STL"] + count["LDL"]

    @property
    def constant_loads(self) -> int:
        """Loads of global memory as read-only data (`ld.global.nc`)."""
        return sum(x.name == "LDG" and ".CONSTANT" in x.opcode for x in self.code.instructions())


class Issued(NamedTuple):
    """Instructions of all warps of a block for an item; they lie between `least` and `most`."""

    most: int
    least: int
    names: dict[str, int]  # of `most`, by opcode


def compile_kernel(configuration: Configuration, target: str) -> Kernel:
    """Compile a configuration as CuPy does, and read its machine code.

    Raises:
        nvrtc.NotInstalled: there is no NVRTC or no nvdisasm.
        nvrtc.CompileError: it does not compile.
    """
    options = (*OPTIONS, *CUPY_OPTIONS, REPORT)
    compiled = nvrtc.compile_source(source(configuration), target, options, configuration.entry)
    registers, stack, stores, loads = read_report(compiled.log, configuration.entry)
    code = sass.parse(sass.disassemble(compiled.code), configuration.entry)
    return Kernel(configuration, code, registers, stack, stores + loads)


def chunks(configuration: Configuration, channels: int) -> int:
    """Return the chunks of channels of v."""
    return math.ceil(channels * ARITHMETICS[configuration.arithmetic].size / (UNIT * configuration.chunk_units))


def turns(kernel: Kernel, channels: int) -> dict[sass.Loop, range]:
    """Return how often each loop may run in an item with so many channels of v.

    A loop over the chunks of channels has products, a barrier of the block and accesses to global memory, and runs once
    for each. Other loops with products, matrix loads or copies run a few times, so that the counts decide how often;
    loops without run once.

    Raises:
        ValueError: there is no loop over the chunks.
    """
    code, found = kernel.code, {}
    number = chunks(kernel.configuration, channels)
    for loop in code.loops:
        count, marks = code.count(loop.body), marks_of(code.instructions(loop.body))
        if marks.products and count["BAR"] and count["LDGSTS"] + count["STG"] + count["RED"]:
            found[loop] = range(number, number + 1)
        else:
            found[loop] = range(1, SHORT_LOOPS + 1) if any(marks[:3]) else range(1, 2)
    if not any(marks_of(code.instructions(x.body)).products and x_range.start > 1 for x, x_range in found.items()):
        raise ValueError(f"turns: {code.name} must have a loop over {number} chunks of channels, and none is found")
    return found


def counted(item: Item) -> Marks:
    """Return the operations of an item."""
    return Marks(
        item.matrix_multiplies,
        item.matrix_load_wavefronts - item.matrix_load_conflicts,
        item.copy_wavefronts - item.copy_conflicts,
        item.store_wavefronts - item.store_conflicts,
        atomics=0,
    )


def issued(kernel: Kernel, item: Item) -> Issued:
    """Return the instructions of an item.

    All warps of a block go the same way, except that the last one owns fewer tiles if these do not divide evenly.
    One warp also takes the ticket and waits.

    Raises:
        ValueError: no ways through the machine code have the item's operations.
    """
    if kernel.configuration.entry != item.entry:
        raise ValueError(f"issued: item must be of {kernel.configuration.entry}, got {item.entry}")
    total, warps = counted(item), item.threads // 32
    uneven = kernel.configuration.tiles % kernel.configuration.row_tiles != 0
    most = Marks(*(math.ceil(x / (warps - uneven)) for x in total[:4]), 0)
    most = most._replace(stores=most.stores + UNEVEN_STORES)
    trips = turns(kernel, item.channels // item.passes)
    found = ways(kernel.code, trips.__getitem__, most)
    fitting = _blocks(found, total, warps, uneven)
    if not fitting:
        raise ValueError(
            f"issued: ways through {item.entry} must have the operations of a {item.phase} item, {total}, "
            f"and none of these do: {sorted(found)[-10:]}"
        )
    longest = max(fitting, key=lambda way: way.most)
    names = dict(zip(NAMES, longest.counts.tolist(), strict=True))
    return Issued(longest.most, min(way.least for way in fitting), names)


def _blocks(found: Ways, total: Marks, warps: int, uneven: bool) -> list[Way]:
    """Return the ways of all warps of a block that add up to the total."""
    full_warps, slack = warps - uneven, warps * UNEVEN_STORES
    lasts: dict[Marks, list[Marks]] = {}
    for marks in found if uneven else ():
        lasts.setdefault(marks._replace(stores=0), []).append(marks)
    fitting = []
    for full, way in found.items():
        rest = Marks(*(a - b for a, b in zip(total, full.times(full_warps), strict=True)))
        several = Way(*(full_warps * x for x in way))
        if uneven:
            near = [x for x in lasts.get(rest._replace(stores=0), ()) if abs(x.stores - rest.stores) <= slack]
            fitting += [several.plus(found[x]) for x in near if x.within(full)]
        elif not any(rest._replace(stores=0)) and abs(rest.stores) <= slack:
            fitting.append(several)
    return fitting
