"""Machine code (SASS) of compiled kernels: instructions, basic blocks, and which loop holds which.

nvdisasm, of the extra `test-cuda`, prints the machine code. Code that only the divergent side of a convergence check
reaches (`BRA.DIV`) and the insides of called functions (divisions by numbers out of range) belong to no path here.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.nvrtc import INSTALL, NotInstalled

_LABEL = re.compile(r"^(\.L_[\w.]+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P[\dT]+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"`\((\.L_[\w.]+)\)")


class Instruction(NamedTuple):
    """An instruction; `predicate` is empty where it always runs."""

    opcode: str
    operands: str
    predicate: str

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]


class Block(NamedTuple):
    """Instructions that run one after the other, and the numbers of the blocks that may follow."""

    instructions: tuple[Instruction, ...]
    successors: tuple[int, ...]


class Loop(NamedTuple):
    """A natural loop: the block at which it is entered, those that jump back to it, and all of its blocks."""

    header: int
    latches: frozenset[int]
    body: frozenset[int]


class Function(NamedTuple):
    """A kernel's blocks that its entry, block 0, can reach, and its loops, an inner one before the one around it."""

    name: str
    blocks: dict[int, Block]
    loops: tuple[Loop, ...]

    def instructions(self, numbers: Iterable[int] | None = None) -> Iterator[Instruction]:
        """Yield the instructions of some blocks, of all by default."""
        for number in sorted(self.blocks if numbers is None else numbers):
            yield from self.blocks[number].instructions

    def count(self, numbers: Iterable[int] | None = None) -> Counter[str]:
        """Return how many instructions of each name some blocks hold, all by default."""
        return Counter(instruction.name for instruction in self.instructions(numbers))


def disassemble(cubin: bytes) -> str:
    """Return what nvdisasm prints for machine code.

    Raises:
        NotInstalled: there is no nvdisasm.
        RuntimeError: nvdisasm cannot read the machine code.
    """
    try:
        from cuda.pathfinder import find_nvidia_binary_utility
    except ImportError as error:
        raise NotInstalled(f"sass: cuda-pathfinder must be installed; {INSTALL}") from error
    program = find_nvidia_binary_utility("nvdisasm")
    if program is None:
        raise NotInstalled(f"sass: nvdisasm must be installed; {INSTALL}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([program, "-c", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"disassemble: nvdisasm must read the machine code, got {done.stderr.strip()}")
    return done.stdout


def parse(text: str, name: str) -> Function:
    """Return a kernel from what nvdisasm prints.

    Raises:
        ValueError: the text does not hold the kernel, a jump's target is not in it, or a loop has two entries.
    """
    start = text.find(f"\n.text.{name}:")
    if start < 0:
        raise ValueError(f"parse: text must hold the kernel {name}, and it does not")
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text[start + 1 :].split("\n.text.", 2)[0].splitlines()[1:]:
        if line.startswith("//----") or line.lstrip().startswith(".section"):
            break
        label, found = _LABEL.match(line), _INSTRUCTION.match(line)
        if label:
            labels[label[1]] = len(instructions)
        elif found:
            instructions.append(Instruction(found[2], found[3].strip(), found[1] or ""))
        elif re.match(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", line):
            raise ValueError(f"parse: an instruction must have the form of nvdisasm -c, got {line.strip()!r}")
    blocks = _reachable(_blocks(instructions, labels, name))
    return Function(name, blocks, _loops(blocks, name))


def _jumps(instruction: Instruction) -> bool:
    return instruction.name in ("BRA", "EXIT", "RET", "BRX", "JMP", "JMX")


def _follows(at: int, instruction: Instruction, labels: dict[str, int], name: str) -> list[int]:
    """Return the indices of the instructions that may run after one."""
    if instruction.name in ("EXIT", "RET"):
        return [at + 1] if instruction.predicate else []
    if instruction.name != "BRA":
        if _jumps(instruction):
            raise ValueError(f"parse: {name} must jump to labels only, got {instruction.opcode}")
        return [at + 1]
    target = _TARGET.search(instruction.operands)
    if target is None or target[1] not in labels:
        raise ValueError(f"parse: {name} must hold the target of every jump, got {instruction.operands}")
    if instruction.opcode.startswith("BRA.DIV"):
        return [at + 1]
    conditional = bool(instruction.predicate or instruction.operands[: target.start()].strip())
    return [labels[target[1]], *([at + 1] if conditional else [])]


def _blocks(instructions: list[Instruction], labels: dict[str, int], name: str) -> dict[int, Block]:
    """Return all blocks by the index of their first instruction."""
    starts = {0, *labels.values(), *(i + 1 for i, x in enumerate(instructions) if _jumps(x))}
    inside = sorted(x for x in starts if x < len(instructions))
    blocks = {}
    for start, end in zip(inside, [*inside[1:], len(instructions)], strict=True):
        last = instructions[end - 1]
        following = dict.fromkeys(_follows(end - 1, last, labels, name))
        blocks[start] = Block(tuple(instructions[start:end]), tuple(x for x in following if x < len(instructions)))
    return blocks


def _reachable(blocks: dict[int, Block]) -> dict[int, Block]:
    found, todo = {0}, [0]
    while todo:
        new = [x for x in blocks[todo.pop()].successors if x not in found]
        found.update(new)
        todo += new
    return {start: blocks[start] for start in sorted(found)}


def order(blocks: dict[int, Block]) -> list[int]:
    """Return the blocks so that each comes before those that may follow it, jumps back aside."""
    done: list[int] = []
    seen = {0}
    stack = [(0, iter(blocks[0].successors))]
    while stack:
        here, following = stack[-1]
        for after in following:
            if after not in seen:
                seen.add(after)
                stack.append((after, iter(blocks[after].successors)))
                break
        else:
            done.append(here)
            stack.pop()
    return done[::-1]


def _loops(blocks: dict[int, Block], name: str) -> tuple[Loop, ...]:
    """Return the natural loops: of a jump back to a block that every way to the jump passes."""
    places = {block: place for place, block in enumerate(order(blocks))}
    before: dict[int, list[int]] = {block: [] for block in blocks}
    for block in blocks:
        for after in blocks[block].successors:
            before[after].append(block)
    dominators = {block: set(blocks) for block in blocks}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in list(places)[1:]:
            new = {block} | set.intersection(*(dominators[x] for x in before[block]))
            changed |= new != dominators[block]
            dominators[block] = new
    latches: dict[int, set[int]] = {}
    for block in blocks:
        for after in blocks[block].successors:
            if places[after] <= places[block]:
                if after not in dominators[block]:
                    raise ValueError(f"parse: a loop of {name} must have one entry, and the one at {after} has more")
                latches.setdefault(after, set()).add(block)
    loops = []
    for header, ends in latches.items():
        body, todo = {header, *ends}, [x for x in ends if x != header]
        while todo:
            new = [x for x in before[todo.pop()] if x not in body]
            body.update(new)
            todo += new
        loops.append(Loop(header, frozenset(ends), frozenset(body)))
    return tuple(sorted(loops, key=lambda loop: len(loop.body)))
