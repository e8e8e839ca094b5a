"""Draw what a pixel attends to: `python -m train.attention --checkpoint X IMAGE --at Y,X --out FILE.png`.

For each number of loops R the map is the row of the chosen pixel's position in A_R ... A_1, the product of all loops'
attention: exact, as the vector-Jacobian product of the op in v (`ccgpu.models.attention.attention_map`). With `--html`
one page is written that needs nothing else: a click on any pixel shows its maps.
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
from ccgpu.train.runs.errors import BAD_INPUT, FAILURES, fail, failure
from ccgpu.train.runs.setup import read_network
from ccgpu.train.visualise import HEAT, HEAT_OPACITY, attention_overlay, contact_sheet

LOOPS = (1, 2, 3)
# Positions of the feature map for which a page holds all weights: those of an image of 769 x 769 at output stride 8.
# Three loops of 97 x 97 positions with 193 neighbours each are 11 MB before compression.
MOST_POSITIONS = 97 * 97
PAGE = Path(__file__).with_name("attention.html")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 drawn, 1 failed, 2 bad input."""
    flags = read_flags(argv)
    try:
        if flags.out is None and flags.html is None:
            raise ValueError("--out FILE.png or --html FILE.html must be given, got neither")
        device = distributed.choose_device(flags.device)
        net, image, chosen = prepare(flags, device)
    except (*BAD_INPUT, TypeError) as error:
        return fail("attention", str(error), 2)
    try:
        draw(flags, net, image, chosen, device)
    except ValueError as error:
        return fail("attention", str(error), 2)
    except FAILURES as error:
        return fail("attention", failure(error, again="run the command again", smaller="use a smaller --short-side"), 1)
    return 0


def read_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="attention", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("image", type=Path, metavar="IMAGE", help="the image")
    add("--checkpoint", type=Path, required=True, metavar="FILE", help="a run's last.pt, or a published checkpoint")
    add(
        "--at",
        type=_pixel,
        action="append",
        metavar="Y,X",
        help="a pixel of the image, counted from 0 at the top left; may be repeated (default: the middle)",
    )
    add("--loops", type=int, nargs="+", default=list(LOOPS), metavar="R", help="numbers of loops (default: 1 2 3)")
    add("--out", type=Path, metavar="FILE.png", help="draw the maps here")
    add("--html", type=Path, metavar="FILE.html", help="write the page here")
    add("--short-side", type=int, metavar="N", help="show the network an image of this short side, in pixels")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default: auto)")
    return parser.parse_args(argv)


def _pixel(text: str) -> tuple[int, int]:
    y, comma, x = text.partition(",")
    if not comma:
        raise argparse.ArgumentTypeError(f"must be Y,X, got {text!r}")
    return int(y), int(x)


def prepare(
    flags: argparse.Namespace, device: torch.device
) -> tuple[CCNet, np.ndarray, list[tuple[tuple[int, int], tuple[int, int]]]]:
    """Return the network, the image as it sees it, and each chosen pixel there and in the image of the file.

    Raises:
        ValueError, OSError, ImportError: a checkpoint, image or flags that cannot be used.
    """
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


def resized(image: np.ndarray, prepared: Mapping[str, Any]) -> np.ndarray:
    """Return an image at the size that its network was made for, or as it is."""
    size = Prediction(**prepared).seen_size(*image.shape[:2])
    if size == image.shape[:2]:
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def draw(
    flags: argparse.Namespace,
    net: CCNet,
    image: np.ndarray,
    chosen: Sequence[tuple[tuple[int, int], tuple[int, int]]],
    device: torch.device,
) -> None:
    """Write the files that were asked for, each atomically, and say where they are."""
    images = Normalise(net.backbone.mean, net.backbone.std)(image)[None].to(device)
    if net.dims == 3:
        images = images[:, :, None]
    loops = net.head.cca.recurrence if net.head.cca is not None else 0
    say(f"the network was trained with R = {loops}; more loops go on from its own features")
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


def page(net: CCNet, images: torch.Tensor, image: np.ndarray, at: tuple[int, int], loops: int) -> str:
    """Return the page for a png: its weights in each of `loops` loops, from which the browser composes any map.

    A weight is kept as a whole number of 1/65535 of the largest weight of its position.

    Raises:
        ValueError: more than `MOST_POSITIONS` positions.
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
