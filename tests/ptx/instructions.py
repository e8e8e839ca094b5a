"""From an instruction to a function that executes it for the threads of a unit; what most of them need is here.

Instructions that access memory are in accesses.py, those of a whole warp in warps.py, what the others compute in
arithmetic.py and conversions.py. Barriers and branches are the machine's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx import accesses, warps
from tests.ptx.accesses import Step
from tests.ptx.arithmetic import compare, operation
from tests.ptx.conversions import conversion
from tests.ptx.memory import LOCAL_WINDOW, SHARED_WINDOW
from tests.ptx.parse import Instruction, Pair, PtxError, Register, Vector
from tests.ptx.registers import put

if TYPE_CHECKING:
    from tests.ptx.unit import Unit

NOTHING = {"nanosleep", "prefetch", "applypriority"}  # hints


def _bind_operation(unit: Unit, instruction: Instruction) -> Step:
    known = conversion(instruction.parts) if instruction.parts[0] == "cvt" else operation(instruction.parts)
    function = known.function
    sources = [unit.registers.source(x, kind) for x, kind in zip(instruction.operands[1:], known.sources, strict=True)]
    target = unit.registers.target(instruction.operands[0], known.result)
    if isinstance(function, np.ufunc) and len(sources) == 2:
        a, b = sources

        def execute(mask: Any) -> None:
            if mask is None:
                function(a, b, out=target)
            else:
                function(a, b, out=target, where=mask)

        return execute
    return lambda mask: put(target, function(*sources), mask)


def _bind_compare(unit: Unit, instruction: Instruction) -> Step:
    """setp: p = (a op b) combined with c, q = (not a op b) combined with c."""
    function, kind = compare(instruction.parts)
    result, a, b, *third = instruction.operands
    names = (result.result, result.predicate) if isinstance(result, Pair) else (result,)
    targets = [unit.registers.target(name, "pred") for name in names]
    a, b = unit.registers.source(a, kind), unit.registers.source(b, kind)
    combine, other, negated = None, None, False
    if third:
        (word,) = {"and", "or", "xor"} & set(instruction.parts)
        combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[word]
        assert isinstance(third[0], Register)
        other, negated = unit.registers.rows[third[0].name], third[0].negated

    def execute(mask: Any) -> None:
        found = function(a, b)
        held = None if other is None else ~other if negated else other.copy()
        for target, value in zip(targets, (found, np.logical_not(found)), strict=False):
            put(target, value if combine is None else combine(value, held), mask)

    return execute


def _bind_move(unit: Unit, instruction: Instruction) -> Step:
    """mov: a register, constant or address; or a wide register from, or to, narrow ones, the lowest first."""
    target, source = instruction.operands
    kind = instruction.parts[1]
    if isinstance(source, Vector):
        return _bind_pack(unit, target, source, kind)
    if isinstance(target, Vector):
        number = len(target.elements)
        value = unit.registers.source(source, kind)
        narrow = f"b{8 * value.itemsize // number}"
        targets = [unit.registers.target(e, narrow) for e in target.elements]

        def unpack(mask: Any) -> None:
            halves = np.ascontiguousarray(value).view(targets[0].dtype).reshape(-1, number)
            for i, each in enumerate(targets):
                put(each, halves[:, i], mask)

        return unpack
    into, value = unit.registers.target(target, kind), unit.registers.source(source, kind)
    return lambda mask: put(into, value, mask)


def _bind_pack(unit: Unit, target: Any, source: Vector, kind: str) -> Step:
    into = unit.registers.target(target, kind)
    narrow = f"b{8 * into.itemsize // len(source.elements)}"
    values = [unit.registers.source(e, narrow) for e in source.elements]

    def pack(mask: Any) -> None:
        parts = np.stack([np.broadcast_to(v, unit.count) for v in values], 1)
        put(into, parts.view(into.dtype)[:, 0], mask)

    return pack


def _bind_address(unit: Unit, instruction: Instruction) -> Step:
    """cvta: generic addresses of global memory are its own, those of shared and local memory lie in a window."""
    words = instruction.parts[1:-1]
    window = np.uint64({"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(words[-1].split("::")[0], 0))
    if words[-1] not in ("global", "shared", "local", "shared::cta"):
        raise PtxError(f"machine: {instruction.text} must be of .global, .shared or .local")
    into, value = (
        unit.registers.target(instruction.operands[0], "u64"),
        unit.registers.source(instruction.operands[1], "u64"),
    )
    if words[0] == "to":
        return lambda mask: put(into, value - window, mask)
    return lambda mask: put(into, value + window, mask)


BINDERS: dict[str, Callable[[Unit, Instruction], Step]] = {
    "ld": accesses.bind_load,
    "st": accesses.bind_store,
    "atom": accesses.bind_atomic,
    "red": accesses.bind_atomic,
    "membar": accesses.bind_fence,
    "fence": accesses.bind_fence,
    "cp": accesses.bind_copy,
    "createpolicy": accesses.bind_policy,
    "mma": warps.bind_mma,
    "ldmatrix": warps.bind_load_matrices,
    "stmatrix": warps.bind_store_matrices,
    "shfl": warps.bind_shuffle,
    "activemask": warps.bind_active_mask,
    "bar": warps.bind_warp_barrier,
    "setp": _bind_compare,
    "mov": _bind_move,
    "cvta": _bind_address,
}


def bind(unit: Unit, instruction: Instruction) -> Step:
    """Return a function that executes an instruction for the threads of a mask (None: all).

    Raises:
        PtxError: the machine does not know it.
    """
    root = instruction.parts[0]
    if root in NOTHING:
        return lambda mask: None
    return BINDERS.get(root, _bind_operation)(unit, instruction)
