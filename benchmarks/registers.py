"""Print the registers and shared memory of every CUDA kernel, as NVRTC compiles it: `python -m benchmarks.registers`.

Prints registers, stack, spills and shared memory of the configurations that may be chosen on each kind of GPU; options
select some of them. Needs the optional dependencies `test-cuda`, but no GPU.

--write puts rows into docs/results/kernels-registers.csv: of all kinds of GPU at 64 channels of q and k, and of one GPU
at every depth. `make test-cuda` compares the kernels with that table.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from benchmarks import nvrtc
from ccgpu.kernels.cuda.configurations import (
    DEPTHS,
    KERNELS,
    OPTIONS,
    Configuration,
    Limits,
    arithmetic,
    classes,
    configuration,
    source,
    why_not,
)

TABLE = Path(__file__).resolve().parents[1] / "docs" / "results" / "kernels-registers.csv"
DTYPES = ("bfloat16", "float16", "float32", "float64")
CONFIGURED_DEPTHS = (0, *DEPTHS)  # 0: the stages, whose kernels hold no channels
TABLED_DEPTH, TABLED_GPU = 64, "sm_90"  # the table has every GPU at this depth, and every depth on this GPU
# Compute capability, the shared memory that a block may have (CUDA C++ Programming Guide, "Technical specifications per
# compute capability"), multiprocessors and L2 cache, of a well-known GPU each.
GPUS = {
    "sm_75": Limits((7, 5), 64 * 1024, 40, 4 * 2**20),  # T4
    "sm_80": Limits((8, 0), 163 * 1024, 108, 40 * 2**20),  # A100
    "sm_86": Limits((8, 6), 99 * 1024, 82, 6 * 2**20),  # RTX 3090
    "sm_89": Limits((8, 9), 99 * 1024, 128, 72 * 2**20),  # RTX 4090
    "sm_90": Limits((9, 0), 227 * 1024, 132, 50 * 2**20),  # H100
    "sm_100": Limits((10, 0), 227 * 1024, 148, 126 * 2**20),  # B200
}
# The options that CuPy adds to those of a RawModule, so that the table is about the machine code that runs.
CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")
REPORT = "--ptxas-options=-v"


class Resources(NamedTuple):
    """A row of the table: a configuration as compiled for a GPU."""

    nvrtc: str
    gpu: str
    entry: str
    threads: int
    registers: int  # of a thread
    stack_bytes: int  # of a thread, in local memory: the spills, and arrays that are not indexed by constants
    spill_stores: int  # bytes that a thread writes to local memory because it lacks registers
    spill_loads: int  # bytes of these that it reads
    shared_bytes: int  # dynamic shared memory of a block
    blocks_by_registers: int  # blocks that fit on a multiprocessor by their registers
    blocks_by_shared: int  # and by their shared memory


class Job(NamedTuple):
    """A configuration to compile for a GPU."""

    gpu: str
    configuration: Configuration


def jobs(
    gpus: Iterable[str] = GPUS, kernels: Iterable[str] = KERNELS, depths: Iterable[int] = CONFIGURED_DEPTHS
) -> list[Job]:
    """Return every configuration that a call may choose on the given GPUs, in the table's order."""
    depths, kernels = tuple(depths), tuple(kernels)
    found: dict[Job, None] = {}
    for gpu, kernel, dtype, tf32 in product(gpus, KERNELS, DTYPES, (False, True)):
        limits = GPUS[gpu]
        kind = arithmetic(dtype, limits.capability, tf32)
        for depth in DEPTHS:
            if kernel not in kernels or (kernel in ("forward", "backward") and why_not(dtype, depth, limits)):
                continue
            for tiles in classes(kernel, kind, depth, limits):
                chosen = configuration(kernel, kind, tiles, depth, limits)
                if chosen.depth in depths:
                    found[Job(gpu, chosen)] = None
    return list(found)


def tabled(todo: Iterable[Job]) -> list[Job]:
    """Return the jobs that the table has rows for."""
    return [job for job in todo if job.gpu == TABLED_GPU or job.configuration.depth == TABLED_DEPTH]


def blocks_by_registers(threads: int, registers: int) -> int:
    """Return how many blocks the 65,536 registers of a multiprocessor hold.

    Each of its four parts has 16,384 and allocates a warp's registers in steps of 256 (CUDA's occupancy calculator).
    """
    warps = 4 * (16384 // (-(-registers * 32 // 256) * 256))
    return warps // (threads // 32)


def blocks_by_shared(shared_bytes: int, limits: Limits) -> int:
    """Return how many blocks the shared memory of a multiprocessor holds.

    From compute capability 8.0 on, the system reserves 1 KiB for each block, so one block cannot have all of it.
    """
    reserved = 1024 if limits.capability >= (8, 0) else 0
    return (limits.shared_bytes + reserved) // (shared_bytes + reserved)


def read_report(log: str, entry: str) -> tuple[int, int, int, int]:
    """Return registers and the bytes of stack, spill stores and spill loads that ptxas reports for a kernel.

    Raises:
        ValueError: the log does not hold them.
    """
    own = log.partition(f"Compiling entry function '{entry}'")[2].partition("Compiling entry function")[0]
    memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", own)
    registers = re.search(r"Used (\d+) registers", own)
    if memory is None or registers is None:
        raise ValueError(f"read_report: log must report on {entry}, got {log!r}")
    return int(registers[1]), int(memory[1]), int(memory[2]), int(memory[3])


def measure(job: Job) -> Resources:
    """Compile a configuration on its own, as CuPy does, and return its resources.

    Raises:
        nvrtc.CompileError: it does not compile.
    """
    chosen = job.configuration
    compiled = nvrtc.compile_source(source(chosen), job.gpu, (*OPTIONS, *CUPY_OPTIONS, REPORT), chosen.entry)
    registers, stack, stores, loads = read_report(compiled.log, chosen.entry)
    return Resources(
        nvrtc.version(),
        job.gpu,
        chosen.entry,
        chosen.threads,
        registers,
        stack,
        stores,
        loads,
        chosen.shared_bytes,
        blocks_by_registers(chosen.threads, registers),
        blocks_by_shared(chosen.shared_bytes, GPUS[job.gpu]),
    )


def workers() -> ProcessPoolExecutor:
    """Return a pool of processes to measure in, one for each core.

    Threads do not work, because two compilations at once in one process fail with NVRTC 13.0; neither do forks of a
    process in which torch has threads.
    """
    return ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"))


def read_table(path: Path = TABLE) -> list[Resources]:
    """Return the rows of a table; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        if tuple(next(rows)) != Resources._fields:
            raise ValueError(f"read_table: {path} must have the columns {', '.join(Resources._fields)}")
        return [Resources(version, gpu, entry, *map(int, numbers)) for version, gpu, entry, *numbers in rows]


def write_table(measured: Iterable[Resources], path: Path = TABLE) -> None:
    """Merge rows into the table, in its order; rows of configurations that it is not, or no longer, about are dropped.

    Raises:
        ValueError: the table would have rows of two versions of NVRTC.
    """
    places = {(job.gpu, job.configuration.entry): n for n, job in enumerate(tabled(jobs()))}
    rows = {row[1:3]: row for row in (*read_table(path), *measured) if row[1:3] in places}
    versions = sorted({row.nvrtc for row in rows.values()})
    if len(versions) > 1:
        raise ValueError(f"write_table: rows must come from one NVRTC, got {' and '.join(versions)}; compile them all")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Resources._fields)
        writer.writerows(rows[key] for key in sorted(rows, key=places.__getitem__))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 1 where there is no NVRTC or a kernel does not compile."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.registers", description="Registers, spills and shared memory of the CUDA kernels."
    )
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=list(GPUS), help="(all)")
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS), help="(all)")
    parser.add_argument(
        "--depth",
        nargs="+",
        type=int,
        choices=CONFIGURED_DEPTHS,
        default=list(CONFIGURED_DEPTHS),
        help="0: the stages (all)",
    )
    parser.add_argument("--write", action="store_true", help=f"write the rows to docs/results/{TABLE.name}")
    options = parser.parse_args(arguments)
    todo = jobs(options.gpu, options.kernel, options.depth)
    if options.write:
        todo = tabled(todo)
    rows = []
    print(*Resources._fields, sep=",")
    try:
        with workers() as pool:
            for row in pool.map(measure, todo):
                print(*row, sep=",", flush=True)
                rows.append(row)
        if options.write:
            write_table(rows)
    except (nvrtc.NotInstalled, nvrtc.CompileError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
