"""The threads of a unit, a block or a warp of it, and how they go through basic blocks.

The threads are vectors: one instruction is executed for all threads that are at it, those at the lowest basic block
first, which is how threads that diverged meet again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tests.ptx.accesses import Copy
from tests.ptx.instructions import bind
from tests.ptx.memory import Fault
from tests.ptx.parse import Immediate, Instruction, Kernel, PtxError, Symbol
from tests.ptx.registers import WARP, Registers

if TYPE_CHECKING:
    from tests.ptx.machine import Slot

EXITED = 1 << 30  # in place of a basic block's number
BARRIERS = {"bar", "barrier"}
PROGRESS = {"st", "red", "atom", "cp", "mma", "stmatrix"}
WHOLE_WARP = {"shfl", "ldmatrix", "stmatrix", "mma"}
WEAK = {"volatile", "relaxed", "acquire", "release"}  # words of accesses by which blocks communicate
Step = Callable[[Any], None]


class Piece(NamedTuple):
    """A basic block: instructions first .. end - 1, the last one, if it is one, changing the flow."""

    first: int
    end: int
    flow: Instruction | None
    progress: bool
    sleeps: bool
    collective: bool  # whether it has an instruction that a warp executes as a whole


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
        collective = bool(roots & (WHOLE_WARP | BARRIERS))
        result.append(Piece(first, end, flow, bool(roots & PROGRESS), "nanosleep" in roots, collective))
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
        self.block, self.weight = 0, 1.0
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
        launch = self.slot.launch
        number, mask = (self.together, None) if self.together is not None else self._lowest()
        piece = launch.pieces[number]
        code = self._code[number]
        if code is None:
            launch.reached.add(number)
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

    def _lowest(self) -> tuple[int, np.ndarray]:
        """Return the lowest basic block and the threads that are to execute it.

        A part of a warp does not execute an instruction of the whole warp while the other part can still come to it.
        """
        able = ~self.waiting & (self.at < EXITED)
        first, exited = None, self.at == EXITED
        while able.any():
            number = int(self.at[able].min())
            mask = able & (self.at == number)
            first = first or (number, mask)
            if self.slot.launch.pieces[number].collective:
                present, held = (x.reshape(-1, WARP) for x in (mask, mask | exited))
                mask = mask & ~(present.any(1) & ~held.all(1)).repeat(WARP)
            if mask.any():
                return number, mask
            able &= self.at != number
        assert first is not None
        return first

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
            self.gather()

    def _scatter(self) -> None:
        if self.together is not None:
            self.at.fill(self.together)
            self.together = None

    def gather(self) -> None:
        """Notice that all threads are at the same basic block."""
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
            self.gather()

    def _arrive(self, flow: Instruction, mask: Any, following: int) -> None:
        """Make threads wait for all others of the block at barrier 0.

        An aligned barrier, and so bar.sync, is to be the same instruction for the whole block (PTX ISA, "barrier").
        """
        words = set(flow.parts[1:])
        if "sync" not in words or words - {"cta", "sync", "aligned"} or flow.operands != (Immediate(0),):
            raise self._located(flow, "the machine knows barrier 0 of all threads only; add it")
        self._scatter()
        here = np.ones(self.count, bool) if mask is None else mask
        if flow.parts[0] == "bar" or "aligned" in words:
            present = here.reshape(-1, WARP)
            if (present.any(1) != present.all(1)).any():
                raise self._located(flow, "an aligned barrier that a part of a warp reaches")
            other = self.slot.barrier
            if other is not None and other.line != flow.line:
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
