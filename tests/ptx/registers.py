"""Registers of a group of threads as NumPy vectors, read and written as the types of instructions.

PTX ISA, "Operand Size Exceeding Instruction-Type Size": st, cvt and cp take the low bits of a wider register, ld and
cvt extend their result to it, with its sign if their type is signed. A register of %p holds a bool.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.ptx.parse import Address, Immediate, Kernel, Operand, PtxError, Register, Special, Symbol

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for names, kind in (
        ("pred", "?"),
        ("b8 u8", "u1"),
        ("s8", "i1"),
        ("b16 u16 bf16", "u2"),
        ("s16", "i2"),
        ("f16", "f2"),
        ("b32 u32 f16x2 bf16x2 tf32", "u4"),
        ("s32", "i4"),
        ("f32", "f4"),
        ("b64 u64", "u8"),
        ("s64", "i8"),
        ("f64", "f8"),
    )
    for name in names.split()
}
ROWS = {1: "?", 8: "u1", 16: "u2", 32: "u4", 64: "u8"}
WARP = 32


def constant(value: int | float, dtype: np.dtype) -> Any:
    """Return a constant as a scalar of a type; integers wrap around."""
    if dtype.kind in "iu":
        return np.array(int(value) % 2 ** (8 * dtype.itemsize), f"u{dtype.itemsize}").view(dtype)[()]
    return dtype.type(value)


class Registers:
    """The registers of `threads` threads, a row for each register; `reset` fills them with 0xFF."""

    def __init__(self, kernel: Kernel, threads: np.ndarray, block: tuple[int, int, int], grid: tuple[int, int, int]):
        self.kernel, self.count = kernel, len(threads)
        names: dict[int, list[str]] = {}
        for name, bits in kernel.registers.items():
            names.setdefault(bits, []).append(name)
        self._files = {bits: np.empty((len(of), self.count), ROWS[bits]) for bits, of in names.items()}
        self.rows = {name: self._files[bits][i] for bits, of in names.items() for i, name in enumerate(of)}
        self.context: dict[str, int] = {}  # addresses of variables and parameters
        wide = threads.astype(np.uint32)
        self._special: dict[str, np.ndarray] = {
            "%tid.x": wide % block[0],
            "%tid.y": wide // block[0] % block[1],
            "%tid.z": wide // (block[0] * block[1]),
            "%laneid": wide % WARP,
            "%warpid": wide // WARP,
            "WARP_SZ": np.full_like(wide, WARP),
        }
        for axis, letter in enumerate("xyz"):
            self._special[f"%ntid.{letter}"] = np.full_like(wide, block[axis])
            self._special[f"%nctaid.{letter}"] = np.full_like(wide, grid[axis])
            self._special[f"%ctaid.{letter}"] = np.zeros_like(wide)

    def reset(self, place: tuple[int, int, int]) -> None:
        """Start another block: its place in the grid, and registers that hold NaN."""
        for file in self._files.values():
            file.view(np.uint8).fill(0xFF if file.dtype != np.dtype("?") else 1)
        for axis, letter in enumerate("xyz"):
            self._special[f"%ctaid.{letter}"].fill(place[axis])

    def source(self, operand: Operand, kind: str) -> Any:
        """Return a live view of an operand as a type, or a scalar."""
        dtype = DTYPES[kind]
        if isinstance(operand, Register):
            row = self.rows[operand.name]
            if operand.negated:
                raise PtxError(f"registers: !{operand.name} must be negated where it is used")
            return self._narrow(row, dtype, operand)
        if isinstance(operand, Special):
            return self._narrow(self._special[operand.name], dtype, operand)
        if isinstance(operand, Immediate):
            return constant(operand.value, dtype)
        if isinstance(operand, Symbol):
            if operand.name not in self.context:
                raise PtxError(f"registers: the variable {operand.name} must be a parameter, shared or local")
            return constant(self.context[operand.name], dtype)
        raise PtxError(f"registers: {operand} must be a register or a constant")

    @staticmethod
    def _narrow(row: np.ndarray, dtype: np.dtype, operand: Any) -> np.ndarray:
        if row.dtype == dtype or row.itemsize == dtype.itemsize:
            return row.view(dtype)
        if row.itemsize < dtype.itemsize or row.dtype.kind == "b":
            raise PtxError(f"registers: {operand.name} must have {8 * dtype.itemsize} bits or more")
        return row.view(dtype)[:: row.itemsize // dtype.itemsize]

    def target(self, operand: Operand, kind: str) -> np.ndarray:
        """Return a view of a register that takes values of a type; a wider register extends them."""
        dtype = DTYPES[kind]
        if not isinstance(operand, Register):
            raise PtxError(f"registers: a result must be a register, got {operand}")
        if operand.name == "_":
            return np.empty(self.count, dtype)
        row = self.rows[operand.name]
        if row.itemsize == dtype.itemsize:
            return row.view(dtype)
        if row.itemsize < dtype.itemsize or dtype.kind not in "iu":
            raise PtxError(f"registers: {operand.name} must have {8 * dtype.itemsize} bits")
        return row.view(f"{dtype.kind}{row.itemsize}")

    def address(self, operand: Operand, width: int = 64) -> Any:
        """Return a function of no argument: the addresses that [base + offset] names (uint64), or a scalar.

        In a space of 32-bit addresses the base may have 32 or 64 bits.
        """
        if not isinstance(operand, Address):
            raise PtxError(f"registers: {operand} must be an address")
        if operand.base is None or isinstance(operand.base, Symbol):
            base = 0 if operand.base is None else int(self.source(operand.base, "u64"))
            return lambda: np.full(self.count, base + operand.offset, np.uint64)
        row = self.rows[operand.base.name]
        if row.itemsize * 8 < width:
            raise PtxError(f"registers: {operand.base.name} must hold an address of {width} bits")
        if operand.offset == 0 and row.itemsize == 8:
            return lambda: row
        offset = np.int64(operand.offset)
        return lambda: (row.astype(np.int64) + offset).view(np.uint64)


def put(target: np.ndarray, value: Any, mask: np.ndarray | None) -> None:
    """Write a result, where the mask (None: everywhere) is set."""
    if mask is None:
        target[...] = value
    else:
        np.copyto(target, value, where=mask, casting="unsafe")
