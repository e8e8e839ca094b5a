"""Measure what context modules cost, and their share of a whole network: FLOPs, memory and time.

    ccgpu cost                                  # the paper's case: 769x769 images, 512 channels
    ccgpu cost --sizes 769x769 1024x2048 --contexts rcca nonlocal --json cost.jsonl
    ccgpu cost --maps 33x33 65x65 97x97 129x257  # feature maps of these sizes, whatever images they belong to
    ccgpu cost --network resnet18 resnet50 --sizes 193x193 385x385

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

Sizes are measured from the smallest map to the largest. Before each case its peak and the time of forward and backward
are predicted (`ccgpu.train.measurement.estimates`). A case above --most-gb or --most-seconds does not run: its
predictions are printed with a ~ and named in the record's "predicted". The record of a measured case has the
predictions that were made for it as "foreseen".

With --network a whole CCNet trains for one step and predicts, and each part's share is measured
(`ccgpu.train.measurement.network`).

The paper's memory of the loops (53, 127, 208 MB) is saved memory (62.7, 125.3, 188.0 MB by the shapes), but its 1411 MB
of the non-local block is a peak: that block saves one N x N matrix of 354 MB and holds four of them in backward. So the
paper's ratio of 11 compares a peak with saved memory; the table gives both for every module.

Source: Huang et al., CCNet, ICCV 2019, the ablations of loops and against non-local: increments for a 769x769 image.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ccgpu.models.backbones import RESNETS
from ccgpu.models.prediction import LARGEST_SIDE
from ccgpu.models.resnet import ResNet
from ccgpu.train.distributed import choose_device
from ccgpu.train.measurement import estimates, network
from ccgpu.train.measurement.contexts import CANDIDATES, CONTEXTS, PAPERS_SHAPE, Candidate, measure
from ccgpu.train.measurement.timing import Clock
from ccgpu.train.runs import records
from ccgpu.train.runs.errors import fail
from ccgpu.train.runs.flags import add_device
from ccgpu.train.runs.parser import command_parser
from ccgpu.train.runs.settings.limits import MOST_BATCH, MOST_CHANNELS, SMALLEST

PAPERS_SIZE = (769, 769)
MOST_REPEATS = 10**6
SHARE_OF_MEMORY = 0.8  # that a case may take of what is available, unless --most-gb says otherwise

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
# The same of a network, whose records have a number for each part.
NETWORK_COLUMNS = (
    ("training_gflops", "train GFLOPs"),
    ("training_ms", "train ms"),
    ("saved_mb", "saved MB"),
    ("states_mb", "states MB"),
    ("prediction_gflops", "predict GFLOPs"),
    ("prediction_ms", "predict ms"),
    ("prediction_peak_mb", "predict peak MB"),
)

Size = tuple[int, int]


def feature_shape(batch: int, channels: int, size: Sequence[int], stride: int) -> tuple[int, int, int, int]:
    """Return the shape (B, C, H, W) of a ResNet's features for images of (H, W).

    At stride 8 a side of n pixels becomes (n + 1) // 8 + 1 positions.
    """
    with torch.device("meta"), torch.no_grad():
        _, features = ResNet(18, output_stride=stride).eval()(torch.empty(1, 3, *size))
    return (batch, channels, features.shape[2], features.shape[3])


def heading(paper: bool) -> str:
    """Return the first line of the table; `paper` adds the columns of the paper's numbers."""
    cells = [f"{'module':<24}"]
    for key, name, _ in COLUMNS:
        cells.append(f"{name:>{_width(name)}}")
        if paper and key in PAPERS_COLUMNS:
            cells.append(f"{'paper':>6}")
    return "  ".join(cells)


def line(candidate: Candidate, record: Mapping[str, Any], paper: bool) -> str:
    """Return a candidate's line of the table; what was not measured has a ~ before it."""
    cells = [f"{candidate.name:<24}"]
    for key, name, digits in COLUMNS:
        sign = "~" if key in record["predicted"] else ""
        cells.append(f"{f'{sign}{record[key]:,.{digits}f}':>{_width(name)}}")
        if paper and key in PAPERS_COLUMNS:
            cells.append(f"{candidate.paper.get(key, ''):>6}")
    return "  ".join(cells)


def _width(name: str) -> int:
    return max(len(name), 9)


def measure_modules(flags: argparse.Namespace, clock: Clock) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Measure context modules at all sizes; yield lines of the tables, each with its record if it is a module's."""
    cases = {tuple(size): (1, 1, *size) for size in flags.maps or ()} or {
        tuple(size): feature_shape(1, 1, size, flags.output_stride) for size in flags.sizes or (PAPERS_SIZE,)
    }
    first = estimates.product_rate(clock)
    known: dict[str, estimates.Rates] = {}
    for size, (_, _, height, width) in sorted(cases.items(), key=lambda case: case[1][2] * case[1][3]):
        shape = (flags.batch, flags.channels, height, width)
        paper = shape == PAPERS_SHAPE and size in (PAPERS_SIZE, PAPERS_SHAPE[2:])
        images = "" if flags.maps else f"{size[0]}x{size[1]} images, "
        yield f"{images}features {'x'.join(map(str, shape))}, float32, {_device_name(clock.device)}", None
        yield heading(paper), None
        for candidate in (candidate for candidate in CANDIDATES if candidate.context in flags.contexts):
            counts = estimates.count(candidate.build, shape, clock.device)
            foreseen = estimates.predict(counts, known.get(candidate.name, first))
            why = _above_limits(foreseen["peak_mb"], foreseen["forward_backward_ms"], flags, clock.device)
            if why:
                record = {**foreseen, "predicted": list(estimates.PREDICTED), "why": why}
            else:
                found = measure(candidate.build, shape, clock, flags.repeats)
                known[candidate.name] = estimates.rates(counts, found)
                record = {**found, "predicted": [], "foreseen": {key: foreseen[key] for key in estimates.PREDICTED}}
            record |= {"image": None if flags.maps else list(size), "features": list(shape)}
            yield line(candidate, record, paper), {"kind": "cost", "module": candidate.name, **record}
        yield "", None
    yield from ((text, None) for text in _EXPLANATION)
    if PAPERS_SIZE in cases:
        yield "The paper's memory of RCCA is saved memory; its 1411 MB of the non-local block is a peak.", None


_EXPLANATION = (
    "MB: 10^6 bytes. GFLOPs: 10^9 multiplications and additions of forward. ~: predicted, not measured.",
    "saved: by forward for backward, x included. peak: of forward and backward, in addition to x and parameters.",
)


def measure_networks(flags: argparse.Namespace, clock: Clock) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Measure whole networks; yield lines of their tables, the last of each with its record."""
    by = estimates.product_rate(clock).both
    sizes = sorted(flags.sizes or (PAPERS_SIZE,), key=lambda size: size[0] * size[1])
    for height, width in sizes:
        for backbone in flags.network:
            for context in flags.contexts:
                case = network.Network(backbone, context, (flags.batch, 3, height, width), flags.channels)
                record = network.count(case, clock.device)
                gflops = sum(record["training_gflops"].values())
                why = _above_limits(record["least_peak_mb"], gflops * by, flags, clock.device)
                if why:
                    record |= {"why": why}
                else:
                    record |= network.measure(case, clock, flags.repeats)
                    by = sum(record["training_ms"].values()) / gflops
                images = f"{flags.batch} image{'s' if flags.batch > 1 else ''} of {height}x{width}"
                yield f"{backbone}, {context}, {images}, float32, {_device_name(clock.device)}", None
                yield "  ".join([f"{'part':<14}", *(f"{name:>18}" for _, name in NETWORK_COLUMNS)]), None
                for part in network.PARTS:
                    cells = (_share(record.get(key, {}), part, key) for key, _ in NETWORK_COLUMNS)
                    yield "  ".join([f"{part:<14}", *(f"{cell:>18}" for cell in cells)]), None
                end = why or f"peak of the step: {max(record['training_peak_mb'].values()):,.1f} MB"
                named = {"backbone": backbone, "context": context, "image": [height, width]}
                shape = {"batch": flags.batch, "channels": flags.channels}
                yield f"{end}\n", {"kind": "network cost", **named, **shape, **record}
    yield "In brackets: the share of all parts. MB: 10^6 bytes. GFLOPs: 10^9 multiplications and additions.", None
    yield "saved: by forward for backward. states: weights, gradients and momentum. Peaks do not add up.", None


def _share(by_part: Mapping[str, float], part: str, key: str) -> str:
    """Return a part's number and its share of all parts; of peaks, which do not add up, the number alone."""
    if part not in by_part:
        return ""
    share = "" if key.endswith("peak_mb") else f" ({by_part[part] / sum(by_part.values()):6.1%})"
    return f"{by_part[part]:,.1f}{share}"


def _above_limits(peak_mb: float, milliseconds: float, flags: argparse.Namespace, device: torch.device) -> str:
    """Return why a case does not run; empty where it does."""
    most_mb = 1e3 * flags.most_gb if flags.most_gb else SHARE_OF_MEMORY * estimates.available_bytes(device) / 1e6
    if peak_mb > most_mb:
        return f"it would take {peak_mb / 1e3:,.1f} GB, above {most_mb / 1e3:,.1f} GB (--most-gb)"
    if milliseconds > 1e3 * flags.most_seconds:
        return f"a step would take {milliseconds / 1e3:,.0f} s, above {flags.most_seconds:g} s (--most-seconds)"
    return ""


def circumstances(flags: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the entries that all records of a command have in common."""
    return {
        "dtype": "float32",
        "memory_format": "channels_last",
        "repeats": flags.repeats,
        "clock": "processor" if flags.processor_time else "wall",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        **records.circumstances(device),
    }


def _device_name(device: torch.device) -> str:
    return f"{records.circumstances(device)['device']}, {torch.get_num_threads()} threads"


def _size(text: str) -> Size:
    """Return the height and width that HxW names."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH, such as 769x769, got {text!r}")
    return int(found[1]), int(found[2])


def read_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags.

    Raises:
        ValueError: a number out of its range, or flags that do not go together.
        OSError: --json cannot be written.
    """
    parser = command_parser("cost", __doc__)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group()
    size = "image sizes in pixels (default: 769x769)"
    what.add_argument("--sizes", type=_size, nargs="+", metavar="HxW", help=size)
    what.add_argument("--maps", type=_size, nargs="+", metavar="HxW", help="sizes of feature maps, instead of images'")
    backbones = "measure whole networks, and each part's share, with these backbones"
    add("--network", nargs="+", choices=RESNETS, metavar="BACKBONE", help=f"{backbones} ({', '.join(RESNETS)})")
    add("--channels", type=int, default=512, metavar="C", help="channels of the features, or heads (default: 512)")
    add("--output-stride", type=int, choices=(8, 16, 32), help="stride of the ResNet's features (default: 8)")
    add("--batch", type=int, default=1, metavar="B", help="images per batch (default: 1)")
    contexts = "modules to measure (default: all; of a network: rcca)"
    add("--contexts", nargs="+", choices=CONTEXTS, help=contexts)
    add_device(parser)
    add("--repeats", type=int, default=5, metavar="N", help="number of timings of each step (default: 5)")
    clock = "measure this process's processor time, for one thread on a CPU that others use too"
    add("--processor-time", action="store_true", help=clock)
    gigabytes = "do not run what would take more memory (default: 80 %% of what is available)"
    add("--most-gb", type=float, metavar="GB", help=gigabytes)
    seconds = "do not run what would take longer for one forward and backward (default: 60)"
    add("--most-seconds", type=float, default=60.0, metavar="S", help=seconds)
    add("--json", type=Path, metavar="FILE", help="append a line of JSON for each module or network")
    flags = parser.parse_args(argv)
    numbers = {
        "--sizes": (flags.sizes or (), SMALLEST if flags.network else 1, LARGEST_SIDE),
        "--maps": (flags.maps or (), 1, LARGEST_SIDE),
        "--channels": (((flags.channels,),), 1, MOST_CHANNELS),
        "--batch": (((flags.batch,),), 1, MOST_BATCH),
        "--repeats": (((flags.repeats,),), 1, MOST_REPEATS),
    }
    for flag, (groups, least, most) in numbers.items():
        for values in groups:
            if not all(least <= value <= most for value in values):
                raise ValueError(f"{flag} must be from {least} to {most}, got {'x'.join(map(str, values))}")
    for flag, value in (("--most-gb", flags.most_gb), ("--most-seconds", flags.most_seconds)):
        if value is not None and not value > 0:  # NaN too
            raise ValueError(f"{flag} must be above 0, got {value:g}")
    _check_together(flags)
    flags.contexts = flags.contexts or (("rcca",) if flags.network else CONTEXTS)
    flags.output_stride = flags.output_stride or 8
    if flags.json is not None:
        flags.json.open("a").close()  # so that a path that cannot be written fails before minutes of measuring
    return flags


def _check_together(flags: argparse.Namespace) -> None:
    """Raise ValueError for flags that mean nothing to a whole network."""
    if not flags.network:
        return
    if flags.maps or flags.output_stride:
        flag = "--maps" if flags.maps else "--output-stride"
        raise ValueError(f"{flag} must be left out with --network, which takes images by --sizes, at stride 8")
    pooling = [context for context in flags.contexts or () if context in ("psp", "aspp")]
    if pooling and flags.batch == 1:
        raise ValueError(f"--batch must be 2 or more to train with {pooling[0]}, got 1: its norm needs two means")


def _check_clock(flags: argparse.Namespace, device: torch.device) -> None:
    """Raise ValueError where processor time is not the time that a call takes."""
    if flags.processor_time and device.type != "cpu":
        raise ValueError("--processor-time must come with --device cpu, got a GPU; leave it out")
    if flags.processor_time and torch.get_num_threads() > 1:
        threads = torch.get_num_threads()
        raise ValueError(f"--processor-time must come with one thread, got {threads}; set OMP_NUM_THREADS=1")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 measured, 1 out of memory, 2 wrong flags, 130 stopped."""
    try:
        flags = read_flags(argv)
        device = choose_device(flags.device)
        _check_clock(flags, device)
    except (ValueError, OSError) as error:
        return fail("cost", str(error), 2)
    common = circumstances(flags, device)
    clock = Clock(device, flags.processor_time)
    try:
        for text, record in (measure_networks if flags.network else measure_modules)(flags, clock):
            print(text, flush=True)
            if record is not None and flags.json is not None:
                records.append_record(flags.json, {**record, **common})
    except torch.OutOfMemoryError:
        return fail("cost", "out of device memory; lower --most-gb, or choose smaller sizes or other --contexts", 1)
    except KeyboardInterrupt:
        return fail("cost", "stopped", 130)
    return 0


if __name__ == "__main__":
    sys.exit(main())
