"""The instructions that a warp executes on its ways through a kernel, from the kernel's machine code.

A kernel's code does not say which way a warp takes, but the ways differ in the operations that they execute, which
tests/cuda_on_cpu counts. So ways are told apart by `Marks`. Of the ways with the same marks the longest and the
shortest are kept: the instructions lie between them where a branch decides nothing that is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from benchmarks.limits.sass import Block, Function, Instruction, Loop, order

NAMES = ("HMMA", "LDSM", "LDGSTS", "LDG", "STG", "RED", "ATOMG", "LDS", "STS", "STSM", "BAR", "MUFU")
MOST_WAYS = 3_000_000  # more would mean that marks do not bound the number of ways


class Marks(NamedTuple):
    """Operations that tell ways apart. Those on shared memory are in wavefronts of a whole warp without conflicts."""

    products: int = 0
    matrix_loads: int = 0
    copies: int = 0
    stores: int = 0
    atomics: int = 0  # on counters in global memory

    def plus(self, other: Marks) -> Marks:
        """Return the operations of one way after another."""
        return Marks(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, factor: int) -> Marks:
        """Return the operations of several warps."""
        return Marks(*(factor * a for a in self))

    def within(self, most: Marks) -> bool:
        """Return whether no operation is more frequent than in `most`."""
        return all(a <= b for a, b in zip(self, most, strict=True))


def marks_of(instructions: Iterable[Instruction]) -> Marks:
    """Return the operations of some instructions."""
    found = Marks()
    for x in instructions:
        wide = 4 if ".128" in x.opcode else 2 if ".64" in x.opcode else 1
        matrices = int(x.opcode[-1]) if x.opcode[-1].isdigit() else 1
        if x.name.endswith("MMA"):
            found = found._replace(products=found.products + 1)
        elif x.name == "LDSM":
            found = found._replace(matrix_loads=found.matrix_loads + matrices)
        elif x.name == "LDGSTS":
            found = found._replace(copies=found.copies + wide)
        elif x.name in ("STS", "STSM"):
            found = found._replace(stores=found.stores + (wide if x.name == "STS" else matrices))
        elif x.name in ("ATOMG", "ATOM") or (x.name == "RED" and ".128" not in x.opcode):
            found = found._replace(atomics=found.atomics + 1)
    return found


class Way(NamedTuple):
    """The ways with the same marks through some code: instructions, and how many of the longest have each of NAMES."""

    most: int
    least: int
    counts: np.ndarray

    def plus(self, other: Way) -> Way:
        """Return the ways through this code and then through another."""
        return Way(self.most + other.most, self.least + other.least, self.counts + other.counts)

    def merged(self, other: Way | None) -> Way:
        """Return the ways through this code or another."""
        if other is None:
            return self
        longer = self if self.most >= other.most else other
        return longer._replace(least=min(self.least, other.least))


Ways = dict[Marks, Way]
START: Ways = {Marks(): Way(0, 0, np.zeros(len(NAMES), np.int64))}


def _one(block: Block) -> Ways:
    names = [x.name for x in block.instructions]
    counts = np.array([names.count(name) for name in NAMES])
    return {marks_of(block.instructions): Way(len(names), len(names), counts)}


def _either(*parts: Ways) -> Ways:
    """Return the ways of all parts."""
    found: Ways = {}
    for part in parts:
        for marks, way in part.items():
            found[marks] = way.merged(found.get(marks))
    return found


def _then(first: Ways, second: Ways, most: Marks) -> Ways:
    """Return every way of the first part with every way of the second after it, up to the marks `most`."""
    if len(first) * len(second) > MOST_WAYS:
        raise ValueError(f"ways: marks must bound the number of ways, got {len(first)} times {len(second)}")
    found: Ways = {}
    for marks, way in first.items():
        for more, after in second.items():
            both = marks.plus(more)
            if both.within(most):
                found[both] = way.plus(after).merged(found.get(both))
    return found


def _times(turn: Ways, last: Ways, times: int, most: Marks) -> Ways:
    """Return the ways of a loop, all of whose turns have the same operations but the last, which may copy less."""
    if times == 1:
        return {marks: way for marks, way in last.items() if marks.within(most)}
    found: Ways = {}
    for marks, way in turn.items():
        before = marks.times(times - 1)
        several = Way(*((times - 1) * x for x in way))
        for end, more in last.items():
            if end._replace(copies=marks.copies) == marks and end.copies <= marks.copies:
                both = before.plus(end)
                if both.within(most):
                    found[both] = several.plus(more).merged(found.get(both))
    return found


class _Region(NamedTuple):
    """Blocks in which each inner loop is one node, entered at its header, with the ways to each block after it."""

    inner: dict[int, dict[int, Ways]]  # header: the successor outside: ways
    place: dict[int, int]  # of a block, its place in `order`
    blocks: Mapping[int, Block]
    most: Marks

    def from_entry(self, entry: int, body: frozenset[int], hidden: set[int]) -> tuple[dict[int, Ways], dict[int, Ways]]:
        """Return the ways from the entry to the end of each block, and along each edge out of the body or back."""
        before: dict[int, Ways] = {entry: START}
        ends: dict[int, Ways] = {}
        leaving: dict[int, Ways] = {}
        for here in sorted(body - hidden, key=self.place.__getitem__):
            if here not in before:
                continue
            if here in self.inner:
                outs = {after: _then(before[here], ways, self.most) for after, ways in self.inner[here].items()}
            else:
                ends[here] = _then(before[here], _one(self.blocks[here]), self.most)
                outs = dict.fromkeys(self.blocks[here].successors, ends[here])
            for after, ways in outs.items():
                kept = leaving if after == entry or after not in body else before
                kept[after] = _either(kept.get(after, {}), ways)
        return ends, leaving


def ways(function: Function, trips: Callable[[Loop], range], most: Marks) -> Ways:
    """Return the ways from a kernel's entry to its end. See `_times` for loops.

    Args:
        function: the kernel.
        trips: how often the body of a loop may run.
        most: ways with more operations of some kind are left out.

    Raises:
        ValueError: there are too many ways.
    """
    place = {block: at for at, block in enumerate(order(function.blocks))}
    region = _Region({}, place, function.blocks, most)
    for loop in function.loops:
        _, leaving = region.from_entry(loop.header, loop.body, _hidden(function, loop.body))
        turn = leaving.pop(loop.header)
        found: dict[int, Ways] = {after: {} for after in leaving}
        for times in trips(loop):
            for after, last in leaving.items():
                found[after] = _either(found[after], _times(turn, last, times, most))
        region.inner[loop.header] = found
    everything = frozenset(function.blocks)
    ends, _ = region.from_entry(0, everything, _hidden(function, everything | {-1}))
    return _either(*(ends[block] for block in ends if function.blocks[block].instructions[-1].name == "EXIT"))


def _hidden(function: Function, body: frozenset[int]) -> set[int]:
    """Return the blocks of loops inside a body except those loops' headers."""
    return {block for loop in function.loops if loop.body < body for block in loop.body if block != loop.header}
