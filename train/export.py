"""Export a network: `ccgpu export --checkpoint X --to onnx --out net.onnx`.

onnx: an ONNX model of standard operators alone, opset 18. torch-export: a `torch.export` program of torch's own
operators, which `torch.export.load` reads without this package. Batch, height and width are dynamic in both. The
exported file is compared with the network at three sizes before it is renamed to --out.

(An AOTInductor package is not offered, since compiling one takes minutes: docs/export.md makes one of a program.)
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ccgpu
from ccgpu.models import checkpoint
from ccgpu.models.ccnet import CCNet
from ccgpu.models.image_format import ImageFormat
from ccgpu.train.distributed import say
from ccgpu.train.runs.errors import BAD_FILE, run_command
from ccgpu.train.runs.flags import add_checkpoint
from ccgpu.train.runs.outputs import add_overwrite, check_output_file, check_utf8
from ccgpu.train.runs.parser import command_parser
from ccgpu.train.runs.setup import read_network

ENDINGS = {"onnx": ".onnx", "torch-export": ".pt2"}
OPSET = 18
# (B, H, W) at which the exported network is compared with the original; it is traced at none of them.
SIZES = ((1, 97, 129), (2, 64, 75), (1, 161, 65))
# Largest difference allowed between the logits, relative to the largest logit: float32 sums in another order.
TOLERANCE = 1e-3
INFORMATION = "ccgpu"  # key of an ONNX model's metadata, name of a torch.export program's extra file


class Pixels(nn.Module):
    """A network with its normalisation in front: the input is images with their values as stored, RGB in 0..255."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: CCNet, images: ImageFormat) -> None:
        super().__init__()
        self.net = net
        self.images = images
        for name in ("mean", "std"):
            values = torch.tensor(getattr(net.backbone, name)).view(1, -1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images (B, C, H, W)."""
        return self.net((images - self.mean) / self.std)

    def examples(self, noise: Tensor) -> Tensor:
        """Return images with values as the network may see them, made of normal noise."""
        if self.images.dtype == "uint8":
            return (noise * 64 + 128).clamp(0, 255)
        return noise * self.std + self.mean


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    0: exported. 1: the exported network computes other logits, or the file cannot be written. 2: bad input. 130:
    stopped by Ctrl-C.
    """
    flags = read_flags(argv)
    return run_command(
        "export",
        lambda: prepare(flags),
        lambda prepared: export(flags, *prepared),
        again="run the command again",
        smaller="run it on a machine with more",
        refused=BAD_FILE,
        explained={Mismatch: 1},
    )


def prepare(flags: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network that is exported, and what its users need to know.

    Raises:
        ValueError, OSError, ImportError, TypeError: a checkpoint or flags that cannot be used.
    """
    check_target(flags)
    found = read_network(flags.checkpoint)
    if found.network.get("dims", 2) != 2:
        raise ValueError(f"--checkpoint must hold a network for images, got {flags.checkpoint} for clips")
    net = checkpoint.build(found)
    return Pixels(net, found.images) if flags.pixels else net, describe(net, found, flags.pixels)


def export(flags: argparse.Namespace, module: nn.Module, information: dict[str, Any]) -> int:
    """Write the exported network, compare it with the original, and return the exit status.

    Raises:
        Mismatch: the logits differ, or are not finite; nothing is written then.
        OSError: the file cannot be written.
    """
    target: Path = flags.out
    # Written and compared in a folder beside the target, so that a wrong export never replaces a good file.
    with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as folder:
        written = Path(folder) / target.name
        run = WRITERS[flags.to](module, written, information)
        difference = compare(module, run, information["network"]["in_channels"])
        os.replace(written, target)
    size = target.stat().st_size / 1e6
    say(f"{target}: {size:.1f} MB, logits equal to {difference:.1e} of the largest at {len(SIZES)} sizes")
    return 0


def read_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags."""
    parser = command_parser("export", __doc__)
    add_checkpoint(parser)
    add = parser.add_argument
    add("--to", choices=tuple(ENDINGS), required=True, help="format to write")
    add("--out", type=Path, required=True, metavar="FILE", help="the file: .onnx, or .pt2 for torch-export")
    add(
        "--pixels",
        action="store_true",
        help="the exported network takes images with values in 0..255 and normalises them itself",
    )
    add_overwrite(parser, "FILE where it exists")
    return parser.parse_args(argv)


def check_target(flags: argparse.Namespace) -> None:
    """Raise unless --out can be written.

    Raises:
        ValueError: its ending does not match the format, its folder does not exist, or it exists itself.
        ModuleNotFoundError: a package that the export needs is not installed.
    """
    if flags.out.suffix != ENDINGS[flags.to]:
        raise ValueError(f"--out must end in {ENDINGS[flags.to]} for {flags.to}, got {flags.out}")
    check_utf8("--out", flags.out, "torch and ONNX")
    check_output_file("--out", flags.out, [flags.checkpoint], overwrite=flags.overwrite)
    if flags.to == "onnx":
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ModuleNotFoundError(
                f'--to onnx needs onnx, onnxscript and onnxruntime, got {error}; pip install "ccgpu[onnx]"'
            ) from error


def describe(net: CCNet, found: checkpoint.Checkpoint, pixels: bool) -> dict[str, Any]:
    """Return what a user of the exported network needs to know, as plain values."""
    images = found.images
    what = f"channels of {images.dtype} as stored" if images.raw else "red, green, blue, 0..255"
    return {
        "input": f"images (B, {net.in_channels}, H, W), float32, {what}{'' if pixels else ', as (value - mean) / std'}",
        "images": images.as_plain(),
        "output": "class logits (B, classes, H, W)",
        "mean": list(net.backbone.mean),
        "std": list(net.backbone.std),
        "classes": None if found.labels is None else found.labels["names"],
        "prediction": found.prediction,
        "network": net.config,
    }


@torch.no_grad()
def exported_program(module: nn.Module, channels: int) -> torch.export.ExportedProgram:
    """Return a module as a program of torch's own operators, for any number and size of images of `channels`."""
    dynamic = torch.export.Dim.DYNAMIC
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's warnings about its own deprecated parts
        program = torch.export.export(
            module,
            (torch.zeros(2, channels, 65, 97),),
            dynamic_shapes={"images": {0: dynamic, 2: dynamic, 3: dynamic}},
        )
        return program.run_decompositions(ccgpu.decompositions())


def write_onnx(module: nn.Module, path: Path, information: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Write an ONNX model and return a function that runs it."""
    import onnx
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            exported_program(module, information["network"]["in_channels"]),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None  # torch.onnx.export returns None only if it is given a file
    model = program.model_proto
    _name_axes(model)
    model.metadata_props.add(key=INFORMATION, value=json.dumps(information))
    onnx.checker.check_model(model)
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _name_axes(model: Any) -> None:
    """Name the input "images", the output "logits", and their dynamic axes batch, height and width."""
    (given,), (result,) = model.graph.input, model.graph.output
    axes = [axis.dim_param for axis in given.type.tensor_type.shape.dim]
    names = {axes[0]: "batch", axes[2]: "height", axes[3]: "width"}
    for value in (given, result, *model.graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), axis.dim_param)
    for old, new in ((given.name, "images"), (result.name, "logits")):
        for node in model.graph.node:
            for places in (node.input, node.output):
                for index, name in enumerate(places):
                    if name == old:
                        places[index] = new
    given.name, result.name = "images", "logits"


def write_torch_export(module: nn.Module, path: Path, information: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Write a program of torch.export and return a function that runs it."""
    program = exported_program(module, information["network"]["in_channels"])
    torch.export.save(program, path, extra_files={f"{INFORMATION}.json": json.dumps(information)})
    return torch.export.load(path).module()


WRITERS = {"onnx": write_onnx, "torch-export": write_torch_export}


class Mismatch(RuntimeError):
    """The exported network's logits differ from the original network's, or are not finite."""


@torch.no_grad()
def compare(module: nn.Module, run: Callable[[Tensor], Tensor], channels: int) -> float:
    """Return the largest difference between the logits over all `SIZES`, relative to the largest logit.

    Args:
        module: the network.
        run: the exported network.
        channels: channels of the images.

    Raises:
        Mismatch: the difference is more than `TOLERANCE`, the shapes differ, or a logit is NaN or infinite.
    """
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch, height, width in SIZES:
        images = torch.randn(batch, channels, height, width, generator=generator)
        if isinstance(module, Pixels):
            images = module.examples(images)
        expected, found = module(images), run(images)
        if found.shape != expected.shape:
            raise Mismatch(f"the exported network returns {tuple(found.shape)}, not {tuple(expected.shape)}")
        # Comparisons with NaN are all false, so that a difference of NaN would pass as none.
        for whose, logits in (("", expected), ("exported ", found)):
            if not logits.isfinite().all():
                raise Mismatch(
                    f"the {whose}network's logits must be finite, got NaN or infinity for images of {height}x{width}; "
                    "nothing was written; use another checkpoint"
                )
        scale = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        worst = max(worst, ((found - expected).abs().max() / scale).item())
    if not worst <= TOLERANCE:
        raise Mismatch(f"the exported network's logits differ by {worst:.1e} of the largest; nothing was written")
    return worst


if __name__ == "__main__":
    sys.exit(main())
