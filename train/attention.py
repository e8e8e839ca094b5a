"""Draw attention maps of a pixel: `ccgpu attention --checkpoint X IMAGE --at Y,X --out FILE.png`.

After R loops a position's attention map is its row of A_R ... A_1, the product of the loops' attention matrices. It is
computed exactly, as the op's vector-Jacobian product in v (`ccgpu.models.attention.attention_map`). `--html` writes a
page in a single file that shows the maps of any pixel that is clicked.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ccgpu.models import checkpoint
from ccgpu.models.ccnet import CCNet
from ccgpu.models.image_format import ImageFormat, Pixels, size_of
from ccgpu.models.network_input import PixelInput, resize
from ccgpu.models.normalisation import Normalise
from ccgpu.models.prediction import LARGEST_SIDE, NonFiniteScores, Prediction
from ccgpu.models.tiles import TILE, whole_input
from ccgpu.models.weights import write_atomically
from ccgpu.train import distributed
from ccgpu.train.data.checking import notes
from ccgpu.train.data.facts import open_with_facts
from ccgpu.train.distributed import say
from ccgpu.train.runs.errors import BAD_FILE, run_command
from ccgpu.train.runs.flags import (
    add_checkpoint,
    add_device,
    add_max_pixels,
    add_value_range,
    chosen_range,
)
from ccgpu.train.runs.outputs import add_overwrite, check_output_file
from ccgpu.train.runs.parser import command_parser
from ccgpu.train.runs.settings.limits import MOST_LOOPS
from ccgpu.train.runs.setup import read_network
from ccgpu.train.visualise import HEAT, HEAT_OPACITY, attention_overlay, contact_sheet

LOOPS = (1, 2, 3)
# Most feature positions that a page can hold, those of a 769 x 769 image at output stride 8: three loops of 97 x 97
# positions with 193 neighbours each are 11 MB before compression.
MOST_POSITIONS = 97 * 97
PAGE = Path(__file__).with_name("attention.html")
Pixel = tuple[int, int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 written, 1 failed, 2 bad input."""
    flags = read_flags(argv)
    return run_command(
        "attention",
        lambda: prepare(flags),
        lambda prepared: draw(flags, *prepared),
        again="run the command again",
        smaller="use a smaller --short-side",
        refused=BAD_FILE,
    )


def read_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags."""
    parser = command_parser("attention", __doc__)
    add = parser.add_argument
    add("image", type=Path, metavar="IMAGE", help="the image")
    add_checkpoint(parser)
    add(
        "--at",
        type=_pixel,
        action="append",
        metavar="Y,X",
        help="a pixel of the image, counted from 0 at the top left; may be repeated (default: the middle)",
    )
    add("--loops", type=int, nargs="+", default=list(LOOPS), metavar="R", help="numbers of loops (default: 1 2 3)")
    add("--out", type=Path, metavar="FILE.png", help="image file for the maps")
    add("--html", type=Path, metavar="FILE.html", help="file for a page that shows the maps of any clicked pixel")
    add("--short-side", type=int, metavar="N", help="resize the image to this short side for the network, in pixels")
    add_value_range(parser, "the network's")
    add_max_pixels(parser)
    add_overwrite(parser, "the files of --out and --html where they exist")
    add_device(parser)
    return parser.parse_args(_joined(sys.argv[1:] if argv is None else argv))


def _joined(words: Sequence[str]) -> list[str]:
    """Return a command line with --at joined to its value, because argparse takes the -1,0 of --at -1,0 for a flag."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] == "--at":
            joined[-1] = f"--at={word}"
        else:
            joined.append(word)
    return joined


def _pixel(text: str) -> Pixel:
    try:
        y, x = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be Y,X, a row and a column in pixels, got {text!r}") from None
    return y, x


def prepare(flags: argparse.Namespace) -> tuple[CCNet, ImageFormat, torch.Tensor, list[tuple[Pixel, Pixel]]]:
    """Return the network on its device, how its images are read, its input, and the chosen pixels.

    Each of these is (the pixel in that input, the pixel in the file).

    Raises:
        ValueError, OSError, ImportError, TypeError: a checkpoint, image or flags that cannot be used.
    """
    if flags.out is None and flags.html is None:
        raise ValueError("--out FILE.png or --html FILE.html must be given, got neither")
    device = distributed.choose_device(flags.device)
    if not all(1 <= loops <= MOST_LOOPS for loops in flags.loops):
        raise ValueError(f"--loops must be from 1 to {MOST_LOOPS}, got {' '.join(map(str, flags.loops))}")
    if flags.short_side is not None and not 1 <= flags.short_side <= LARGEST_SIDE:
        raise ValueError(f"--short-side must be from 1 to {LARGEST_SIDE} pixels, got {flags.short_side}")
    if flags.out is not None and flags.out.suffix.lower() != ".png":
        raise ValueError(f"--out must end in .png, got {flags.out}")
    outputs = [(name, path) for name, path in (("--out", flags.out), ("--html", flags.html)) if path is not None]
    for name, path in outputs:
        check_output_file(name, path, [flags.image, flags.checkpoint], overwrite=flags.overwrite)
    if len({path.resolve() for _, path in outputs}) < len(outputs):
        raise ValueError(f"--html must be another file than --out, got {flags.html} for both; name another.")
    found = read_network(flags.checkpoint)
    net = checkpoint.build(found).to(device)
    if net.head.cca is None:
        raise ValueError(f"--checkpoint must hold a network with criss-cross attention, got {flags.checkpoint} without")
    value_range = chosen_range(flags.value_range, found.value_range)
    image, facts = open_with_facts(flags.image, found.images, value_range=value_range, max_pixels=flags.max_pixels)
    for line in notes({flags.image: facts}, value_range, raw=found.images.raw):
        say(line)
    height, width = size_of(image)
    pixels = [(height // 2, width // 2)] if flags.at is None else flags.at
    for y, x in pixels:
        if not (0 <= y < height and 0 <= x < width):
            raise ValueError(f"--at must be a pixel Y,X of {height} x {width}, counted from 0, got {y},{x}")
    images = seen_images(net, image, Prediction.of_images(found.prediction).resized(flags.short_side))
    rows, columns = images.shape[-2:]
    if flags.html is not None:
        check_page(net, rows, columns)
    seen = [((2 * y + 1) * rows // (2 * height), (2 * x + 1) * columns // (2 * width)) for y, x in pixels]
    return net, found.images, images, list(zip(seen, pixels, strict=True))


def seen_images(net: CCNet, image: Pixels, prediction: Prediction) -> torch.Tensor:
    """Return the image as the network sees it when it predicts at scale 1: (1, C, h, w), normalised, on its device.

    An image without a size to resize it to is seen whole here, whereas `ccgpu predict` cuts large ones into tiles.
    """
    normalise = Normalise(net.backbone.mean, net.backbone.std)
    source = PixelInput(image, lambda pixels: normalise(pixels)[None])
    images = resize(whole_input(source, prediction, TILE), prediction.seen_size(*source.size), antialias=True)
    return images.to(next(net.parameters()).device)


def check_page(net: CCNet, height: int, width: int) -> None:
    """Raise ValueError if the feature map of images of this size has too many positions for a page.

    The backbone runs on torch's device "meta", where only shapes are computed.
    """
    state = (*net.backbone.named_parameters(), *net.backbone.named_buffers())
    images = torch.empty(1, net.in_channels, height, width, device="meta")
    _, last = torch.func.functional_call(net.backbone, {name: value.to("meta") for name, value in state}, (images,))
    rows, columns = last.shape[-2:]
    if rows * columns > MOST_POSITIONS:
        raise ValueError(
            f"--html holds at most {MOST_POSITIONS} positions of the feature map, got {rows} x {columns}; add "
            "--short-side with a smaller number of pixels."
        )


def draw(
    flags: argparse.Namespace,
    net: CCNet,
    images_format: ImageFormat,
    images: torch.Tensor,
    chosen: Sequence[tuple[Pixel, Pixel]],
) -> int:
    """Write the files that the flags ask for, each atomically; return the exit status.

    Raises:
        NonFiniteScores: attention weights are NaN.
    """
    image = images_format.display(Normalise(net.backbone.mean, net.backbone.std).values(images[0]))
    if net.dims == 3:
        images = images[:, :, None]
    loops = net.head.cca.recurrence if net.head.cca is not None else 0
    say(f"the network was trained with R = {loops}; further loops repeat its attention on their own output")
    if flags.out is not None:
        cells = []
        for seen, pixel in chosen:
            at = (0, *seen) if net.dims == 3 else seen
            for recurrence in flags.loops:
                attention = net.attention_map(images, at, recurrence=recurrence)[0]
                check_finite(attention, flags.image)
                attention = attention[0] if net.dims == 3 else attention
                overlay = attention_overlay(image, attention, seen, align_corners=net.align_corners)
                cells.append((f"pixel {pixel[0]},{pixel[1]}  R = {recurrence}", overlay))
        content = io.BytesIO()
        contact_sheet(cells, [], len(flags.loops)).save(content, format="PNG")
        write_atomically(flags.out, content.getvalue())
        say(f"maps: {flags.out}")
    if flags.html is not None:
        weights = net.attention_weights(images, recurrence=max(flags.loops))
        for loop in weights:
            check_finite(loop, flags.image)
        text = page(net, weights, image, chosen[0][0])
        write_atomically(flags.html, text)
        say(f"page: {flags.html}, {len(text) / 1e6:.1f} MB; open it in a browser and click")
    return 0


def check_finite(attention: torch.Tensor, path: Path) -> None:
    """Raise NonFiniteScores if attention weights are NaN or infinite."""
    if not attention.isfinite().all():
        raise NonFiniteScores(
            f"the attention weights of {path} must be finite, got NaN or infinity; the network's weights are damaged "
            "or diverged: use another checkpoint"
        )


def page(net: CCNet, loops: Sequence[torch.Tensor], image: np.ndarray, at: Pixel) -> str:
    """Return the page for an image; it holds the weights of each loop, from which the browser computes any map.

    A weight is stored in 16 bits, as a multiple of 1/65535 of its position's largest weight.

    Args:
        net: the network.
        loops: its attention weights of a batch of one image, or of a clip of one: `CCNet.attention_weights`.
        image: the image, uint8 (H, W, 3).
        at: the pixel (y, x) whose maps the page shows when it opens.
    """
    weights = [loop[0] for loop in loops]
    if net.dims == 3:
        weights = [loop[:, 0] for loop in weights]
    rows, columns = weights[0].shape[1:]
    packed = []
    for loop in weights:
        table = loop.permute(1, 2, 0)
        counts = (table / table.amax(-1, keepdim=True) * np.iinfo(np.uint16).max).round().cpu().numpy()
        packed.append(base64.b64encode(gzip.compress(counts.astype("<u2").tobytes(), mtime=0)).decode())
    png = io.BytesIO()
    Image.fromarray(image).save(png, format="PNG")
    data = {
        "size": image.shape[:2],
        "positions": [rows, columns],
        "align_corners": net.align_corners,
        "at": at,
        "trained": net.head.cca.recurrence if net.head.cca is not None else 0,
        "heat": HEAT.tolist(),
        "opacity": HEAT_OPACITY,
        "image": f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}",
        "weights": packed,
    }
    return PAGE.read_text(encoding="utf-8").replace("__DATA__", json.dumps(data))


if __name__ == "__main__":
    sys.exit(main())
