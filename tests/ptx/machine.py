"""Runs a PTX kernel: threads, blocks, and the order in which they take turns.

The threads of a unit, a block or a warp of it, are vectors: one instruction is executed for all threads that are at
it, those at the lowest instruction first, which is how threads that diverged meet again. Units of several resident
blocks take turns of random length, as a seed decides, and some blocks are starved; a launch in which nothing but
reading and counting happens any more is a deadlock.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tests.ptx.accesses import Copy
from tests.ptx.instructions import bind
from tests.ptx.memory import SHARED_START, Buffer, Fault, GlobalMemory, SharedMemory
from tests.ptx.parse import Immediate, Instruction, Kernel, PtxError, Symbol
from tests.ptx.registers import WARP, Registers

EXITED = 1 << 30  # in place of a basic block's number
MOST_SHARED = 227 * 1024
SPINS = 20_000  # basic blocks without progress that are a deadlock
BARRIERS = {"bar", "barrier"}
WEAK = {"volatile", "relaxed", "acquire", "release"}  # words of accesses by which blocks communicate
Step = Callable[[Any], None]


class Piece(NamedTuple):
    """A basic block: instructions first .. end - 1, the last one, if it is one, changing the flow."""

    first: int
    end: int
    flow: Instruction | None
    progress: bool
    sleeps: bool


class Counts(NamedTuple):
    """What a launch executed: instructions of units, and how often units of different blocks took turns."""

    instructions: int
    turns: int


def _is_flow(instruction: Instruction) -> bool:
    root = instruction.parts[0]
    return root in ("bra", "ret", "exit") or (root in BARRIERS and "warp" not in instruction.parts)


def _communicates(instruction: Instruction) -> bool:
    root = instruction.parts[0]
    return root in ("atom", "red", "membar", "fence") or (root in ("ld", "st") and bool(WEAK & set(instruction.parts)))


def pieces(kernel: Kernel) -> tuple[list[Piece], dict[str, int]]:
    """Return the basic blocks and the number of each label's; blocks may take turns between any two of them."""
    code = kernel.instructions
    starts = {0, *kernel.labels.values()} | {
        i + 1 for i, instruction in enumerate(code) if _is_flow(instruction) or _communicates(instruction)
    }
    starts |= {i for i, instruction in enumerate(code) if _communicates(instruction)}
    order = sorted(start for start in starts if start < len(code))
    result = []
    for first, end in zip(order, [*order[1:], len(code)], strict=True):
        flow = code[end - 1] if _is_flow(code[end - 1]) else None
        roots = {i.parts[0] for i in code[first:end]}
        result.append(
            Piece(first, end, flow, bool(roots & {"st", "red", "atom", "cp", "mma", "stmatrix"}), "nanosleep" in roots)
        )
    numbers = {start: n for n, start in enumerate(order)}
    return result, {label: numbers.get(at, len(order)) for label, at in kernel.labels.items()}


class Unit:
    """Threads of one block that run as vectors."""

    def __init__(self, slot: Slot, threads: np.ndarray) -> None:
        launch = slot.launch
        self.slot, self.kernel, self.count = slot, launch.kernel, len(threads)
        self.registers = Registers(launch.kernel, threads, launch.block, launch.grid)
        self.registers.context = launch.addresses
        self.memory, self.shared, self.parameters = launch.memory, slot.shared, launch.parameters
        self.warps = threads // WARP
        self.local = np.empty((self.count, launch.local_bytes), np.uint8)
        self.committed, self.copies = np.empty(self.count, np.int64), list[Copy]()
        self.block = 0
        self.at, self.waiting = np.empty(self.count, np.int64), np.empty(self.count, bool)
        self.together: int | None = 0  # the basic block that all threads are at
        self._code: list[list[Step] | None] = [None] * len(launch.pieces)
        self._flow: list[Any] = [None] * len(launch.pieces)

    @property
    def exited(self) -> np.ndarray:
        return self.at == EXITED if self.together is None else np.zeros(self.count, bool)

    @property
    def done(self) -> bool:
        return self.together is None and bool((self.at == EXITED).all())

    def start(self, block: int, place: tuple[int, int, int]) -> None:
        """Start another block."""
        self.block, self.together = block, 0
        self.registers.reset(place)
        self.local.fill(0xFF)
        self.committed.fill(0)
        self.copies.clear()
        self.waiting.fill(False)

    def ready(self) -> bool:
        """Tell whether a thread can run."""
        return self.together is not None or bool((~self.waiting & (self.at < EXITED)).any())

    def step(self) -> Piece:
        """Execute a basic block for the threads that are at the lowest one."""
        launch, mask = self.slot.launch, None
        if self.together is not None:
            number = self.together
        else:
            number = int(np.where(self.waiting, EXITED, self.at).min())
            mask = (self.at == number) & ~self.waiting
        piece = launch.pieces[number]
        code = self._code[number]
        if code is None:
            code = self._code[number] = [self._bound(i) for i in self.kernel.instructions[piece.first : piece.end]]
        place = piece.first
        try:
            for execute in code:
                execute(mask)
                place += 1
        except Fault as fault:
            raise self._located(self.kernel.instructions[place], fault) from None
        self._leave(number, piece, mask)
        return piece

    def _located(self, instruction: Instruction, reason: object) -> Fault:
        return Fault(
            f"{self.kernel.name}: block {self.block}, PTX line {instruction.line}: {instruction.text}; {reason}"
        )

    def _bound(self, instruction: Instruction) -> Step:
        """Return a function that executes an instruction where its guard holds."""
        if _is_flow(instruction):
            return lambda mask: None
        try:
            execute = bind(self, instruction)
        except (PtxError, KeyError, TypeError) as reason:
            raise PtxError(f"line {instruction.line}: {instruction.text}: {reason}") from reason
        if instruction.guard is None:
            return execute
        guard, negated = self.registers.rows[instruction.guard.name], instruction.guard.negated

        def guarded(mask: Any) -> None:
            held = ~guard if negated else guard.copy()
            if mask is not None:
                held &= mask
            if held.all():
                execute(None)
            elif held.any():
                execute(held)

        return guarded

    def _leave(self, number: int, piece: Piece, mask: Any) -> None:
        """Move the threads of a mask on to what follows a basic block."""
        flow, following = piece.flow, number + 1
        if flow is None:
            self._move(mask, following)
            return
        taken = None
        if flow.guard is not None:
            row = self.registers.rows[flow.guard.name]
            taken = ~row if flow.guard.negated else row.copy()
        if flow.parts[0] in BARRIERS:
            if taken is not None:
                raise self._located(flow, "a barrier under a predicate is not modelled")
            self._arrive(flow, mask, following)
            return
        if flow.parts[0] == "bra":
            label = flow.operands[0]
            assert isinstance(label, Symbol)
            target = self.slot.launch.labels[label.name]
        else:
            target = EXITED
        if taken is None:
            self._move(mask, target)
        elif mask is None and taken.all():
            self._move(None, target)
        elif mask is None and not taken.any():
            self._move(None, following)
        else:
            moving = np.ones(self.count, bool) if mask is None else mask
            self._scatter()
            self.at[moving & taken] = target
            self.at[moving & ~taken] = following
            self._gather()

    def _scatter(self) -> None:
        if self.together is not None:
            self.at.fill(self.together)
            self.together = None

    def _gather(self) -> None:
        first = int(self.at[0])
        if first < EXITED and not self.waiting.any() and (self.at == first).all():
            self.together = first

    def _move(self, mask: Any, to: int) -> None:
        if mask is None and to < EXITED:
            self.together = to
        elif mask is None:
            self._scatter()
            self.at.fill(to)
        else:
            self.at[mask] = to
            self._gather()

    def _arrive(self, flow: Instruction, mask: Any, following: int) -> None:
        """Make threads wait for all others of the block at barrier 0.

        An aligned barrier, and so bar.sync, is to be the same instruction for the whole block.
        """
        words = set(flow.parts[1:])
        if "sync" not in words or words - {"cta", "sync", "aligned"} or flow.operands != (Immediate(0),):
            raise self._located(flow, "the machine knows barrier 0 of all threads only; add it")
        self._scatter()
        here = np.ones(self.count, bool) if mask is None else mask
        if flow.parts[0] == "bar" or "aligned" in words:
            present, held = (x.reshape(-1, WARP) for x in (here, here | (self.at == EXITED)))
            if (present.any(1) & ~held.all(1)).any():
                raise self._located(flow, "an aligned barrier that a part of a warp reaches")
            other = self.slot.barrier
            if self.slot.launch.same_barrier and other is not None and other.line != flow.line:
                raise self._located(flow, f"an aligned barrier while others wait at the one of PTX line {other.line}")
        self.slot.barrier = flow
        self.at[here] = following
        self.waiting |= here

    def where(self) -> str:
        """Say where the unit's first thread that has not exited is."""
        at = self.together if self.together is not None else int(self.at.min())
        if at >= EXITED:
            return "done"
        instruction = self.kernel.instructions[self.slot.launch.pieces[at].first]
        return f"line {instruction.line}: {instruction.text}"


class Slot:
    """Room for a resident block: its units and its shared memory."""

    def __init__(self, launch: Launch, lockstep: bool) -> None:
        self.launch, self.shared = launch, SharedMemory(launch.shared_bytes)
        threads = np.arange(math.prod(launch.block))
        parts = [threads] if lockstep else list(threads.reshape(-1, WARP))
        self.units = [Unit(self, part) for part in parts]
        self.weight = 1.0
        self.barrier: Instruction | None = None  # at which a thread waits

    def start(self, block: int) -> None:
        """Start a block; a block in four is starved."""
        grid = self.launch.grid
        self.shared.reset()
        self.barrier = None
        for unit in self.units:
            unit.start(block, (block % grid[0], block // grid[0] % grid[1], block // (grid[0] * grid[1])))
        self.weight = self.launch.random.choice((1.0, 1.0, 1.0, 0.01))

    def run(self, turn: int) -> bool:
        """Let a unit run for some basic blocks; return whether there was progress."""
        ready = [unit for unit in self.units if unit.ready()]
        if not ready:
            self._release()
            return True
        unit, progress = self.launch.random.choice(ready), False
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
        self.barrier = None
        for unit in self.units:
            unit.waiting.fill(False)
            unit._gather()

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
        same_barrier: bool,
    ) -> None:
        missing = kernel.parameter_bytes - len(parameters)
        if not 0 <= missing < 8:  # a struct's padding at its end may be left out
            raise ValueError(f"launch: {kernel.name} takes {kernel.parameter_bytes} bytes, got {len(parameters)}")
        if math.prod(block) % WARP:
            raise ValueError(f"launch: a block must have whole warps, got {block}")
        self.kernel, self.grid, self.block, self.same_barrier = kernel, grid, block, same_barrier
        self.memory, self.random = GlobalMemory(buffers), random.Random(seed)
        self.parameters = np.frombuffer(parameters + b"\xff" * missing, np.uint8)
        self.pieces, self.labels = pieces(kernel)
        self.addresses = dict(kernel.parameters)
        self.instructions = 0
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
            progress = slot.run(self.random.choice((1, 1, 2, 5, 20, 100)))
            turns += 1
            spins = 0 if progress else spins + 1
            if spins > SPINS:
                raise Fault(self._stuck(running))
            if slot.done:
                if left:
                    slot.start(left.pop())
                else:
                    running.remove(slot)
        return Counts(self.instructions, turns)

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
    same_barrier: bool = True,
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
        same_barrier: whether bar.sync must be the same instruction for all warps of a block, as the PTX ISA requires
            ("barrier", .aligned), or is only counted.

    Raises:
        Fault: the kernel did something forbidden; the message names the kernel, the block, and the PTX line.
        PtxError: it has an instruction that the machine does not know.
    """
    with np.errstate(all="ignore"):
        return Launch(kernel, grid, block, parameters, buffers, shared_bytes, seed, same_barrier).run(
            resident, lockstep
        )
