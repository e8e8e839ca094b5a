"""Tables of the limits, in markdown, and their record."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.counts import CHANNELS, COUNTED, DEPTH, IMAGES, N, count, passes_of
from benchmarks.limits.gpus import GPUS, H100, Gpu, resident_blocks
from benchmarks.limits.issue import compile_kernel, issued
from benchmarks.limits.l2 import Traffic, simulate
from benchmarks.limits.times import Times, parts_of, times
from ccgpu.kernels.cuda.configurations import arithmetic
from ccgpu.kernels.cuda.plans import Launch, plan
from models.weights import write_atomically

RECORD = Path(__file__).resolve().parents[2] / "docs" / "results" / "kernels-limits.csv"
HOT = [(kernel, arithmetic) for arithmetic in ("bf16", "f16", "tf32") for kernel in ("forward", "backward")]
CALLS = [*HOT, *(call for call in COUNTED if call not in HOT)]
MAPS = ((97, 97), (129, 257), (256, 256))
FEW_IMAGES, CUTS, PASSES, BLOCKS = (1, 2), (1, 2, 4), (1, 2, 4), (1, 2, 3)  # blocks of a multiprocessor


def limits_of(kernel: str, arithmetic: str, lag: int = 0, hints: bool = True) -> Times:
    """Return the limits of a call, from counts and, for kernels with matrix products, from machine code.

    Raises:
        ValueError: the machine code does not agree with the counts.
        nvrtc.NotInstalled: there is no NVRTC or no nvdisasm.
    """
    passes = passes_of(kernel, arithmetic)
    items = {
        phase: count(kernel, arithmetic, phase == "first", N, DEPTH, CHANNELS, passes) for phase in ("first", "later")
    }
    found = {}
    if (kernel, arithmetic) in HOT:
        launch = plan(kernel, arithmetic, IMAGES, (N, N), DEPTH, CHANNELS, H100.limits, cuts=1)[0]
        compiled = compile_kernel(launch.configuration, H100.target)
        found = {phase: issued(compiled, item) for phase, item in items.items()}
    return times(items["first"], items["later"], found, lag, 1, hints)


def launches_of(
    gpu: Gpu,
    kernel: str,
    images: int,
    sizes: tuple[int, ...],
    lag: int = 0,
    cuts: int | None = 1,
    passes: int | None = None,
) -> tuple[Launch, ...]:
    """Return the launches of a call in bfloat16; `passes` in forward, None: as many as it takes."""
    kind = arithmetic("bfloat16", gpu.limits.capability, tf32=False)
    return plan(kernel, kind, images, sizes, DEPTH, CHANNELS, gpu.limits, lag, cuts, passes)


def traffic_of(
    gpu: Gpu, launches: Sequence[Launch], hints: bool = True, blocks: int | None = None, sets: bool = False
) -> Traffic:
    """Return the traffic of a call; `blocks` of a multiprocessor replace those that the kernel allows.

    GPUs before Ampere have no hints.
    """
    held = [
        resident_blocks(x.configuration, gpu) if blocks is None else gpu.limits.multiprocessors * blocks
        for x in launches
    ]
    return simulate(launches, gpu.l2_bytes, held, hints and gpu.limits.capability >= (8, 0), sets)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def limits_table(rows: Sequence[Times]) -> str:
    """Return the times of the calls."""
    header = [
        "call",
        "passes",
        "DRAM MB (least)",
        "L2 MB",
        *(f"{x} us" for x in ("DRAM", "L2", "shared", "products", "issue")),
    ]
    body = []
    for x in rows:
        issue = "" if x.issue_us is None else f"{x.issue_us:.0f}"
        body.append(
            [
                f"{x.kernel}, {x.arithmetic}",
                str(x.passes),
                f"{x.dram_mb:.0f} ({x.least_mb:.0f})",
                f"{x.l2_mb:.0f}",
                *(f"{t:.0f}" for t in (x.dram_us, x.l2_us, x.shared_us, x.products_us)),
                issue,
                f"{x.largest:.0f}",
                f"{x.sum:.0f}",
            ]
        )
    return _markdown([*header, "largest us", "sum us"], body)


def record(rows: Sequence[Times]) -> str:
    """Return the times of the calls as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*Times._fields, "largest_us", "sum_us"])
    for x in rows:
        writer.writerow([f"{value:.2f}" if isinstance(value, float) else value for value in (*x, x.largest, x.sum)])
    return text.getvalue()


def dram_table(lag: int = 0, hints: bool = True) -> str:
    """Return the model's bytes of DRAM for maps of several sizes, on an H100, and for the hot case on other GPUs."""
    rows = []
    calls = [(H100, sizes) for sizes in MAPS] + [(gpu, (N, N)) for gpu in GPUS if gpu != H100]
    for gpu, sizes in calls:
        for kernel in ("forward", "backward"):
            launches = launches_of(gpu, kernel, IMAGES, sizes, lag)
            x = traffic_of(gpu, launches, hints)
            sets = traffic_of(gpu, launches, hints, sets=True).dram if sizes == (N, N) else None
            rows.append(
                [gpu.name, kernel, " x ".join(map(str, sizes)), str(launches[0].passes), f"{x.least / 1e6:.0f}",
                 f"{x.dram / 1e6:.0f}", "" if sets is None else f"{sets / 1e6:.0f}", f"{x.ratio:.2f}",
                 f"{x.asked / 1e6:.0f}", f"{x.idle:.2f}"]
            )  # fmt: skip
    header = ["GPU", "kernel", "map", "passes", "least MB", "DRAM MB", "16-way", "DRAM / least", "L2 MB", "idle"]
    return _markdown(header, rows)


def passes_table(lag: int = 0, hints: bool = True) -> str:
    """Return the model's times of forward by the passes through an image, on an H100."""
    rows = []
    for sizes in MAPS:
        (chosen,) = {launch.passes for launch in launches_of(H100, "forward", IMAGES, sizes, lag)}
        for passes in PASSES:
            launches = launches_of(H100, "forward", IMAGES, sizes, lag, passes=passes)
            x = traffic_of(H100, launches, hints)
            parts = parts_of(launches, x)
            named = f"{passes}{', chosen' if passes == chosen else ''}"
            times = [f"{t:.0f}" for t in (*parts, parts.largest)]
            rows.append([" x ".join(map(str, sizes)), named, f"{x.ratio:.2f}", *times])
    header = ["map", "passes", "DRAM / least", *(f"{x} us" for x in ("DRAM", "L2", "products", "largest"))]
    return _markdown(header, rows)


def ticks_table(lag: int = 0, hints: bool = True) -> str:
    """Return the model's ticks of calls with few images."""
    header = ["GPU", "blocks", "kernel", "cuts", *(f"B = {images}: ticks, idle, DRAM MB" for images in FEW_IMAGES)]
    return _markdown(header, list(_ticks(lag, hints)))


def _ticks(lag: int, hints: bool) -> Iterator[list[str]]:
    for gpu in GPUS:
        for blocks in BLOCKS if gpu == H100 else (None,):
            for kernel, cuts in [*(("forward", cuts) for cuts in CUTS), ("backward", 1)]:
                calls = [launches_of(gpu, kernel, n, (N, N), lag, cuts) for n in FEW_IMAGES]
                found = [traffic_of(gpu, call, hints, blocks) for call in calls]
                named = "resident" if blocks is None else str(blocks * gpu.limits.multiprocessors)
                cells = [f"{x.ticks}, {x.idle:.2f}, {x.dram / 1e6:.0f}" for x in found]
                yield [gpu.name, named, kernel, str(cuts), *cells]


def write(rows: Sequence[Times], path: Path = RECORD) -> None:
    """Write the record."""
    write_atomically(path, record(rows).encode())
