"""An image as the input of a network: windows of it, or the whole image at a smaller size.

`predict_classes` reads images of any size through a `NetworkInput`, so that only the windows that the network sees are
float32. There is one for tensors, and one for decoded image files, which keep their 4 bytes a pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


class NetworkInput(Protocol):
    """One image, from which windows and smaller copies are taken as network input."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""

    def crop(self, rows: slice, columns: slice) -> Tensor:
        """Return a window, normalised, (1, C, h, w); the slices have start and stop inside of the image."""

    def shrink(self, height: int, width: int) -> Tensor:
        """Return the image resized to this smaller size, smoothed, normalised, (1, C, height, width)."""


class TensorInput:
    """A normalised image, a tensor (1, C, H, W), as a `NetworkInput`: windows are views."""

    def __init__(self, image: Tensor) -> None:
        self.image = image

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.image.shape[-2], self.image.shape[-1]

    def crop(self, rows: slice, columns: slice) -> Tensor:
        """Return a window."""
        return self.image[..., rows, columns]

    def shrink(self, height: int, width: int) -> Tensor:
        """Return the image resized by `resize`, smoothed."""
        return resize(self.image, (height, width), antialias=True)


class PixelInput:
    """A decoded image file as a `NetworkInput`: each window is normalised by itself.

    `shrink` resizes by Pillow, whose filter is torch's but which rounds RGB to whole values of 0..255 after each axis:
    there it differs from `TensorInput` by one such value at most.

    Args:
        image: of mode RGB, or values (H, W, C), as from `models.image_format.ImageFormat.open`.
        normalise: pixels (h, w, C) -> network input (1, C, h, w).

    Examples:
        >>> import torch
        >>> from PIL import Image
        >>> from ccgpu.models.normalisation import Normalise
        >>> from ccgpu.models.prediction import Prediction
        >>> from ccgpu.models.tiles import predict_classes
        >>> net = torch.nn.Conv2d(3, 5, 1)
        >>> image = PixelInput(Image.new("RGB", (300, 200)), lambda pixels: Normalise()(pixels)[None])
        >>> classes = predict_classes(net, image, Prediction(), tile=64, overlap=16)
        >>> classes.shape, classes.dtype
        (torch.Size([200, 300]), torch.uint8)
    """

    def __init__(self, image: Image.Image | np.ndarray, normalise: Callable[[np.ndarray], Tensor]) -> None:
        self.image = image
        self.normalise = normalise

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        if isinstance(self.image, np.ndarray):
            return self.image.shape[0], self.image.shape[1]
        return self.image.height, self.image.width

    def crop(self, rows: slice, columns: slice) -> Tensor:
        """Return a window, normalised."""
        if isinstance(self.image, np.ndarray):
            return self.normalise(self.image[rows, columns])
        return self.normalise(np.asarray(self.image.crop((columns.start, rows.start, columns.stop, rows.stop))))

    def shrink(self, height: int, width: int) -> Tensor:
        """Return the image resized by Pillow, smoothed, then normalised."""
        if isinstance(self.image, np.ndarray):
            return self.normalise(resize_pixels(self.image, (height, width)))
        return self.normalise(np.asarray(self.image.resize((width, height), Image.Resampling.BILINEAR)))


def resize_pixels(
    pixels: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> np.ndarray:
    """Return an image, or a window of it, resized bilinearly by Pillow, which smooths where it shrinks.

    Args:
        pixels: (H, W, C) of uint8, uint16 or float32.
        size: height and width of the result in pixels.
        box: the window that is resized, (left, top, right, bottom) in pixels; None: the whole image.

    Returns:
        (height, width, C): of RGB, uint8 with three channels, uint8, which Pillow rounds after each axis; of any other
        image float32, whose channels are resized each by itself.
    """
    (height, width), bilinear = size, Image.Resampling.BILINEAR
    if pixels.dtype == np.uint8 and pixels.shape[-1] == 3:
        return np.asarray(Image.fromarray(pixels).resize((width, height), bilinear, box=box))
    resized = np.empty((height, width, pixels.shape[-1]), np.float32)
    for channel in range(pixels.shape[-1]):
        values = Image.fromarray(np.ascontiguousarray(pixels[..., channel], dtype=np.float32))
        resized[..., channel] = np.asarray(values.resize((width, height), bilinear, box=box))
    return resized


def resize(maps: Tensor, size: Sequence[int], *, antialias: bool = False) -> Tensor:
    """Resize the last two axes bilinearly with aligned edges; every image, channel and frame by itself."""
    if maps.shape[-2:] == tuple(size):
        return maps
    if antialias and size[1] == 1 and maps.shape[-2] != size[0]:
        # torch 2.13 on the CPU gives wrong rows where the new width is 1, so the height is resized in a second,
        # transposed step.
        narrow = resize(maps, (maps.shape[-2], 1), antialias=True)
        return resize(narrow.transpose(-2, -1), (1, size[0]), antialias=True).transpose(-2, -1)
    # F.interpolate needs four axes: a clip's frames are merged with its channels.
    flat = F.interpolate(maps.flatten(1, -3), tuple(size), mode="bilinear", align_corners=False, antialias=antialias)
    return flat.unflatten(1, maps.shape[1:-2])
