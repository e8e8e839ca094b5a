"""Draw docs/images/result.jpg, the README's image of a result, with the network of `make demo`.

`python -m docs.draw_result runs/demo` (needs matplotlib). The image shows a synthetic street of the validation set, the
predicted classes, and what the ringed pixel attends to in one loop and in two.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ccgpu.models import checkpoint
from ccgpu.models.ccnet import CCNet
from ccgpu.models.colouring import colour_mask
from ccgpu.models.image_files import read_image
from ccgpu.models.normalisation import Normalise
from ccgpu.models.prediction import Prediction
from ccgpu.models.tiles import predict_classes
from ccgpu.train.data.cityscapes_labels import CITYSCAPES
from ccgpu.train.visualise import attention_overlay
from docs.drawing import IMAGES, plt

TARGET = IMAGES / "result.jpg"
SCENE, AT = "synthetic_000022_000019", (80, 165)  # the scene, and the pixel (y, x) whose attention is shown
NAMED = 0.004  # the legend names classes with at least this share of the pixels


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the image from the run folder that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="the run folder of `make demo`")
    parser.add_argument("--scene", default=SCENE)
    parser.add_argument("--at", type=int, nargs=2, default=AT, metavar=("Y", "X"))
    parser.add_argument("--out", type=Path, default=TARGET)
    flags = parser.parse_args(argv)
    scene = flags.run / "scenes" / "leftImg8bit" / "val" / "synthetic" / f"{flags.scene}_leftImg8bit.png"
    image = read_image(scene)
    net = checkpoint.build(checkpoint.read(flags.run / "last.pt")).eval()
    classes, maps = predict_and_attend(net, image, tuple(flags.at))
    panels = {"image": image, "predicted classes": colour_mask(classes, CITYSCAPES.colours)}
    for loops, attention in enumerate(maps, 1):
        overlay = np.asarray(attention_overlay(image, attention, tuple(flags.at), align_corners=net.align_corners))
        panels[f"attention of a pixel, R = {loops}"] = overlay
    shares = np.bincount(classes.ravel(), minlength=CITYSCAPES.num_classes) / classes.size
    draw(panels, np.flatnonzero(shares >= NAMED).tolist(), flags.out)


@torch.no_grad()
def predict_and_attend(
    net: CCNet, image: np.ndarray, at: tuple[int, int]
) -> tuple[np.ndarray, tuple[torch.Tensor, torch.Tensor]]:
    """Return an image's predicted classes (H, W) and the attention maps (h, w) of a pixel for R = 1 and R = 2.

    Args:
        net: a network with criss-cross attention.
        image: uint8 (H, W, 3), RGB.
        at: the pixel, (y, x).
    """
    images = Normalise(net.backbone.mean, net.backbone.std)(image)[None]
    classes = predict_classes(net, images, Prediction()).numpy()
    one, two = (net.attention_map(images, at, recurrence=loops)[0] for loops in (1, 2))
    return classes, (one, two)


def draw(panels: dict[str, np.ndarray], shown: Sequence[int], target: Path) -> None:
    """Write the panels side by side, and below them the names of the classes `shown` beside their colours."""
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 2.15), layout="constrained")
    for ax, (title, panel) in zip(axes, panels.items(), strict=True):
        ax.imshow(panel, interpolation="bilinear")
        ax.set_title(title, fontsize=13, loc="left")
        ax.axis("off")
    patches = [plt.Rectangle((0, 0), 1, 1, color=CITYSCAPES.colours[index] / 255) for index in shown]
    names = [CITYSCAPES.names[index] for index in shown]
    style = {"fontsize": 11, "frameon": False, "columnspacing": 1.2, "handlelength": 1.2}
    figure.legend(patches, names, loc="outside lower left", ncols=len(names), **style)
    figure.savefig(target, dpi=150, facecolor="white", bbox_inches="tight", pad_inches=0.06, pil_kwargs={"quality": 88})
    plt.close(figure)


if __name__ == "__main__":
    main()
