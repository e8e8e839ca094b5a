"""Reads PTX text: a module's kernels, their variables, and their instructions with operands taken apart.

What is read is what NVRTC and Numba write (PTX ISA, chapter "Syntax"): one kernel or more, declarations at the head of
a scope, no functions. Anything else is an error, so that nothing is left out unseen.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

SPECIAL = re.compile(r"%(?:n?tid|n?ctaid)\.[xyz]|%(?:laneid|warpid|nwarpid|lanemask_(?:eq|le|lt|ge|gt))\b|WARP_SZ\b")
DECLARATION = re.compile(
    r"(?:\.(?:visible|extern|weak|common)\s+)*\.(global|const|shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)"
    r"((?:\[\d*\])*)(?:\s*=.*)?$",
    re.DOTALL,
)
PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?$")
BITS = {"pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16, "b32": 32}
BITS |= {"u32": 32, "s32": 32, "f32": 32, "f16x2": 32, "bf16x2": 32, "tf32": 32}
BITS |= {"b64": 64, "u64": 64, "s64": 64, "f64": 64}


class PtxError(ValueError):
    """The text holds something that this reader, or the machine, does not know."""


class Register(NamedTuple):
    """A register by its name, made unique over the scopes of its kernel; `negated` for !p."""

    name: str
    negated: bool = False


class Special(NamedTuple):
    """A special register such as %tid.x."""

    name: str


class Immediate(NamedTuple):
    """A constant: an int, or the float that 0f... or 0d... spells."""

    value: int | float


class Symbol(NamedTuple):
    """The address of a variable or parameter, or a label."""

    name: str


class Address(NamedTuple):
    """[base + offset]; base None: an absolute address."""

    base: Register | Symbol | None
    offset: int


class Vector(NamedTuple):
    """{a, b, ...}."""

    elements: tuple[Operand, ...]


class Pair(NamedTuple):
    """d|p, a result and a predicate."""

    result: Operand
    predicate: Operand


Operand = Register | Special | Immediate | Symbol | Address | Vector | Pair


class Instruction(NamedTuple):
    """One instruction: `parts` are the opcode's words between dots, `guard` the predicate in front."""

    line: int
    text: str
    guard: Register | None
    parts: tuple[str, ...]
    operands: tuple[Operand, ...]


class Variable(NamedTuple):
    """A variable in a state space; `size` in bytes, None for `extern x[]`."""

    name: str
    space: str
    align: int
    size: int | None


class Kernel(NamedTuple):
    """A kernel: parameters with their offsets, registers with their bits, labels as indices of instructions."""

    name: str
    target: str
    parameters: dict[str, int]
    parameter_bytes: int
    registers: dict[str, int]
    variables: dict[str, Variable]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


def _statements(text: str) -> list[tuple[int, str]]:
    """Return (line, text) of every statement, label, { and }, without comments; a { of a vector is no scope."""
    clean = re.sub(r"//[^\n]*", "", text.rstrip("\0"))
    clean = re.sub(r"/\*.*?\*/", lambda found: "\n" * found[0].count("\n"), clean, flags=re.DOTALL)
    result: list[tuple[int, str]] = []
    start, line, depth = 0, 1, 0  # depth of vectors
    for found in re.finditer(r"[;{}:\n]", clean):
        c, at = found[0], found.start()
        here = clean[start:at].strip()
        first = line - here.count("\n")
        line += c == "\n"
        if c in "{}" and (depth or (c == "{" and here and ".entry" not in here)):
            depth += 1 if c == "{" else -1
            continue
        if c in "{}":
            result += [(first, here)] if here else []
            result.append((line, c))
        elif c == ";" and depth == 0:
            result.append((first, here))
        elif c == ":" and "::" not in clean[at - 1 : at + 2] and re.fullmatch(r"[\w$]+", here):
            result.append((first, f"{here}:"))
        elif c == "\n" and here.startswith((".version", ".target", ".address_size")):
            result.append((first, here))
        elif c != "\n" or here:
            continue
        start = at + 1
    return result


def _constant(word: str) -> int | float | None:
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", word):
        return struct.unpack(">f", bytes.fromhex(word[2:]))[0]
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", word):
        return struct.unpack(">d", bytes.fromhex(word[2:]))[0]
    if re.fullmatch(r"-?\d+\.\d+", word):
        return float(word)
    if re.fullmatch(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?", word):
        return int(word.removesuffix("U"), 0) if not re.fullmatch(r"-?0\d+U?", word) else int(word.removesuffix("U"), 8)
    return None


def _split(text: str) -> list[str]:
    """Split operands at the commas outside braces and brackets."""
    words, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[") - (c in "}]")
        if c == "," and depth == 0:
            words.append(text[start:i].strip())
            start = i + 1
    return [*words, text[start:].strip()]


class _Reader:
    """The state of reading one kernel."""

    def __init__(self) -> None:
        self.scopes: list[dict[str, str]] = [{}]
        self.registers: dict[str, int] = {}
        self.variables: dict[str, Variable] = {}
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.scope_number = 0

    def open(self) -> None:
        self.scope_number += 1
        self.scopes.append({})

    def declare(self, text: str) -> None:
        kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL).groups()
        for name in re.split(r"\s*,\s*", names.strip()):
            found = re.fullmatch(r"([%\w$]+)<(\d+)>", name)
            for each in [f"{found[1]}{n}" for n in range(int(found[2]))] if found else [name]:
                unique = each if len(self.scopes) == 2 else f"{each}@{self.scope_number}"
                self.scopes[-1][each] = unique
                self.registers[unique] = BITS[kind]

    def operand(self, word: str, instruction: str) -> Operand:
        for scope in reversed(self.scopes):
            if word in scope:
                return Register(scope[word])
        if word.startswith("{"):
            return Vector(tuple(self.operand(w, instruction) for w in _split(word[1:-1])))
        if word.startswith("["):
            base, sign, offset = re.fullmatch(r"\[\s*([^+\-\s]+)?\s*(?:([+-])\s*([-\w]+))?\s*\]", word).groups()
            inside = self.operand(base, instruction) if base else None
            if isinstance(inside, Immediate):
                return Address(None, int(inside.value))
            number = int(offset, 0) if offset else 0
            return Address(inside, -number if sign == "-" else number)
        if "|" in word:
            return Pair(*(self.operand(w.strip(), instruction) for w in word.split("|")))
        if SPECIAL.fullmatch(word):
            return Special(word)
        constant = _constant(word)
        if constant is not None:
            return Immediate(constant)
        if word.startswith("!"):
            return self.operand(word[1:], instruction)._replace(negated=True)  # type: ignore[union-attr, call-arg]
        if word == "_":
            return Register("_")
        if not re.fullmatch(r"[\w$]+", word):
            raise PtxError(f"parse: operand {word!r} of {instruction!r} must be of a known form")
        return Symbol(word)

    def instruction(self, line: int, text: str) -> None:
        found = re.fullmatch(r"(?:@(!?[%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.DOTALL)
        if found is None:
            raise PtxError(f"parse: line {line} must be an instruction, got {text!r}")
        guard, opcode, rest = found.groups()
        operands = tuple(self.operand(w, text) for w in _split(rest)) if rest.strip() else ()
        where = self.operand(guard, text) if guard else None
        self.instructions.append(
            Instruction(line, " ".join(text.split()), where, tuple(opcode.split(".")), operands)  # type: ignore[arg-type]
        )


def _variable(text: str) -> Variable | None:
    found = DECLARATION.fullmatch(text)
    if found is None:
        return None
    space, align, kind, name, dimensions = found.groups()
    size: int | None = BITS[kind] // 8
    for number in re.findall(r"\[(\d*)\]", dimensions):
        size = None if number == "" or size is None else size * int(number)
    return Variable(name, space, int(align or BITS[kind] // 8), size)


def _parameters(text: str) -> tuple[dict[str, int], int]:
    """Return the offset of each parameter, laid out as C lays out a struct, and their bytes."""
    offsets, end = {}, 0
    for word in _split(text):
        if word:
            align, kind, name, length = PARAMETER.fullmatch(word).groups()
            size = BITS[kind] // 8 * int(length or 1)
            step = int(align or BITS[kind] // 8)
            offsets[name] = end = -(-end // step) * step
            end += size
    return offsets, end


def parse(text: str) -> dict[str, Kernel]:
    """Return the kernels of a PTX module by name.

    Raises:
        PtxError: the text holds something that this reader does not know.
    """
    module: dict[str, Variable] = {}
    kernels: dict[str, Kernel] = {}
    target, head, reader = "", "", None
    for line, statement in _statements(text):
        if statement.startswith(".target"):
            target = statement.split()[1].rstrip(",")
        elif statement.startswith((".version", ".address_size", ".pragma")):
            continue
        elif reader is None and ".entry" in statement:
            head = statement
        elif reader is None and statement == "{":
            reader = _Reader()
            reader.open()
        elif reader is None:
            variable = _variable(statement)
            if variable is None:
                raise PtxError(f"parse: line {line} must declare a variable or a kernel, got {statement!r}")
            module[variable.name] = variable
        elif statement == "{":
            reader.open()
        elif statement == "}":
            reader.scopes.pop()
            if len(reader.scopes) == 1:
                name, parameters = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)", head, re.DOTALL).groups()
                offsets, size = _parameters(parameters)
                kernels[name] = Kernel(
                    *(name, target, offsets, size, reader.registers, {**module, **reader.variables}),
                    *(tuple(reader.instructions), reader.labels),
                )
                reader = None
        elif statement.endswith(":"):
            reader.labels[statement[:-1]] = len(reader.instructions)
        elif statement.startswith(".reg"):
            reader.declare(statement)
        elif (variable := _variable(statement)) is not None:
            reader.variables[variable.name] = variable
        else:
            reader.instruction(line, statement)
    return kernels
