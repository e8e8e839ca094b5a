"""The compiled CUDA kernels: which configuration computes a call, what it needs of a GPU, and its source.

A configuration is one compiled kernel, for an arithmetic, a number of tiles of a line in a block, and a number of
channels of q and k. Sizes of the map, batch and channels of v are arguments of the kernel, so another image size needs
another kernel only if its lines are in another class of lengths (`TILE_CLASSES`, in tiles of 16 positions).
schedule.cuh defines items and phases.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ccgpu.kernels.dtypes import DTYPES

FOLDER = Path(__file__).resolve().parent
OPTIONS = ("-std=c++17",)
KERNELS = ("forward", "backward", "affinity", "aggregate", "aggregate_transposed")
TILE = 16  # positions
TILE_CLASSES = (1, 2, 4, 5, 7, 8, 9, 12, 16)
DEPTHS = (16, 32, 64, 128, 256)
UNIT = 16  # bytes that a thread copies at once; the rows of q, k and v must be a multiple of it
ITEM_BYTES = 64  # shared memory for a block's item
OLDEST = (7, 5)  # compute capability that the kernels need
MATRIX_UNITS = (8, 0)  # compute capability from which the matrix units are used
ADDS_IN_L2 = (9, 0)  # compute capability from which 16-bit elements can be added in the L2 cache


class Arithmetic(NamedTuple):
    """How products are computed, and how many tiles' sums and weights fit in registers."""

    type: str  # C++ type in arithmetic.cuh
    size: int  # bytes of an element
    sheet: int  # bytes of a weight in shared memory
    sum: int  # bytes of a sum
    forward_rows: int  # tiles of rows that a warp owns in forward, for lines of 4 tiles and more
    backward_rows: int  # in backward
    rows: int  # in the stages
    forward_most: int  # most tiles of a block in forward
    most: int  # most tiles of a block in the other kernels


ARITHMETICS = {
    "bf16": Arithmetic("Matrix16<bf16>", 2, 2, 4, 2, 2, 2, 16, 8),
    "f16": Arithmetic("Matrix16<f16>", 2, 2, 4, 2, 2, 2, 16, 8),
    "tf32": Arithmetic("Tf32", 4, 4, 4, 2, 2, 1, 7, 7),
    "f32": Arithmetic("MultiplyAdd<float, float>", 4, 4, 4, 2, 1, 1, 7, 7),
    "f64": Arithmetic("MultiplyAdd<double, double>", 8, 8, 8, 1, 1, 1, 4, 2),
    "bf16_fma": Arithmetic("MultiplyAdd<bf16, float>", 2, 4, 4, 1, 1, 1, 4, 4),
    "f16_fma": Arithmetic("MultiplyAdd<f16, float>", 2, 4, 4, 1, 1, 1, 4, 4),
}


class Limits(NamedTuple):
    """The properties of a GPU that decide which configurations it can run."""

    capability: tuple[int, int]  # compute capability
    shared_bytes: int  # most dynamic shared memory of a block
    multiprocessors: int
    l2_bytes: int  # of the L2 cache


class Configuration(NamedTuple):
    """One kernel to compile."""

    kernel: str
    arithmetic: str
    tiles: int
    depth: int  # channels of q and k that a tile holds; 0 in the stages, whose kernels read the channels in chunks
    row_tiles: int  # tiles of rows that a warp owns
    chunk_units: int  # units of 16 bytes of a chunk of channels
    blocks: int  # blocks that a multiprocessor should hold at once, which bounds the registers
    half_units: int = 0  # units of a row of dv that backward computes at once
    adds: bool = False  # whether later phases add to results in the L2 cache, instead of reading them

    @property
    def threads(self) -> int:
        """Threads of a block: a warp for every `row_tiles` tiles."""
        return 32 * math.ceil(self.tiles / self.row_tiles)

    @property
    def entry(self) -> str:
        """The kernel's name."""
        depth, half = f"_d{self.depth}" if self.depth else "", f"h{self.half_units}" if self.half_units else ""
        shape = f"r{self.row_tiles}c{self.chunk_units}{half}b{self.blocks}{'a' if self.adds else ''}"
        return f"cca_{self.kernel}_{self.arithmetic}_n{TILE * self.tiles}{depth}_{shape}"

    @property
    def shared_bytes(self) -> int:
        """Bytes of dynamic shared memory of a block; the kernel asserts the same number."""
        kind, rows = ARITHMETICS[self.arithmetic], TILE * self.tiles
        chunk, depth = rows * UNIT * self.chunk_units, rows * UNIT * _units(self.depth * kind.size)
        if self.kernel == "forward":
            return 2 * max(depth, chunk) + 2 * chunk + rows * kind.sum + ITEM_BYTES
        if self.kernel == "backward":
            columns = min(self.depth, 32 if kind.size == 8 or (kind.size == 4 and self.depth > 64) else 64)
            late = rows * UNIT * (_units(rows * kind.sheet) + _units(columns * kind.size))
            return 2 * depth + max(5 * chunk, late) + 2 * rows * kind.sum + ITEM_BYTES
        return 4 * chunk + ITEM_BYTES

    def instantiation(self) -> str:
        """Return the lines of C++ that instantiate the kernel."""
        numbers = [str(n) for n in (self.tiles, self.depth, self.row_tiles, self.chunk_units)]
        if self.kernel == "backward":
            numbers.append(str(self.half_units))
        if self.kernel in ("forward", "backward"):
            numbers.append(str(self.adds).lower())
        else:
            del numbers[1]  # the stages hold no channels of q and k
        stage = {"forward": "Forward", "backward": "Backward"}.get(self.kernel, "Stage")
        shape = f"{stage}Shape<{', '.join([ARITHMETICS[self.arithmetic].type, *numbers])}>"
        return (
            f'extern "C" __global__ void __launch_bounds__({self.threads}, {self.blocks}) '
            f"{self.entry}(const __grid_constant__ Arguments a) {{\n"
            f'  static_assert({shape}::SHARED == {self.shared_bytes}, "shared memory as launched");\n'
            f"  {self.kernel}<{shape}>(a);\n}}\n"
        )


def _units(size: int) -> int:
    """Return the number of units of a tile's row that holds `size` bytes, as `units` in tiles.cuh does."""
    return 2 if size <= 32 else 4 if size <= 64 else (size + 127) // 128 * 8


def arithmetic(dtype: str, capability: tuple[int, int], tf32: bool) -> str:
    """Return the arithmetic (a key of ARITHMETICS) for a dtype (a key of DTYPES).

    From compute capability 8.0 on, the matrix units multiply 16-bit elements and, where `tf32` allows it, float32
    rounded to TF32; everything else is computed with multiply-adds.
    """
    name, matrix_units = DTYPES[dtype].cuda, capability >= MATRIX_UNITS
    if dtype == "float32" and tf32 and matrix_units:
        return "tf32"
    return name if dtype in ("float32", "float64") or matrix_units else f"{name}_fma"


def why_not(dtype: str, depth: int, limits: Limits) -> str | None:
    """Return why the kernels cannot run a call with `depth` channels of q and k, or None if they can."""
    if dtype not in DTYPES:
        *others, last = DTYPES
        return f"its kernels compute {', '.join(others)} and {last}, and these are {dtype}"
    if limits.capability < OLDEST:
        return "its kernels need compute capability {}.{}, and this GPU has {}.{}".format(*OLDEST, *limits.capability)
    if depth > DEPTHS[-1]:
        return f"its kernels hold at most {DEPTHS[-1]} channels of q and k, and these have {depth}"
    if not classes("backward", arithmetic(dtype, limits.capability, tf32=False), depth, limits):
        return (
            f"its kernels need more shared memory for {depth} channels of q and k in {dtype} "
            f"than the {limits.shared_bytes} bytes of this GPU"
        )
    return None


def configuration(kernel: str, arithmetic: str, tiles: int, depth: int, limits: Limits) -> Configuration:
    """Return the kernel for lines of up to `tiles` tiles (of TILE_CLASSES) and `depth` channels of q and k.

    Its `blocks` is 0 where it does not fit the GPU.
    """
    kind = ARITHMETICS[arithmetic]
    owned = {"forward": kind.forward_rows, "backward": kind.backward_rows}.get(kernel, kind.rows)
    row_tiles = owned if tiles >= 4 else 1
    chosen = _fitted(kernel, arithmetic, tiles, depth, row_tiles, limits)
    if kernel == "backward" and tiles >= 8 and (chosen.blocks == 1 or chosen.depth == DEPTHS[0]):
        # With two tiles of rows a warp, the sums and weights of 8 tiles (128 positions) take all registers, and with
        # few channels of q and k one or two more (as compiled). Where a multiprocessor holds one block only, twice as
        # many warps with one tile each also hide more latency.
        return _fitted(kernel, arithmetic, tiles, depth, 1, limits)
    return chosen


def _fitted(kernel: str, arithmetic: str, tiles: int, depth: int, row_tiles: int, limits: Limits) -> Configuration:
    """Return the kernel with the chunk of channels and the number of blocks that fit a GPU best."""
    kind, forward = ARITHMETICS[arithmetic], kernel == "forward"
    held = next(d for d in DEPTHS if d >= depth) if kernel in ("forward", "backward") else 0
    # Most registers of a thread (docs/results/kernels-registers.csv); a multiprocessor has 65,536.
    registers = 168 if forward and kind.size == 2 and tiles <= 7 and held <= 64 else 255
    by_registers = max(1, 65536 // (registers * 32 * math.ceil(tiles / row_tiles)))
    choices = []
    for chunk_units in (8, 4):
        if chunk_units == 8 and forward and kind.size == 2 and tiles > 9:
            continue  # 64 channels of results do not fit in registers beside the weights of 12 tiles
        if chunk_units == 8 and kernel == "backward" and arithmetic == "tf32" and tiles > 4:
            continue  # 32 channels of dv do not fit in registers beside the sums and weights of two tiles a warp
        if chunk_units == 4 and kind.size == 8:
            continue  # 8 channels, half a product's columns
        chosen = Configuration(kernel, arithmetic, tiles, held, row_tiles, chunk_units, 1)
        by_memory = (limits.shared_bytes + 1024) // (chosen.shared_bytes + 1024)
        blocks = min(by_registers, by_memory, 8)
        if kernel == "backward":
            # A warp that owns two tiles of 16-bit rows computes dv in parts of a chunk, for want of registers.
            chosen = chosen._replace(half_units=2 if kind.size == 2 and row_tiles == 2 else chunk_units)
        choices.append(chosen._replace(blocks=blocks))
    # The wider chunk, unless only the narrower one leaves room for two blocks, which hide each other's latency.
    return max(choices, key=lambda c: min(c.blocks, 2))


@lru_cache(maxsize=1024)
def classes(kernel: str, arithmetic: str, depth: int, limits: Limits) -> tuple[int, ...]:
    """Return the classes of line lengths, in tiles, for which a kernel fits the GPU."""
    kind = ARITHMETICS[arithmetic]
    most = kind.forward_most if kernel == "forward" else kind.most
    fitting = (n for n in TILE_CLASSES if n <= most)
    return tuple(n for n in fitting if configuration(kernel, arithmetic, n, depth, limits).blocks > 0)


@lru_cache(maxsize=64)
def _spliced(kernel: str, primitives: Path) -> str:
    """Return the kernel's file with its includes pasted in, each once: caches of compiled kernels compare the text."""
    seen: set[str] = set()

    def text(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        path = primitives if name == "primitives.cuh" else FOLDER / name
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith('#include "') and path.parent == FOLDER:
                lines.append(text(line.split('"')[1]))
            elif line != "#pragma once":
                lines.append(line)
        return "\n".join(lines)

    return text({"forward": "forward.cu", "backward": "backward.cu"}.get(kernel, "stages.cu"))


def source(*configurations: Configuration, primitives: Path = FOLDER / "primitives.cuh") -> str:
    """Return the complete CUDA C++ of configurations, which must come from one .cu file.

    `primitives` is a drop-in replacement of primitives.cuh: the tests pass a model of the GPU's instructions.
    """
    return "\n".join([_spliced(configurations[0].kernel, primitives), *(c.instantiation() for c in configurations)])
