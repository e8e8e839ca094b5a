"""The flags by which commands predict images at other scales and sizes than the network's own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ccgpu.models.prediction import LARGEST_SIDE, MULTI_SCALE, SCALES, SIZES, size_problem
from ccgpu.train.runs.flags import flag


def add_sizes(parser: argparse._ActionsContainer, default: str) -> None:
    """Add --short-side, --long-side and --fit, the size of images for the network; their help ends with `default`."""
    add = parser.add_argument
    add(
        "--short-side",
        type=int,
        metavar="N",
        help=f"resize images to this short side, in pixels (default: {default})",
    )
    add(
        "--long-side",
        type=int,
        metavar="N",
        help=f"with --short-side: longest side of resized images, in pixels (default: {default})",
    )
    add(
        "--fit",
        type=int,
        nargs="+",
        metavar="N",
        help=f"resize images to the largest size that fits into H W, or N for a square (default: {default})",
    )


def chosen_sizes(flags: argparse.Namespace) -> dict[str, Any]:
    """Return the sizes that --short-side, --long-side and --fit ask for, by name; those left out are missing.

    Raises:
        ValueError: a size is out of its range, or two of them exclude each other.
    """
    given = {name: getattr(flags, name) for name in SIZES if getattr(flags, name) is not None}
    if "fit" in given:
        given["fit"] = height_width("--fit", given["fit"])
    for name, sides in given.items():
        if not all(1 <= side <= LARGEST_SIDE for side in (sides if isinstance(sides, tuple) else (sides,))):
            raise ValueError(f"{flag(name)} must be from 1 to {LARGEST_SIDE} pixels, got {getattr(flags, name)}")
    if "fit" in given and len(given) > 1:
        names = [flag(name) for name in SIZES]
        raise ValueError(size_problem(given.get("short_side"), given.get("long_side"), given["fit"], names))
    return given


def height_width(name: str, values: Sequence[int]) -> tuple[int, int]:
    """Return H W, or N for a square, as (height, width).

    Raises:
        ValueError: more than two numbers, or one below 1; `name` is the flag.
    """
    if len(values) > 2 or min(values) < 1:
        raise ValueError(f"{name} must be H W, or N for a square, in pixels, got {' '.join(map(str, values))}")
    return values[0], values[-1]


def add_scales(parser: argparse._ActionsContainer, default: str) -> None:
    """Add --scales, the scales of multi-scale prediction; its help ends with `default`."""
    scales = " ".join(map(str, MULTI_SCALE))
    parser.add_argument(
        "--scales",
        type=float,
        nargs="*",
        metavar="S",
        help=f"average over these scales; without values: {scales} (default: {default})",
    )


def chosen_scales(given: list[float] | None) -> tuple[float, ...] | None:
    """Return the scales that --scales asks for, or None where it is left out.

    Raises:
        ValueError: a scale is out of its range.
    """
    low, high = SCALES
    if not all(low <= scale <= high for scale in given or ()):
        raise ValueError(f"--scales must be numbers from {low} to {high}, got {' '.join(map(str, given or ()))}")
    return None if given is None else tuple(given) or MULTI_SCALE
