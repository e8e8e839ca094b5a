"""Measure what each context module costs: parameters, FLOPs, memory and time, beside the paper's numbers.

    ccgpu cost                                  # the paper's case: 769x769 images, 512 channels
    ccgpu cost --size 1024 2048 --contexts rcca nonlocal --json cost.jsonl

Every module gets features x (B, C, H, W) of the size that a ResNet returns for the images, in float32 and channels last
as in most demos, with gamma 0.5. Norms use running statistics, as in evaluation, because PSP and ASPP cannot compute
batch statistics from one image. 1 MB is 10^6 bytes; 1 GFLOP is 10^9 operations, a multiplication and an addition being
two.

GFLOPs    of forward, by torch's FLOP counter, which counts convolutions and matrix products.
saved     tensors that forward saves for backward, with x but without the parameters. A network's memory grows by this
          number, because with the module the next layer saves the module's output instead of x.
peak      the most memory that forward and backward allocate beyond x, the parameters and the output's gradient: for
          saved tensors (without x), temporaries, and the gradients of x and of the parameters.
times     medians, each after a warm-up: forward without a graph, and forward and backward.

On the CPU torch has no fused kernel for the non-local block's shapes, so its sdpa form holds N x N matrices there too.

The paper's memory of the loops (53, 127, 208 MB) is saved memory (62.7, 125.3, 188.0 MB by the shapes), but its 1411 MB
of the non-local block is a peak: that block saves one N x N matrix of 354 MB and holds four of them in backward. So the
paper's ratio of 11 compares a peak with saved memory; the table gives both for every module.

Source: Huang et al., CCNet, ICCV 2019, the ablations of loops and against non-local: increments for a 769x769 image.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ccgpu.models.attention import RCCA
from ccgpu.models.context import ASPP, NonLocal, PyramidPooling
from ccgpu.models.prediction import LARGEST_SIDE
from ccgpu.models.resnet import ResNet
from ccgpu.train.distributed import choose_device
from ccgpu.train.memory import peak_bytes, saved_bytes
from ccgpu.train.runs import records
from ccgpu.train.runs.errors import fail
from ccgpu.train.runs.flags import add_device
from ccgpu.train.runs.parser import command_parser
from ccgpu.train.runs.settings.limits import MOST_BATCH, MOST_CHANNELS

PAPERS_SHAPE = (1, 512, 97, 97)
MOST_REPEATS = 10**6


class Candidate(NamedTuple):
    """A module to measure.

    Attributes:
        context: the value of --contexts that selects it.
        name: its name in the table.
        build: number of channels -> the module.
        paper: the paper's numbers by column, at `PAPERS_SHAPE`.
    """

    context: str
    name: str
    build: Callable[[int], nn.Module]
    paper: Mapping[str, float] = {}


CANDIDATES = (
    Candidate("rcca", "RCCA R=1", lambda channels: RCCA(channels, 1), {"gflops": 8.3, "saved_mb": 53}),
    Candidate("rcca", "RCCA R=2", lambda channels: RCCA(channels, 2), {"gflops": 16.5, "saved_mb": 127}),
    Candidate("rcca", "RCCA R=3", lambda channels: RCCA(channels, 3), {"gflops": 24.7, "saved_mb": 208}),
    Candidate("rcca", "RCCA R=2, recompute", lambda channels: RCCA(channels, 2, recompute=True)),
    Candidate(
        "nonlocal",
        "non-local, materialised",
        lambda channels: NonLocal(channels, form="materialised"),
        {"gflops": 108, "peak_mb": 1411},
    ),
    Candidate("nonlocal", "non-local, sdpa", lambda channels: NonLocal(channels, form="sdpa"), {"gflops": 108}),
    Candidate("psp", "PSP", PyramidPooling),
    Candidate("aspp", "ASPP", ASPP),
)
CONTEXTS = tuple(dict.fromkeys(candidate.context for candidate in CANDIDATES))

# Key of the record, heading, digits after the point.
COLUMNS = (
    ("parameters", "parameters", 0),
    ("gflops", "GFLOPs", 1),
    ("saved_mb", "saved MB", 1),
    ("peak_mb", "peak MB", 1),
    ("forward_ms", "forward ms", 1),
    ("forward_backward_ms", "fwd+bwd ms", 1),
)
PAPERS_COLUMNS = ("gflops", "saved_mb", "peak_mb")  # a column of the paper's numbers follows each of these


def feature_shape(batch: int, channels: int, size: Sequence[int], stride: int) -> tuple[int, int, int, int]:
    """Return the shape (B, C, H, W) of a ResNet's features for images of (H, W).

    At stride 8 a side of n pixels becomes (n + 1) // 8 + 1 positions.
    """
    with torch.device("meta"), torch.no_grad():
        _, features = ResNet(18, output_stride=stride).eval()(torch.empty(1, 3, *size))
    return (batch, channels, features.shape[2], features.shape[3])


def flops(build: Callable[[int], nn.Module], shape: Sequence[int]) -> int:
    """Return the multiplications and additions of a module's forward on (B, C, H, W) features; nothing is computed.

    On the meta device `scaled_dot_product_attention` counts as the two matrix products that it is. On the CPU torch
    has a fused kernel for D = C that its counter does not know, so counting there would miss them.
    """
    with torch.device("meta"), torch.no_grad():
        module, x = build(shape[1]).eval(), torch.empty(*shape)
        with FlopCounterMode(display=False) as counter:
            module(x)
    return counter.get_total_flops()


def prepared(candidate: Candidate, shape: Sequence[int], device: torch.device) -> tuple[nn.Module, Tensor]:
    """Return the module in eval mode and its input, which requires a gradient, both in channels last."""
    torch.manual_seed(0)
    module = candidate.build(shape[1]).to(device).eval()
    for name, parameter in module.named_parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        elif name == "gamma":
            nn.init.constant_(parameter, 0.5)
    x = torch.randn(*shape, device=device).to(memory_format=torch.channels_last).requires_grad_()
    return module, x


def training_step(module: nn.Module, x: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Return a function that runs forward and backward and returns the gradients of x and of the parameters."""
    gradient = torch.ones_like(x)
    return lambda: torch.autograd.grad(module(x), [x, *module.parameters()], gradient)


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median time of a call; it must have been warmed up."""
    times = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(candidate: Candidate, shape: Sequence[int], device: torch.device, repeats: int) -> dict[str, Any]:
    """Return the cost of a candidate on (B, C, H, W) features: a value for each of `COLUMNS`."""
    module, x = prepared(candidate, shape, device)
    step = training_step(module, x)
    step()  # the first call compiles kernels and fills caches
    peak, _ = peak_bytes(step, device)
    both = milliseconds(step, device, repeats)
    with torch.no_grad():
        module(x)
        forward = milliseconds(lambda: module(x), device, repeats)
    return {
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "gflops": flops(candidate.build, shape) / 1e9,
        "saved_mb": saved_bytes(module, x) / 1e6,
        "peak_mb": peak / 1e6,
        "forward_ms": forward,
        "forward_backward_ms": both,
    }


def heading(paper: bool) -> str:
    """Return the first line of the table; `paper` adds the columns of the paper's numbers."""
    cells = [f"{'module':<24}"]
    for key, name, _ in COLUMNS:
        cells.append(f"{name:>{_width(name)}}")
        if paper and key in PAPERS_COLUMNS:
            cells.append(f"{'paper':>6}")
    return "  ".join(cells)


def line(candidate: Candidate, record: Mapping[str, Any], paper: bool) -> str:
    """Return a candidate's line of the table."""
    cells = [f"{candidate.name:<24}"]
    for key, name, digits in COLUMNS:
        cells.append(f"{record[key]:>{_width(name)},.{digits}f}")
        if paper and key in PAPERS_COLUMNS:
            cells.append(f"{candidate.paper.get(key, ''):>6}")
    return "  ".join(cells)


def _width(name: str) -> int:
    return max(len(name), 8)


def circumstances(arguments: argparse.Namespace, shape: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Return the entries that all records of a command have in common."""
    return {
        "image": list(arguments.size),
        "features": list(shape),
        "dtype": "float32",
        "memory_format": "channels_last",
        "repeats": arguments.repeats,
        **records.circumstances(device),
    }


def read_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags.

    Raises:
        ValueError: a number out of its range.
        OSError: --json cannot be written.
    """
    parser = command_parser("cost", __doc__)
    add = parser.add_argument
    size = "image size in pixels (default: 769 769)"
    add("--size", type=int, nargs=2, default=(769, 769), metavar=("H", "W"), help=size)
    add("--channels", type=int, default=512, metavar="C", help="channels of the features (default: 512)")
    add(
        "--output-stride", type=int, choices=(8, 16, 32), default=8, help="stride of the ResNet's features (default: 8)"
    )
    add("--batch", type=int, default=1, metavar="B", help="images per batch (default: 1)")
    add("--contexts", nargs="+", choices=CONTEXTS, default=CONTEXTS, help="modules to measure (default: all)")
    add_device(parser)
    add("--repeats", type=int, default=5, metavar="N", help="number of timings of each step (default: 5)")
    add("--json", type=Path, metavar="FILE", help="append a line of JSON for each module")
    flags = parser.parse_args(argv)
    numbers = {
        "--size": (flags.size, LARGEST_SIDE),
        "--channels": ((flags.channels,), MOST_CHANNELS),
        "--batch": ((flags.batch,), MOST_BATCH),
        "--repeats": ((flags.repeats,), MOST_REPEATS),
    }
    for flag, (values, most) in numbers.items():
        if not all(1 <= value <= most for value in values):
            raise ValueError(f"{flag} must be from 1 to {most}, got {' '.join(map(str, values))}")
    if flags.json is not None:
        flags.json.open("a").close()  # so that a path that cannot be written fails before minutes of measuring
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 measured, 1 out of memory, 2 wrong flags, 130 stopped."""
    try:
        flags = read_flags(argv)
        device = choose_device(flags.device)
    except (ValueError, OSError) as error:
        return fail("cost", str(error), 2)
    shape = feature_shape(flags.batch, flags.channels, flags.size, flags.output_stride)
    paper = shape == PAPERS_SHAPE and tuple(flags.size) == (769, 769)
    common = circumstances(flags, shape, device)
    height, width = flags.size
    print(f"{height}x{width} images, features {'x'.join(map(str, shape))}, float32, {common['device']}", flush=True)
    print(heading(paper))
    for candidate in (candidate for candidate in CANDIDATES if candidate.context in flags.contexts):
        try:
            record = measure(candidate, shape, device, flags.repeats)
        except torch.OutOfMemoryError:
            message = f"{candidate.name}: out of device memory; choose others by --contexts, or a smaller --size"
            return fail("cost", message, 1)
        except KeyboardInterrupt:
            return fail("cost", "stopped", 130)
        print(line(candidate, record, paper), flush=True)
        if flags.json is not None:
            records.append_record(flags.json, {"kind": "cost", "module": candidate.name, **record, **common})
    print("\nMB: 10^6 bytes. GFLOPs: 10^9 multiplications and additions of forward.")
    print("saved: by forward for backward, x included. peak: of forward and backward, in addition to x and parameters.")
    if paper:
        print("The paper's memory of RCCA is saved memory; its 1411 MB of the non-local block is a peak.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
