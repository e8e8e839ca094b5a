"""Criss-cross attention, ours and the peers, side by side: `python -m benchmarks.cca` or `make bench`.

First the formulations must agree, values and gradients. Then all take turns; ratios are against the authors'
formulation on NCHW tensors (1.00). Rows are appended to benchmarks/results/cca_cpu.csv with --record.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import ccgpu
from benchmarks import measure, peers
from ccgpu.train import records

RESULTS = Path(__file__).resolve().parent / "results" / "cca_cpu.csv"
BASELINE = "authors' bmm, NCHW"
Function = Callable[[Tensor, Tensor, Tensor], Tensor]
Inputs = tuple[Tensor, Tensor, Tensor]


def inputs(batch: int, size: tuple[int, int], query: int, channels: int, dtype: torch.dtype) -> Inputs:
    """Return q, k, v of unit-variance energies."""
    torch.manual_seed(0)
    q, k = (torch.randn(batch, query, *size) * query**-0.25 for _ in "qk")
    return q.to(dtype), k.to(dtype), torch.randn(batch, channels, *size).to(dtype)


def gradients(function: Function, tensors: Inputs, dout: Tensor) -> tuple[Tensor, ...]:
    leaves = tuple(x.detach().requires_grad_() for x in tensors)
    out = function(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, dout))


def check_agreement(tensors: Inputs) -> None:
    """Raise unless every formulation of the same function gives our values and gradients."""
    small = tuple(x[..., :13, :17].float() for x in tensors)
    dout = torch.randn_like(small[2])
    ours = gradients(ccgpu.cca, small, dout)
    for name, function in peers.SAME_FUNCTION.items():
        for what, a, b in zip(("out", "dq", "dk", "dv"), ours, gradients(function, small, dout), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda m, n=name, w=what: f"{n}, {w}: {m}")


def candidates(tensors: Inputs, dense: bool) -> dict[str, tuple[Function, Inputs]]:
    last = tuple(x.contiguous(memory_format=torch.channels_last) for x in tensors)
    rows = {}
    for layout, x in (("NCHW", tensors), ("channels_last", last)):
        rows[f"ccgpu.cca, {layout}"] = (ccgpu.cca, x)
        rows.update({f"{name}, {layout}": (function, x) for name, function in peers.SAME_FUNCTION.items()})
    if dense:
        rows.update({f"{name}, NCHW": (function, tensors) for name, function in peers.OTHER_FUNCTION.items()})
    return rows


def run(tensors: Inputs, repeats: int, dense: bool) -> list[dict[str, object]]:
    """Return one row a formulation, layout and pass."""
    dout = torch.randn_like(tensors[2])
    dout_last = dout.contiguous(memory_format=torch.channels_last)
    rows: list[dict[str, object]] = []
    results = {"forward": tensors[2].nbytes, "forward+backward": tensors[2].nbytes + sum(x.nbytes for x in tensors)}
    for step in ("forward", "forward+backward"):
        calls: dict[str, Callable[[], object]] = {}
        for name, (function, x) in candidates(tensors, dense).items():
            if step == "forward":
                calls[name] = lambda f=function, x=x: f(*x)
            else:
                d = dout_last if name.endswith("channels_last") else dout
                calls[name] = lambda f=function, x=x, d=d: gradients(f, x, d)
        times = measure.interleaved(calls, repeats)
        for name, timing in times.items():
            rows.append(
                {
                    "name": name,
                    "pass": step,
                    "median_ms": round(timing.median * 1e3, 3),
                    "low_ms": round(timing.low * 1e3, 3),
                    "high_ms": round(timing.high * 1e3, 3),
                    "ratio": round(timing.median / times[BASELINE].median, 3),
                    "temporaries_mb": round((measure.peak_bytes(calls[name]) - results[step]) / 1e6, 1),
                }
            )
    return rows


def floor_flops(tensors: Inputs) -> dict[str, float]:
    """Return the FLOPs that cannot be avoided, by the op's own formula; running on no device costs nothing."""
    on_meta = tuple(x.to("meta") for x in tensors)
    floors = {}
    for step, call in (
        ("forward", lambda: ccgpu.cca(*on_meta)),
        ("forward+backward", lambda: gradients(ccgpu.cca, on_meta, on_meta[2])),
    ):
        with FlopCounterMode(display=False) as counter:
            call()
        floors[step] = float(counter.get_total_flops())
    return floors


def table(rows: list[dict[str, object]], floors: dict[str, float], rate: float) -> str:
    lines = []
    for step, flops in floors.items():
        floor = flops / rate * 1e3
        lines.append(f"\n{step}: arithmetic floor {flops / 1e9:.2f} GFLOP = {floor:.1f} ms at {rate / 1e9:.0f} GFLOP/s")
        lines.append(f"  {'':32} {'median ms':>10} {'20-80 %':>15} {'ratio':>7} {'x floor':>8} {'temporaries MB':>15}")
        for row in rows:
            if row["pass"] == step:
                span = f"{row['low_ms']:.1f}-{row['high_ms']:.1f}"
                lines.append(
                    f"  {row['name']:32} {row['median_ms']:>10.1f} {span:>15} {row['ratio']:>7.2f} "
                    f"{float(str(row['median_ms'])) / floor:>8.2f} {row['temporaries_mb']:>15.1f}"
                )
    return "\n".join(lines)


def record(rows: list[dict[str, object]], common: dict[str, object]) -> None:
    """Append the rows to the results file."""
    complete = [{**common, **row} for row in rows]
    fresh = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(complete[0]))
        if fresh:
            writer.writeheader()
        writer.writerows(complete)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(97, 97), metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--query-channels", type=int, default=64, metavar="D")
    parser.add_argument("--channels", type=int, default=512, metavar="C")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float64"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-dense", action="store_true", help="leave out dense attention (27 times the time)")
    parser.add_argument("--record", action="store_true", help=f"append the rows to {RESULTS.name}")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = tuple(arguments.size)
    shape = (arguments.batch, size, arguments.query_channels, arguments.channels)
    tensors = inputs(*shape, getattr(torch, arguments.dtype))
    check_agreement(tensors)
    rate = measure.matrix_rate()
    rows = run(tensors, arguments.repeats, not arguments.no_dense)
    print(f"B={shape[0]} {size[0]}x{size[1]} D={shape[2]} C={shape[3]} {arguments.dtype}, {arguments.threads} threads")
    print(table(rows, floor_flops(tensors), rate))
    if arguments.record:
        common = {
            "date": datetime.date.today().isoformat(),
            "commit": records.commit(),
            "device": f"{platform.machine()}, {arguments.threads} threads",
            "torch": torch.__version__,
            "shape": f"{shape[0]}x{size[0]}x{size[1]}",
            "D": shape[2],
            "C": shape[3],
            "dtype": arguments.dtype,
            "gflops_mm": round(rate / 1e9, 1),
        }
        record(rows, common)


if __name__ == "__main__":
    main()
