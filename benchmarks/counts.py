"""Count the bytes that the CUDA kernels move and the products they compute, on a CPU: `python -m benchmarks.counts`.

The shipped sources run on the CUDA machine of tests/cuda_on_cpu (it needs g++; the first run compiles for some
minutes), two lines of N positions at a time. Memory accesses and operations do not depend on the values, so an item of
work costs the same for every line, and a call costs the sum of its items. Each row of docs/results/kernels-counts.csv
is an item: of the first phase, which only writes results, or of a later one, which adds to them. Where an H100 goes
through the images of the hot case in passes, it has the channels of one pass. The script also prints them in markdown.
`python -m benchmarks.limits` has what follows for the time of a whole call.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.registers import GPUS
from ccgpu.kernels.cuda.configurations import ARITHMETICS, KERNELS, TILE, Configuration, source
from ccgpu.kernels.cuda.plans import Launch, Pointers, plan
from tests.cuda_on_cpu import device

RECORD = Path(__file__).resolve().parents[1] / "docs" / "results" / "kernels-counts.csv"

N, DEPTH, CHANNELS, IMAGES = 97, 64, 512, 8  # CCNet's training: crops of 769 pixels, features at an eighth, batch 8
H100 = GPUS["sm_90"]
COUNTED = [(kernel, arithmetic) for arithmetic in ("bf16", "tf32", "f32") for kernel in ("forward", "backward")]
COUNTED += [(kernel, "bf16") for kernel in KERNELS[2:]]

MULTIPLY_ADDS = {"bf16": 16 * 8 * 16, "f16": 16 * 8 * 16, "tf32": 16 * 8 * 8}  # multiply-adds of one instruction


class Item(NamedTuple):
    """The cost of one line in one phase of a pass.

    Wavefronts are cycles of shared memory, including those of bank conflicts.
    """

    kernel: str
    arithmetic: str
    phase: str  # "first" or "later"
    positions: int  # of the line
    depth: int  # channels of q and k
    channels: int  # of v, in all passes
    passes: int  # through an image, each with a part of the channels
    entry: str
    threads: int
    shared_bytes: int
    blocks: int  # on a multiprocessor
    minimum_bytes: int  # each operand of the line read once, each result written once
    bytes_read: int
    bytes_written: int
    matrix_multiplies: int
    multiply_adds: int
    matrix_load_wavefronts: int
    load_wavefronts: int
    store_wavefronts: int
    copy_wavefronts: int
    matrix_load_conflicts: int  # of these wavefronts, those that bank conflicts add
    load_conflicts: int
    store_conflicts: int
    copy_conflicts: int

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.bytes_read + self.bytes_written

    @property
    def wavefronts(self) -> int:
        """Cycles of shared memory."""
        return self.matrix_load_wavefronts + self.load_wavefronts + self.store_wavefronts + self.copy_wavefronts

    @property
    def conflicts(self) -> int:
        """Of these, those that bank conflicts add."""
        return self.matrix_load_conflicts + self.load_conflicts + self.store_conflicts + self.copy_conflicts


def arrays_of(launch: Launch, sizes: tuple[int, int], depth: int, channels: int) -> dict[str, np.ndarray]:
    """Return arrays of zeros, channels last, for everything that a kernel reads and writes on one image."""
    configuration = launch.configuration
    kind = ARITHMETICS[configuration.arithmetic]
    element = {2: np.uint16, 4: np.float32, 8: np.float64}[kind.size]
    sums = {4: np.float32, 8: np.float64}[kind.sum]
    shallow, wide, scalars, weights = (*sizes, depth), (*sizes, channels), sizes, (*sizes, sum(sizes) - 1)
    fused: dict[str, tuple[int, ...]] = {"q": shallow, "k": shallow, "v": wide, "out": wide, "lse": scalars}
    scratch = {"scratch": (launch.scratch, *scalars)} if launch.scratch else {}
    gradients = {"dout": wide, "delta": scalars, "dq": shallow, "dk": shallow, "dv": wide}
    summed: dict[str, tuple[int, ...]] = {"v": wide, "out": wide, "weights": weights}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "forward": {**fused, **scratch},
        "backward": {**fused, **gradients},
        "affinity": {"q": shallow, "k": shallow, "weights": weights},
        "aggregate": summed,
        "aggregate_transposed": summed,
    }
    types = dict.fromkeys(("lse", "scratch", "delta", "weights"), sums)
    return {name: np.zeros(shape, types.get(name, element)) for name, shape in shapes[configuration.kernel].items()}


def minimum_bytes(kernel: str, arithmetic: str, first: bool, n: int, depth: int, channels: int) -> int:
    """Return the bytes that a line of n positions must read and write in a phase, with the `channels` of a pass.

    In the stages a line has n^2 energies or weights, without the diagonal on all axes but the last: there the position
    itself is left out. Here that is the first phase.
    """
    kind = ARITHMETICS[arithmetic]
    d, c, s = depth * kind.size, channels * kind.size, kind.sum
    again = not first
    return {
        # q, k, v; out and lse, which a later phase reads before it writes them
        "forward": n * (2 * d + c + (c + s) * (1 + again)),
        # q, k, v, dout, lse; the first phase reads out and writes delta, a later one reads delta; dq, dk, dv
        "backward": n * (2 * d + 2 * c + s + (s if again else c + s) + (2 * d + c) * (1 + again)),
        "affinity": n * 2 * d + (n * n - n * first) * s,
        "aggregate": n * (c + c * (1 + again)) + (n * n - n * first) * s,
        "aggregate_transposed": n * (c + c * (1 + again)) + (n * n - n * first) * s,
    }[kernel]


def multiply_adds(configuration: Configuration, first: bool, depth: int, channels: int) -> int:
    """Return the multiply-adds of an item, including padding; `channels` are those of a pass."""
    rows = TILE * configuration.tiles
    size = ARITHMETICS[configuration.arithmetic].size
    chunk = configuration.chunk_units * 16 // size
    # In 16 bits, delta in the first phase is the diagonals of products of tiles.
    diagonals = first and size == 2 and configuration.arithmetic in MULTIPLY_ADDS
    wide, shallow = (chunk * -(-x // chunk) for x in (channels, depth))
    return {
        "forward": rows * rows * (2 * configuration.depth + wide),  # energies twice, values
        # energies, dk, dq, dP and dv
        "backward": rows * rows * (3 * configuration.depth + 2 * wide) + diagonals * rows * TILE * wide,
        "affinity": rows * rows * shallow,
        "aggregate": rows * rows * wide,
        "aggregate_transposed": rows * rows * wide,
    }[configuration.kernel]


def passes_of(kernel: str, arithmetic: str) -> int:
    """Return in how many passes an H100 goes through the images of the hot case."""
    return plan(kernel, arithmetic, IMAGES, (N, N), DEPTH, CHANNELS, H100)[0].passes


def count(kernel: str, arithmetic: str, first: bool, n: int, depth: int, channels: int, passes: int = 1) -> Item:
    """Run one phase of a kernel on two lines of n positions and return the cost of one of them in a pass.

    The map is (n, 2) for the first phase and (2, n) for a later one: lines of two positions belong to another launch.

    Raises:
        RuntimeError: two lines do not cost twice what one does in each pass, or the matrix instructions are not those
            expected.
    """
    sizes = (n, 2) if first else (2, n)
    launches = plan(kernel, arithmetic, 1, sizes, depth, channels, H100, cuts=1, passes=passes)
    launch = launches[0 if first else -1]
    configuration = launch.configuration
    text = source(configuration, primitives=device.HERE / "primitives.cuh")
    arrays = arrays_of(launch, sizes, depth, channels)
    counters = np.zeros(launch.counters, np.int32)
    pointers = Pointers(**{name: array.ctypes.data for name, array in arrays.items()})
    counts = device.compile(text, [configuration.entry]).launch(
        configuration.entry,
        launch.blocks,
        configuration.threads,
        launch.arguments(pointers, counters.ctypes.data),
        configuration.shared_bytes,
        [*((name, array, True) for name, array in arrays.items()), ("counters", counters, True)],
        count=True,
        check_races=False,
    )
    shared = [getattr(counts, kind) for kind in device.KINDS]
    numbers = [counts.bytes_read, counts.bytes_written, counts.matrix_multiplies]
    numbers += [*(x.wavefronts for x in shared), *(x.conflicts for x in shared)]
    items, part = launch.blocks, channels // passes
    if items != 2 * passes or any(x % items for x in numbers):
        raise RuntimeError(
            f"count: two lines must cost {2 * passes} times what one does in a pass, got {numbers} in {items} items"
        )
    read, written, products, *accesses = (x // items for x in numbers)
    expected = multiply_adds(configuration, first, depth, part)
    if arithmetic in MULTIPLY_ADDS and products * MULTIPLY_ADDS[arithmetic] != expected:
        raise RuntimeError(f"count: {configuration.entry} must form {expected} products, got {products} instructions")
    return Item(
        kernel,
        arithmetic,
        "first" if first else "later",
        n,
        depth,
        channels,
        passes,
        configuration.entry,
        configuration.threads,
        configuration.shared_bytes,
        configuration.blocks,
        minimum_bytes(kernel, arithmetic, first, n, depth, part),
        read,
        written,
        products,
        expected,
        *accesses,
    )


def table(items: Sequence[Item]) -> str:
    """Return a table of the items, in markdown."""
    lines = [
        "| kernel | phase | passes | bytes / least | read KB | written KB | matrix loads | loads | stores | copies "
        "| conflicts | products |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for x in items:
        products = f"{x.matrix_multiplies:,} mma" if x.matrix_multiplies else f"{x.multiply_adds / 1e6:.1f} M FMA"
        lines.append(
            f"| {x.kernel}, {x.arithmetic} | {x.phase} | {x.passes} | {x.bytes / x.minimum_bytes:.3f} "
            f"| {x.bytes_read / 1e3:.1f} | {x.bytes_written / 1e3:.1f} | {x.matrix_load_wavefronts:,} "
            f"| {x.load_wavefronts:,} | {x.store_wavefronts:,} | {x.copy_wavefronts:,} | {x.conflicts:,} | {products} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Count, write the record, print the table."""
    flags = argparse.ArgumentParser(prog="python -m benchmarks.counts", description="Count what the CUDA kernels do.")
    flags.add_argument("--out", type=Path, default=RECORD, metavar="CSV", help="the record (%(default)s)")
    arguments = flags.parse_args(argv)
    items = []
    for kernel, arithmetic in COUNTED:
        for first in (True, False):
            items.append(count(kernel, arithmetic, first, N, DEPTH, CHANNELS, passes_of(kernel, arithmetic)))
            print(items[-1].entry, items[-1].phase, file=sys.stderr, flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Item._fields)
        writer.writerows(items)
    print(table(items))


if __name__ == "__main__":
    main()
