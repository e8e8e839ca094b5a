"""Times of dilated and of depthwise convolutions in bfloat16 on a CPU: `python -m benchmarks.dilated_speed`.

Layers: forward and backward of one convolution of channels_last maps, by torch in bfloat16, whose gradients are wrong
for some (`benchmarks.convolution_gradients`), in float32 as `right_gradients` does it, and by `depthwise`. Steps: a
training step of CCNet with EfficientNet-Lite0, by `depthwise` and by torch's convolutions. Times are the process's own,
so other programs disturb them little. The record is written anew.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import cpu_record
from ccgpu.models.ccnet import CCNet
from ccgpu.models.depthwise import depthwise
from ccgpu.models.efficientnet import SameConv2d
from ccgpu.models.precision import Precision

Layer = tuple[int, int, int, int]  # channels, groups, kernel, dilation
LAYERS: tuple[Layer, ...] = (
    *((240, 240, kernel, dilation) for kernel in (3, 5) for dilation in (1, 2, 4)),
    (240, 24, 3, 2),
    (40, 1, 3, 2),
)
BATCH, SIZE = 8, (30, 40)
CROP = (240, 320)  # of the preset `cpu` of CamVid, with its head and batch


def layer_seconds(layer: Layer, repeats: int) -> dict[str, dict[str, float]]:
    """Return for each way the medians of the times of forward and backward."""
    channels, groups, kernel, dilation = layer
    how: dict[str, Any] = {"padding": kernel // 2 * dilation, "dilation": dilation, "groups": groups}
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "torch bfloat16": lambda x, weight: F.conv2d(x, weight, **how),
        "torch float32": lambda x, weight: F.conv2d(x.float(), weight.float(), **how).bfloat16(),
    }
    if groups == channels:
        ways["depthwise"] = lambda x, weight: depthwise(x, weight, dilation)
    torch.manual_seed(0)
    x, weight = (
        torch.randn(shape).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
        for shape in ((BATCH, channels, *SIZE), (channels, channels // groups, kernel, kernel))
    )
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            start = time.process_time()
            out = way(x, weight)
            between = time.process_time()
            out.backward(out.detach())
            times[name].append((between - start, time.process_time() - between))
    return {name: medians({"forward": [f for f, _ in t], "backward": [b for _, b in t]}) for name, t in times.items()}


def step_seconds(repeats: int, crop: tuple[int, int]) -> dict[str, float]:
    """Return for each way the median of the times of a training step in bfloat16, without the optimiser."""
    torch.manual_seed(0)
    net = CCNet("efficientnet-lite0", 11, head_channels=128, gamma=1.0).train().to(memory_format=torch.channels_last)
    precision = Precision(torch.device("cpu"), "bf16", channels_last=True)
    images = precision.images(torch.randn(BATCH, 3, *crop))
    times: dict[str, list[float]] = {"depthwise": [], "torch bfloat16": []}
    for _ in range(repeats + 1):
        for name, chosen in times.items():
            own = patch.object(SameConv2d, "_needs_depthwise", False) if name == "torch bfloat16" else nullcontext()
            start = time.process_time()
            with own, precision.autocast():
                outputs = net(images)
            sum(output.float().square().mean() for output in outputs if output is not None).backward()
            chosen.append(time.process_time() - start)
    return medians(times)


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the medians of times, of which the first is left out."""
    return {name: float(f"{statistics.median(values[1:]):.3g}") for name, values in times.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="dilated_speed", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the times to this file of JSON lines")
    parser.add_argument("--repeats", type=int, default=5, help="whose median counts (%(default)s)")
    parser.add_argument("--layers", type=int, help="measure the first layers alone")
    parser.add_argument("--crop", type=int, nargs=2, default=CROP, help="of the step's images (%(default)s)")
    flags = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for layer in LAYERS[: flags.layers]:
        named = dict(zip(("channels", "groups", "kernel", "dilation"), layer, strict=True))
        rows.append(
            {"kind": "layer", **named, "batch": BATCH, "size": SIZE, "seconds": layer_seconds(layer, flags.repeats)}
        )
        print(rows[-1])
    step = step_seconds(flags.repeats, tuple(flags.crop))
    rows.append({"kind": "step", "backbone": "efficientnet-lite0", "head_channels": 128, "batch": BATCH})
    rows[-1] |= {"crop": flags.crop, "amp": "bf16", "channels_last": True, "seconds": step}
    print(rows[-1])
    if flags.record is not None:
        cpu_record.write(flags.record, "dilated_speed", rows, repeats=flags.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
