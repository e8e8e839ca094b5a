"""Runs a PTX kernel: blocks, and the order in which they take turns.

Units of several resident blocks take turns of random length, as a seed decides, and some are starved for a while. A
launch in which nothing but reading and counting happens any more is a deadlock.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import numpy as np

from tests.ptx.memory import SHARED_START, Buffer, Fault, GlobalMemory, SharedMemory
from tests.ptx.parse import Instruction, Kernel
from tests.ptx.registers import WARP
from tests.ptx.unit import Unit, pieces
from tests.ptx.visibility import Clock

MOST_SHARED = 227 * 1024
SPINS = 20_000  # turns without progress that are a deadlock
WEIGHTS = (1.0, 1.0, 1.0, 0.01)  # of a block, and of a unit in its block, for getting the next turn
TURNS = (1, 1, 2, 5, 10, 40)  # basic blocks
CHANGES = 0.05  # how often, in turns, a block's weights change


class Counts(NamedTuple):
    """What a launch executed: instructions of units, turns that blocks took, and the PTX lines that were reached."""

    instructions: int
    turns: int
    lines: frozenset[int]


class Slot:
    """Room for a resident block: its units and its shared memory."""

    def __init__(self, launch: Launch, lockstep: bool) -> None:
        self.launch, self.shared = launch, SharedMemory(launch.shared_bytes)
        threads = np.arange(math.prod(launch.block))
        parts = [threads] if lockstep else list(threads.reshape(-1, WARP))
        self.clock = Clock(len(threads) // WARP)
        self.units = [Unit(self, part) for part in parts]
        self.weight = 1.0
        self.barrier: Instruction | None = None  # at which a thread waits

    def start(self, block: int) -> None:
        """Start a block."""
        grid = self.launch.grid
        self.shared.reset()
        self.clock.start(block)
        self.barrier = None
        for unit in self.units:
            unit.start(block, (block % grid[0], block // grid[0] % grid[1], block // (grid[0] * grid[1])))
        self.reweigh()

    def reweigh(self) -> None:
        """Draw how often the block and each of its units get a turn: one in four hardly ever."""
        self.weight = self.launch.random.choice(WEIGHTS)
        for unit in self.units:
            unit.weight = self.launch.random.choice(WEIGHTS)

    def run(self, turn: int) -> bool:
        """Let a unit run for some basic blocks; return whether there was progress."""
        ready = [unit for unit in self.units if unit.ready()]
        if not ready:
            self._release()
            return True
        unit, progress = self.launch.random.choices(ready, [u.weight for u in ready])[0], False
        for _ in range(turn):
            piece = unit.step()
            self.launch.instructions += piece.end - piece.first
            progress |= piece.progress
            if piece.sleeps or not unit.ready():
                break
        return progress

    def _release(self) -> None:
        """All threads that have not exited wait at a barrier: let them on."""
        self.shared.pass_barrier()
        self.clock.pass_barrier()
        self.barrier = None
        for unit in self.units:
            unit.waiting.fill(False)
            unit.gather()

    @property
    def done(self) -> bool:
        return all(unit.done for unit in self.units)


class Launch:
    """A launch of a kernel; `run` executes it."""

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        parameters: bytes,
        buffers: list[Buffer],
        shared_bytes: int,
        seed: int,
    ) -> None:
        missing = kernel.parameter_bytes - len(parameters)
        if not 0 <= missing < 8:  # a struct's padding at its end may be left out
            raise ValueError(f"launch: {kernel.name} takes {kernel.parameter_bytes} bytes, got {len(parameters)}")
        if math.prod(block) % WARP:
            raise ValueError(f"launch: a block must have whole warps, got {block}")
        self.kernel, self.grid, self.block = kernel, grid, block
        self.memory, self.random = GlobalMemory(buffers), random.Random(seed)
        self.parameters = np.frombuffer(parameters + b"\xff" * missing, np.uint8)
        self.pieces, self.labels = pieces(kernel)
        self.addresses = dict(kernel.parameters)
        self.instructions, self.reached = 0, set[int]()
        self.shared_bytes = self._place("shared", SHARED_START, shared_bytes) - SHARED_START
        self.local_bytes = self._place("local", 0, 0)
        if self.shared_bytes > MOST_SHARED:
            raise ValueError(f"launch: a block has at most {MOST_SHARED} bytes of shared memory")

    def _place(self, space: str, start: int, dynamic: int) -> int:
        """Give the variables of a space addresses, dynamic shared memory last; return the end."""
        own = [v for v in self.kernel.variables.values() if v.space == space]
        end = start
        for variable in sorted(own, key=lambda v: v.size is None):
            end = -(-end // variable.align) * variable.align
            self.addresses[variable.name] = end
            end += variable.size or 0
        return end + dynamic

    def run(self, resident: int, lockstep: bool) -> Counts:
        """Execute all blocks, `resident` at a time, in a random order."""
        number, turns, spins = math.prod(self.grid), 0, 0
        left = list(range(number))
        self.random.shuffle(left)
        slots = [Slot(self, lockstep) for _ in range(min(resident, number))]
        running = []
        for slot in slots:
            slot.start(left.pop())
            running.append(slot)
        while running:
            slot = self.random.choices(running, [s.weight for s in running])[0]
            progress = slot.run(self.random.choice(TURNS))
            turns += 1
            if self.random.random() < CHANGES:
                self.random.choice(running).reweigh()
            spins = 0 if progress else spins + 1
            if spins > SPINS:
                raise Fault(self._stuck(running))
            if slot.done:
                if left:
                    slot.start(left.pop())
                else:
                    running.remove(slot)
        reached = (self.kernel.instructions[p.first : p.end] for p in (self.pieces[n] for n in self.reached))
        return Counts(self.instructions, turns, frozenset(i.line for piece in reached for i in piece))

    def _stuck(self, running: list[Slot]) -> str:
        where = "; ".join(f"block {s.units[0].block}: " + ", ".join(u.where() for u in s.units) for s in running)
        return f"{self.kernel.name}: deadlock: no resident block makes progress; {where}"


def run(
    kernel: Kernel,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    parameters: bytes,
    buffers: list[Buffer],
    shared_bytes: int = 0,
    seed: int = 0,
    resident: int = 3,
    lockstep: bool = True,
) -> Counts:
    """Run a kernel to its end.

    Args:
        kernel: from `parse`.
        grid, block: numbers of blocks and of threads; a block has whole warps.
        parameters: the bytes of the kernel's parameters, laid out as a struct.
        buffers: all global memory that the kernel may access.
        shared_bytes: dynamic shared memory of a block.
        seed: decides the order of blocks and their turns.
        resident: blocks that run at the same time.
        lockstep: whether the warps of a block run together, or each by itself in random turns.

    Raises:
        Fault: the kernel did something forbidden; the message names the kernel, the block, and the PTX line.
        PtxError: it has an instruction that the machine does not know.
    """
    with np.errstate(all="ignore"):
        return Launch(kernel, grid, block, parameters, buffers, shared_bytes, seed).run(resident, lockstep)
