"""How the images of a dataset are read, decided by what its files hold: as 8-bit RGB, or with all their channels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ccgpu.models.image_format import ImageFormat
from ccgpu.train.data.facts import Facts
from ccgpu.train.data.values import mean_and_std

_RGB = ImageFormat()
_SHOWN = 3  # files that a message names of each kind


@dataclass(frozen=True)
class Channels:
    """How images are read and normalised; the attributes of `Dataset` of the same names.

    Attributes:
        images: the format.
        mean, std: of the images' pixels, one number for each channel in units of the stored values; None for 8-bit RGB,
            which is normalised as its backbone is.
        text: all of it in one line.
    """

    images: ImageFormat
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    text: str


def channels_of(facts: Mapping[Path, Facts], value_range: tuple[float, float] | None = None) -> Channels:
    """Return how the images of a dataset are read.

    Images of 8 bits that are RGB, or grey and RGB, are read as RGB, and so are all images if there is a `value_range`.
    Images that are all grey, all of 16 bits, or all of one other number of channels are read as they are stored, and
    normalised by the mean and std of their pixels. Grey images with transparent pixels count as RGB, whose transparent
    pixels become white.

    Args:
        facts: what the image files are, of one or more; those that cannot be decoded do not count.
        value_range: the values of images of more than 8 bits that become 0 and 255.

    Raises:
        ValueError: the images differ in their number of channels or in their depth, or some are read as 8-bit RGB
            alone while others cannot be. The message counts the images of each kind and names some.
    """
    usable = {path: found for path, found in facts.items() if found.problem is None and found.decoded}
    if value_range is not None or not usable:
        ranged = "" if value_range is None else ", deeper values {:g} to {:g} as 0 to 255".format(*value_range)
        return Channels(_RGB, None, None, f"8-bit RGB{ranged}")
    kinds: dict[ImageFormat | str, list[Path]] = defaultdict(list)
    for path, found in usable.items():
        kinds[_kind_of(found)].append(path)
    grey = ImageFormat(1, raw=True)
    if set(kinds) <= {_RGB, grey} and _RGB in kinds:
        mixed = f", {len(kinds[grey])} of {len(usable)} from grey" if grey in kinds else ""
        return Channels(_RGB, None, None, f"8-bit RGB{mixed}")
    kind = next(iter(kinds))
    if len(kinds) > 1 or isinstance(kind, str):
        lines = [
            f"{len(paths)} with {kind}: {', '.join(map(str, paths[:_SHOWN]))}{', ...' if len(paths) > _SHOWN else ''}"
            for kind, paths in sorted(kinds.items(), key=lambda item: -len(item[1]))
        ]
        readable = all(found.no_rgb is None for found in usable.values())
        advice = "; or --value-range LOW HIGH reads all of them as 8-bit RGB" if readable else ""
        raise ValueError(
            f"channels_of: images must have one number of channels and one depth, got {len(kinds)} "
            f"kind{'s'[: len(kinds) > 1]} in {len(usable)} images; convert or remove those that differ{advice}:\n"
            + "\n".join(f"  {line}" for line in lines)
        )
    values = [found.values for found in usable.values() if found.values is not None]
    mean, std = mean_and_std(values)
    shown = ", ".join(f"{m:.4g} +- {s:.4g}" for m, s in zip(mean, std, strict=True))
    return Channels(kind, mean, std, f"{kind} as stored, mean and std {shown}")


def _kind_of(found: Facts) -> ImageFormat | str:
    """Return the format in which a file's values are whole, or in words why they cannot be read."""
    if found.values is None:
        return found.unreadable or "values that cannot be read"
    channels, dtype = found.values.channels, found.values.dtype
    if dtype == "uint8" and (channels == 3 or (channels == 1 and found.transparent)):
        return _RGB
    return ImageFormat(channels, raw=True, dtype=dtype)
