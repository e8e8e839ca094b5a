"""From a network to the classes of one image of any size, in bounded memory: large images are cut into tiles or shrunk.

The image is a tensor or a decoded file (`models/network_input.py`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ccgpu.models.network_input import NetworkInput, TensorInput
from ccgpu.models.prediction import Network, Prediction, require_finite, window_starts

# Side of the tiles, in pixels, that `ccgpu predict` cuts large images into: two side by side are an image of
# Cityscapes.
TILE = 1024


@dataclass(frozen=True)
class Tile:
    """A tile of a large image: where it lies, and the part of it that gives the classes.

    Attributes:
        top, left: its first row and column.
        rows, columns: rows and columns of the image that take their class from this tile.
    """

    top: int
    left: int
    rows: slice
    columns: slice


def _all_tiles(tiles: Sequence[Tile]) -> Iterable[Tile]:
    return tiles


def predict_classes(
    net: Network,
    image: Tensor | NetworkInput,
    prediction: Prediction,
    *,
    tile: int = 0,
    overlap: int = 0,
    progress: Callable[[Sequence[Tile]], Iterable[Tile]] = _all_tiles,
) -> Tensor:
    """Return the class of every pixel of one image of any size, in memory that does not grow with the image.

        classes[y, x] = argmax of prediction(net, the tile whose centre is nearest to (y, x))[y, x]

    An image with more than 2 tile^2 pixels is cut into tiles of tile x tile pixels that overlap by `overlap`
    pixels or more. Each is predicted by itself; in an overlap, the pixels on either side of its middle come from the
    tile on that side. If the prediction has a short_side or fit, the network expects to see a whole image: a large
    image is then shrunk to 2 tile^2 pixels instead, and each pixel gets the class of the nearest pixel of the small
    image. Smaller images, and all images if tile=0, are predicted without cutting or shrinking.

    Args:
        net: as for `Prediction`.
        image: (1, 3, H, W), normalised; or a `NetworkInput`, which makes such tiles when they are needed.
        prediction: how each tile is predicted.
        tile: side of a tile in pixels; 0 for no tiles.
        overlap: pixels, 0 or more and less than tile.
        progress: returns the tiles of a large image, for example `tqdm.tqdm`; it may raise to stop between two.

    Returns:
        (H, W) on the CPU, uint8; int64 for a network with more than 256 classes.

    Raises:
        ValueError: overlap is out of its range.
        NonFiniteScores: the network returns NaN or infinity.
    """
    return predict_image(net, image, prediction, tile=tile, overlap=overlap, progress=progress).classes


class Outcome(NamedTuple):
    """What a network says of one image, on the CPU.

    Attributes:
        classes: (H, W), uint8; int64 for more than 256 classes.
        probabilities: float32 (classes, H, W), which sum to 1 over the classes; None where they were not asked for.
    """

    classes: Tensor
    probabilities: Tensor | None


@torch.no_grad()
def predict_image(
    net: Network,
    image: Tensor | NetworkInput,
    prediction: Prediction,
    *,
    tile: int = 0,
    overlap: int = 0,
    progress: Callable[[Sequence[Tile]], Iterable[Tile]] = _all_tiles,
    probabilities: bool = False,
    name: str = "an image",
) -> Outcome:
    """Return the classes of one image, as `predict_classes` does, and if asked for their probabilities.

        probabilities = softmax of the scores over the classes, or the scores where the prediction averages these

    Args:
        net, image, prediction, tile, overlap, progress: as for `predict_classes`.
        probabilities: whether these are returned; they take 4 bytes for each pixel and class.
        name: of the image, for the message about scores that are not finite.
    """
    source = TensorInput(image) if isinstance(image, Tensor) else image
    height, width = source.size
    if not is_large(source.size, tile):
        return outcomes(prediction, prediction(net, whole_input(source, prediction, tile)), probabilities, [name])[0]
    if not 0 <= overlap < tile:
        raise ValueError(
            f"predict_classes: overlap must be in 0..{tile - 1}, got {overlap}; lower it or enlarge the tile."
        )
    if _sees_whole_images(prediction):
        (found,) = outcomes(prediction, prediction(net, whole_input(source, prediction, tile)), probabilities, [name])
        rows, columns = map(_nearest, source.size, found.classes.shape)
        shares = None if found.probabilities is None else found.probabilities[:, rows][..., columns]
        return Outcome(found.classes[rows][:, columns], shares)
    tiles = [
        Tile(top, left, rows, columns)
        for top, rows in _cells(height, tile, overlap)
        for left, columns in _cells(width, tile, overlap)
    ]
    whole: Outcome | None = None
    for at in progress(tiles):
        bottom, right = min(at.top + tile, height), min(at.left + tile, width)
        scores = prediction(net, source.crop(slice(at.top, bottom), slice(at.left, right)))
        (found,) = outcomes(prediction, scores, probabilities, [name])
        if whole is None:
            shares = None if found.probabilities is None else torch.empty(len(found.probabilities), height, width)
            whole = Outcome(torch.empty(height, width, dtype=found.classes.dtype), shares)
        inner = (
            slice(at.rows.start - at.top, at.rows.stop - at.top),
            slice(at.columns.start - at.left, at.columns.stop - at.left),
        )
        whole.classes[at.rows, at.columns] = found.classes[inner]
        if whole.probabilities is not None and found.probabilities is not None:
            whole.probabilities[:, at.rows, at.columns] = found.probabilities[:, inner[0], inner[1]]
    assert whole is not None  # a large image has tiles
    return whole


def whole_input(source: NetworkInput, prediction: Prediction, tile: int) -> Tensor:
    """Return a whole image as `predict_classes` gives it to a prediction, (1, 3, h, w), normalised.

    That is the image itself; but if it has more than 2 tile^2 pixels, tile is not 0 and the prediction has a
    short_side or fit, it is shrunk to so many pixels.
    """
    height, width = source.size
    if not (is_large(source.size, tile) and _sees_whole_images(prediction)):
        return source.crop(slice(0, height), slice(0, width))
    share = tile * math.sqrt(2 / (height * width))
    return source.shrink(max(1, int(height * share)), max(1, int(width * share)))


def is_large(size: tuple[int, int], tile: int) -> bool:
    """Return whether an image of this (height, width) has more than 2 tile^2 pixels; never for tile=0."""
    return tile > 0 and size[0] * size[1] > 2 * tile**2


def _sees_whole_images(prediction: Prediction) -> bool:
    return prediction.short_side is not None or prediction.fit is not None


def outcomes(prediction: Prediction, scores: Tensor, probabilities: bool, names: Sequence[str]) -> list[Outcome]:
    """Return what the scores say of each image of a batch.

    Args:
        prediction: which made the scores.
        scores: (B, classes, H, W).
        probabilities: whether these are returned.
        names: of the B images, for the message.

    Raises:
        NonFiniteScores: a score is NaN or infinite.
    """
    kind = torch.uint8 if scores.shape[1] <= 256 else torch.int64
    classes = [image.argmax(dim=0).to(kind).cpu() for image in scores]
    # After the copies, for which the device has finished anyway, so that this check waits for nothing.
    for image, name in zip(scores, names, strict=True):
        require_finite(image, name)
    if not probabilities:
        return [Outcome(found, None) for found in classes]
    if prediction.average == "logits":
        scores = scores.softmax(dim=1)
    return [Outcome(*both) for both in zip(classes, scores.float().cpu(), strict=True)]


def _nearest(full: int, small: int) -> Tensor:
    """Return floor((i + 1/2) small / full), i = 0 .. full - 1: of `small` pixels, the one nearest to each of `full`."""
    return ((2 * torch.arange(full) + 1) * small) // (2 * full)


def _cells(size: int, tile: int, overlap: int) -> list[tuple[int, slice]]:
    """Return (start, slice) of each tile along an axis; positions in the slice take their class from the tile."""
    starts = window_starts(size, tile, tile - overlap)
    borders = [(one + tile + other) // 2 for one, other in itertools.pairwise(starts)]
    return list(zip(starts, map(slice, [0, *borders], [*borders, size]), strict=True))
