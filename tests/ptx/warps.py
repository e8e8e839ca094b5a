"""Instructions of a whole warp: shfl.sync, ldmatrix, stmatrix, mma.sync, bar.warp.sync, activemask.

The layouts of fragments follow the PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions": sections "Matrix
Fragments for mma.m16n8k8" and "Matrix Fragments for mma.m16n8k16 with floating point type", "ldmatrix", "stmatrix".
With g = lane / 4 and t = lane % 4, element i of a thread has these places:

    A m16n8k16, 16 bits  row g, or g + 8 for i in 2, 3, 6, 7;   column 2t + i % 2, and 8 more from i = 4 on
    B m16n8k16, 16 bits  row 2t + i % 2, and 8 more from i = 2 on;   column g
    A m16n8k8, tf32      row g, or g + 8 for odd i;   column t, or t + 4 from i = 2 on
    B m16n8k8, tf32      row t, or t + 4 for i = 1;   column g
    C and D              row g, or g + 8 from i = 2 on;   column 2t + i % 2

mma sums the products and C in float64 and rounds once to float32; the ISA leaves order and rounding open.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx import floats
from tests.ptx.accesses import Step
from tests.ptx.memory import Fault
from tests.ptx.parse import Instruction, Pair, PtxError, Vector
from tests.ptx.registers import WARP, put

if TYPE_CHECKING:
    from tests.ptx.unit import Unit

G, T = np.arange(WARP) // 4, np.arange(WARP) % 4


def _layout(rows: list[Any], columns: list[Any], width: int) -> np.ndarray:
    """Return the place of (element, lane) in a matrix with rows of `width`, from a row and a column per element."""
    return np.stack([r * width + c for r, c in zip(rows, columns, strict=True)])


A16 = _layout([G + 8 * (i // 2 % 2) for i in range(8)], [2 * T + i % 2 + 8 * (i // 4) for i in range(8)], 16)
B16 = _layout([2 * T + i % 2 + 8 * (i // 2) for i in range(4)], [G] * 4, 8)
A_TF32 = _layout([G + 8 * (i % 2) for i in range(4)], [T + 4 * (i // 2) for i in range(4)], 8)
B_TF32 = _layout([T + 4 * i for i in range(2)], [G] * 2, 8)
C = _layout([G + 8 * (i // 2) for i in range(4)], [2 * T + i % 2 for i in range(4)], 8)


def active_warps(mask: Any, count: int) -> Any:
    """Return the warps of a unit that execute an instruction of whole warps (a slice if all do).

    Raises:
        Fault: only a part of a warp does.
    """
    if mask is None:
        return slice(None)
    lanes = mask.reshape(count // WARP, WARP)
    some = lanes.any(1)
    if (some != lanes.all(1)).any():
        raise Fault("an instruction of a whole warp, executed by a part of a warp")
    return np.flatnonzero(some)


def _by_warp(unit: Unit, row: np.ndarray, warps: Any) -> np.ndarray:
    """Return a register as (warps, lanes)."""
    return row.reshape(unit.count // WARP, WARP)[warps]


def _registers(unit: Unit, operand: Any, number: int, kind: str = "b32") -> list[np.ndarray]:
    if not isinstance(operand, Vector) or len(operand.elements) != number:
        raise PtxError(f"warps: {operand} must be {number} registers")
    return [unit.registers.source(e, kind) for e in operand.elements]


def _matrix(elements: np.ndarray, layout: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return matrices (warps, *shape) of elements (element, warps, lanes) in float64."""
    result = np.empty((elements.shape[1], shape[0] * shape[1]))
    for i, places in enumerate(layout):
        result[:, places] = elements[i]
    return result.reshape(-1, *shape)


def _halves(unit: Unit, rows: list[np.ndarray], warps: Any, kind: str) -> np.ndarray:
    """Return the 16-bit floats of registers, low half first: (elements, warps, lanes)."""
    bits = np.stack([_by_warp(unit, row, warps) for row in rows])
    pairs = np.stack([bits & np.uint32(0xFFFF), bits >> np.uint32(16)], 1).astype(np.uint16)
    values = floats.from_bf16(pairs) if kind == "bf16" else pairs.view(np.float16)
    return values.reshape(-1, *bits.shape[1:])


def _tf32(unit: Unit, rows: list[np.ndarray], warps: Any) -> np.ndarray:
    bits = np.stack([_by_warp(unit, row, warps) for row in rows])
    if (bits & np.uint32(0x1FFF)).any():
        raise Fault("an operand of mma in tf32 must be rounded to it (cvt.rna.tf32.f32): the low 13 bits must be zero")
    return bits.view(np.float32)


def bind_mma(unit: Unit, instruction: Instruction) -> Step:
    """mma.sync.aligned: m16n8k16 of bf16 or f16, m16n8k8 of tf32; D = A B + C in .f32."""
    form = instruction.parts[1:]
    d, a, b, c = instruction.operands
    shapes = {
        ("m16n8k16", "bf16"): (16, A16, B16),
        ("m16n8k16", "f16"): (16, A16, B16),
        ("m16n8k8", "tf32"): (8, A_TF32, B_TF32),
    }
    kind = form[6] if len(form) == 9 else ""
    key = (form[2], kind)
    if form[:2] != ("sync", "aligned") or form[3:] != ("row", "col", "f32", kind, kind, "f32") or key not in shapes:
        raise PtxError(f"warps: {instruction.text} must be an mma that the machine knows; add it")
    depth, a_layout, b_layout = shapes[key]
    left, right = _registers(unit, a, 4), _registers(unit, b, 2)
    add, results = _registers(unit, c, 4, "f32"), _registers(unit, d, 4, "f32")

    def multiply(mask: Any) -> None:
        warps = active_warps(mask, unit.count)
        if kind == "tf32":
            elements = [_tf32(unit, x, warps) for x in (left, right)]
        else:
            elements = [_halves(unit, x, warps, kind) for x in (left, right)]
        products = _matrix(elements[0], a_layout, (16, depth)) @ _matrix(elements[1], b_layout, (depth, 8))
        flat = products.reshape(len(products), -1)
        for target, term, places in zip(results, add, C, strict=True):
            total = flat[:, places] + _by_warp(unit, term, warps)
            target.reshape(-1, WARP)[warps] = total

    return multiply


def _matrices(instruction: Instruction) -> tuple[int, bool]:
    """Return how many 8x8 matrices of 16-bit elements ldmatrix or stmatrix moves, and whether transposed."""
    words = instruction.parts[1:]
    if words[:3] != ("sync", "aligned", "m8n8") or words[-1] != "b16" or words[-2] not in ("shared", "shared::cta"):
        raise PtxError(f"warps: {instruction.text} must be of m8n8 and .shared.b16")
    return int(words[3][1:]), "trans" in words


def _rows(unit: Unit, addresses: np.ndarray, number: int, warps: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices (rows, 4) of the 4-byte units of every matrix's rows, lane by lane, and the rows' warps."""
    picked = _by_warp(unit, addresses, warps)[:, : 8 * number]
    numbers = _by_warp(unit, unit.warps, warps)[:, : 8 * number]
    _, index = unit.shared.indices(picked.reshape(-1), 16, 16)
    return index, numbers.reshape(-1)


def _transposed(words: np.ndarray) -> np.ndarray:
    """Transpose matrices (..., 8, 4) of pairs of 16-bit elements."""
    elements = np.ascontiguousarray(words).view(np.uint16)
    return np.ascontiguousarray(np.swapaxes(elements, -1, -2)).view(np.uint32)


def bind_load_matrices(unit: Unit, instruction: Instruction) -> Step:
    """ldmatrix: lane l gives row l % 8 of matrix l / 8, and gets word l % 4 of row l / 4 of each matrix."""
    number, transposed = _matrices(instruction)
    targets = _registers(unit, instruction.operands[0], number)
    address = unit.registers.address(instruction.operands[1], 32)

    def load(mask: Any) -> None:
        warps = active_warps(mask, unit.count)
        index, numbers = _rows(unit, address(), number, warps)
        words = unit.shared.read(4, index, numbers).reshape(-1, number, 8, 4)
        if transposed:
            words = _transposed(words)
        for i, target in enumerate(targets):
            target.reshape(-1, WARP)[warps] = words[:, i].reshape(-1, WARP)

    return load


def bind_store_matrices(unit: Unit, instruction: Instruction) -> Step:
    """stmatrix: the way back of ldmatrix."""
    number, transposed = _matrices(instruction)
    address = unit.registers.address(instruction.operands[0], 32)
    sources = _registers(unit, instruction.operands[1], number)

    def store(mask: Any) -> None:
        warps = active_warps(mask, unit.count)
        index, numbers = _rows(unit, address(), number, warps)
        words = np.stack([_by_warp(unit, x, warps).reshape(-1, 8, 4) for x in sources], 1)
        if transposed:
            words = _transposed(words)
        unit.shared.write(4, index, words.reshape(-1, 4), numbers)

    return store


def check_members(unit: Unit, members: Any, mask: Any) -> None:
    """Raise unless the threads that execute are all members, and all members that have not exited execute."""
    lanes = np.ones(unit.count, bool) if mask is None else mask
    bits = (np.broadcast_to(members, unit.count)[:, None] >> np.arange(WARP, dtype=np.uint32) & np.uint32(1)).astype(
        bool
    )
    wanted = bits & ~unit.exited.reshape(-1, 1, WARP).repeat(WARP, 1).reshape(-1, WARP)
    present = lanes.reshape(-1, 1, WARP).repeat(WARP, 1).reshape(-1, WARP)
    own = bits[np.arange(unit.count), np.arange(unit.count) % WARP]
    if (lanes & ~own).any():
        raise Fault("a thread that is not in its own member mask")
    if (lanes & (wanted & ~present).any(1)).any():
        raise Fault("members of the mask are elsewhere: the threads of the warp have diverged")


def bind_shuffle(unit: Unit, instruction: Instruction) -> Step:
    """shfl.sync: lane j of a segment, by the mode; the own value where j is out of range."""
    mode = instruction.parts[2]
    result = instruction.operands[0]
    flag = None
    if isinstance(result, Pair):
        flag = unit.registers.target(result.predicate, "pred")
        result = result.result
    target = unit.registers.target(result, "b32")
    value, b, c, members = (unit.registers.source(x, "u32") for x in instruction.operands[1:])
    if instruction.parts[1] != "sync" or mode not in ("up", "down", "bfly", "idx"):
        raise PtxError(f"warps: {instruction.text} must be a shfl.sync")
    lane = (np.arange(unit.count) % WARP).astype(np.int64)
    first = np.arange(unit.count) // WARP * WARP

    def shuffle(mask: Any) -> None:
        check_members(unit, members, mask)
        offset, clamp = np.asarray(b & np.uint32(31), np.int64), np.asarray(c & np.uint32(31), np.int64)
        segment = np.asarray(c >> np.uint32(8) & np.uint32(31), np.int64)
        low = lane & segment
        top = low | (clamp & ~segment)
        if mode == "up":
            j = lane - offset
            inside = j >= top
        else:
            j = {"down": lane + offset, "bfly": lane ^ offset, "idx": low | (offset & ~segment)}[mode]
            inside = j <= top
        j = first + np.where(inside, j, lane)
        if mask is not None and not mask[j[mask]].all():
            raise Fault("shfl.sync reads a register of a thread that does not take part")
        put(target, np.broadcast_to(value, unit.count)[j], mask)
        if flag is not None:
            put(flag, inside, mask)

    return shuffle


def bind_warp_barrier(unit: Unit, instruction: Instruction) -> Step:
    """bar.warp.sync: the members of a mask must arrive together."""
    members = unit.registers.source(instruction.operands[0], "u32")
    return lambda mask: check_members(unit, members, mask)


def bind_active_mask(unit: Unit, instruction: Instruction) -> Step:
    """activemask: a bit for each thread of the warp that executes it now."""
    target = unit.registers.target(instruction.operands[0], "b32")

    def execute(mask: Any) -> None:
        lanes = np.ones(unit.count, bool) if mask is None else mask
        bits = (lanes.reshape(-1, WARP) << np.arange(WARP, dtype=np.uint64)).sum(1).astype(np.uint32)
        put(target, bits.repeat(WARP), mask)

    return execute
