"""Draw attention maps of a pixel: `python -m train.attention --checkpoint X IMAGE --at Y,X --out FILE.png`.

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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ccgpu.models import checkpoint
from ccgpu.models.ccnet import CCNet
from ccgpu.models.image_files import read_image
from ccgpu.models.normalisation import Normalise
from ccgpu.models.prediction import Prediction
from ccgpu.models.weights import write_atomically
from ccgpu.train import distributed
from ccgpu.train.distributed import say
from ccgpu.train.runs.errors import BAD_FILE, run_command
from ccgpu.train.runs.flags import add_checkpoint, add_device, command_parser
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
        explained={ValueError: 2},  # a feature map too large for a page is found only after forward
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
    add_device(parser)
    return parser.parse_args(argv)


def _pixel(text: str) -> Pixel:
    y, comma, x = text.partition(",")
    if not comma:
        raise argparse.ArgumentTypeError(f"must be Y,X, got {text!r}")
    return int(y), int(x)


def prepare(flags: argparse.Namespace) -> tuple[CCNet, np.ndarray, list[tuple[Pixel, Pixel]]]:
    """Return the network on its device, the image resized for it, and the chosen pixels: (in that image, in the file).

    Raises:
        ValueError, OSError, ImportError, TypeError: a checkpoint, image or flags that cannot be used.
    """
    if flags.out is None and flags.html is None:
        raise ValueError("--out FILE.png or --html FILE.html must be given, got neither")
    device = distributed.choose_device(flags.device)
    if min(flags.loops) < 1:
        raise ValueError(f"--loops must be 1 or more, got {' '.join(map(str, flags.loops))}")
    found = read_network(flags.checkpoint)
    net = checkpoint.build(found).to(device)
    if net.head.cca is None:
        raise ValueError(f"--checkpoint must hold a network with criss-cross attention, got {flags.checkpoint} without")
    image = read_image(flags.image)
    height, width = image.shape[:2]
    pixels = [(height // 2, width // 2)] if flags.at is None else flags.at
    for y, x in pixels:
        if not (0 <= y < height and 0 <= x < width):
            raise ValueError(f"--at must be a pixel Y,X of {height} x {width}, counted from 0, got {y},{x}")
    image = resized(image, found.prediction if flags.short_side is None else {"short_side": flags.short_side})
    seen = [
        ((2 * y + 1) * image.shape[0] // (2 * height), (2 * x + 1) * image.shape[1] // (2 * width)) for y, x in pixels
    ]
    return net, image, list(zip(seen, pixels, strict=True))


def resized(image: np.ndarray, prediction: Mapping[str, Any]) -> np.ndarray:
    """Return an image resized as the checkpoint's `Description.prediction` asks for, or unchanged."""
    size = Prediction(**prediction).seen_size(*image.shape[:2])
    if size == image.shape[:2]:
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def draw(
    flags: argparse.Namespace,
    net: CCNet,
    image: np.ndarray,
    chosen: Sequence[tuple[Pixel, Pixel]],
) -> int:
    """Write the files that the flags ask for, each atomically; return the exit status.

    Raises:
        ValueError: the feature map has too many positions for a page.
    """
    device = next(net.parameters()).device
    images = Normalise(net.backbone.mean, net.backbone.std)(image)[None].to(device)
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
                overlay = attention_overlay(image, attention[0] if net.dims == 3 else attention, seen)
                cells.append((f"pixel {pixel[0]},{pixel[1]}  R = {recurrence}", overlay))
        content = io.BytesIO()
        contact_sheet(cells, [], len(flags.loops)).save(content, format="PNG")
        write_atomically(flags.out, content.getvalue())
        say(f"maps: {flags.out}")
    if flags.html is not None:
        text = page(net, images, image, chosen[0][0], max(flags.loops))
        write_atomically(flags.html, text)
        say(f"page: {flags.html}, {len(text) / 1e6:.1f} MB; open it in a browser and click")
    return 0


def page(net: CCNet, images: torch.Tensor, image: np.ndarray, at: Pixel, loops: int) -> str:
    """Return the page for an image; it holds the weights of each loop, from which the browser computes any map.

    A weight is stored in 16 bits, as a multiple of 1/65535 of its position's largest weight.

    Args:
        net: the network.
        images: the image as network input, a batch of one.
        image: the image, uint8 (H, W, 3).
        at: the pixel (y, x) whose maps the page shows when it opens.
        loops: the page shows the maps after 1 .. loops loops.

    Raises:
        ValueError: the feature map has more than `MOST_POSITIONS` positions.
    """
    weights = [loop[0] for loop in net.attention_weights(images, recurrence=loops)]
    if net.dims == 3:
        weights = [loop[:, 0] for loop in weights]
    rows, columns = weights[0].shape[1:]
    if rows * columns > MOST_POSITIONS:
        raise ValueError(
            f"--html holds at most {MOST_POSITIONS} positions of the feature map, got {rows} x {columns}; add "
            "--short-side with a smaller number of pixels."
        )
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
        "heat": HEAT.tolist(),
        "opacity": HEAT_OPACITY,
        "image": f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}",
        "weights": packed,
    }
    return PAGE.read_text(encoding="utf-8").replace("__DATA__", json.dumps(data))


if __name__ == "__main__":
    sys.exit(main())
