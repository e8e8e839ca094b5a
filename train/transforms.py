"""Augmentation and normalisation: pure functions of a picture, its label and a random generator.

A picture is uint8 (H, W, 3) RGB, a label uint8 (H, W) of train ids. Every function changes both alike, so a
label stays on its pixel. Nothing here holds a random state: the same arguments give the same result in any
process.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from ccgpu.train.labels import IGNORE

# Mean and deviation of ImageNet's training pictures, RGB in 0..255: what its backbones were trained with.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Normalise:
    """Picture -> network input: (value - mean) / std per channel, float32 (3, H, W).

    Arguments:
        mean: subtracted, RGB in 0..255.
        std: divisor, RGB in 0..255, positive.

    Raises:
        ValueError: not three values, a value that is not finite, a std that is not positive.
    """

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not np.isfinite(values).all():
                raise ValueError(f"Normalise: {name} must be three finite numbers, got {values}; give R, G, B.")
        if min(self.std) <= 0:
            raise ValueError(f"Normalise: std must be positive, got {self.std}; give 1 to keep the scale.")

    def __call__(self, image: np.ndarray) -> torch.Tensor:
        """Normalised picture.

        Arguments:
            image: uint8 (H, W, 3), RGB.

        Returns:
            float32 (3, H, W), contiguous.
        """
        scaled = (image.astype(np.float32) - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1)))

    def denormalise(self, image: torch.Tensor) -> np.ndarray:
        """Picture of a network input, rounded and clipped to 0..255: the inverse of the call.

        Arguments:
            image: floating point (3, H, W), any device.

        Returns:
            uint8 (H, W, 3), RGB.
        """
        values = image.detach().cpu().float().numpy().transpose(1, 2, 0)
        pixels = values * np.array(self.std, np.float32) + np.array(self.mean, np.float32)
        return pixels.round().clip(0, 255).astype(np.uint8)


def scaled_window(
    image: np.ndarray,
    label: np.ndarray,
    scaled: tuple[int, int],
    start: tuple[int, int],
    size: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Cut a window out of the picture and label resized to ``scaled``, without resizing what lies outside of
    it.

    The result is resize first, cut second: pixel (y, x) looks at ((start + (y, x) + 1/2) * original / scaled
    - 1/2), bilinear (with Pillow's smoothing where the picture shrinks) for the picture, the nearest pixel
    for the label.

    Arguments:
        image: uint8 (H, W, 3).
        label: uint8 (H, W).
        scaled: height and width after resizing.
        start: top and left of the window in the resized picture.
        size: height and width of the window; it must lie inside the resized picture.

    Returns:
        uint8 (h, w, 3) and uint8 (h, w).

    Raises:
        ValueError: shapes that do not belong together, a window that leaves the resized picture.
    """
    _check_pair("scaled_window", image, label)
    (height, width), (top, left), (rows, columns) = scaled, start, size
    if min(rows, columns) < 1 or min(top, left, height - top - rows, width - left - columns) < 0:
        raise ValueError(
            f"scaled_window: size must lie inside the resized picture {scaled}, got {size} at {start}; cut less."
        )
    step_y, step_x = label.shape[0] / height, label.shape[1] / width
    # Rounding may carry the far corner past the border, which Pillow refuses.
    bottom = min((top + rows) * step_y, label.shape[0])
    right = min((left + columns) * step_x, label.shape[1])
    window = Image.fromarray(image).resize(
        (columns, rows), Image.Resampling.BILINEAR, box=(left * step_x, top * step_y, right, bottom)
    )
    y = ((top + np.arange(rows) + 0.5) * step_y).astype(np.intp)
    x = ((left + np.arange(columns) + 0.5) * step_x).astype(np.intp)
    return np.asarray(window), label[y[:, None], x]


@dataclass(frozen=True)
class TrainTransform:
    """Random scale, random crop, mirror, normalise: what one training sample goes through.

    The scale is uniform in [low, high]; the crop's corner is uniform over the positions inside the scaled
    picture. Where the scaled picture is smaller than the crop, the rest at the right and the bottom is 0
    after normalisation (the mean colour) and has the label 255. The mirror is drawn with probability 1/2.

    Arguments:
        crop: height and width of the result, in pixels.
        scale: lowest and highest factor.
        mirror: whether pictures are mirrored at all.
        normalise: mean and std.

    Raises:
        ValueError: a crop below 1, a scale that is not positive and finite, or lowest above highest.

    Source: CCNet, section 4.1 (scale 0.75..2.0, mirror; crop 769 x 769 on Cityscapes); padding as in the
        authors' code.
    """

    crop: tuple[int, int] = (769, 769)
    scale: tuple[float, float] = (0.75, 2.0)
    mirror: bool = True
    normalise: Normalise = field(default_factory=Normalise)

    def __post_init__(self) -> None:
        if len(self.crop) != 2 or min(self.crop) < 1:
            raise ValueError(f"TrainTransform: crop must be (height, width) >= 1, got {self.crop}; give pixels.")
        low, high = self.scale
        if not (0 < low <= high < float("inf")):
            raise ValueError(f"TrainTransform: scale must be 0 < low <= high, got {self.scale}; give two factors.")

    def __call__(
        self, image: np.ndarray, label: np.ndarray, generator: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One augmented sample.

        Arguments:
            image: uint8 (H, W, 3), RGB.
            label: uint8 (H, W), train ids.
            generator: gives four numbers per call (scale, top, left, mirror), whatever the settings.

        Returns:
            float32 (3, h, w) and int64 (h, w), with (h, w) = crop.

        Raises:
            ValueError: shapes or dtypes of image and label that do not belong together.
        """
        _check_pair("TrainTransform", image, label)
        low, high = self.scale
        factor = low + (high - low) * generator.random()
        height, width = (max(1, round(side * factor)) for side in label.shape)
        size = min(height, self.crop[0]), min(width, self.crop[1])
        top = int(generator.integers(height - size[0] + 1))
        left = int(generator.integers(width - size[1] + 1))
        mirrored = generator.random() < 0.5
        image, label = scaled_window(image, label, (height, width), (top, left), size)
        padded_image = torch.zeros(3, *self.crop)
        padded_label = torch.full(self.crop, IGNORE, dtype=torch.int64)
        padded_image[:, : size[0], : size[1]] = self.normalise(image)
        padded_label[: size[0], : size[1]] = torch.from_numpy(label.astype(np.int64))
        if self.mirror and mirrored:
            padded_image, padded_label = padded_image.flip(-1), padded_label.flip(-1)
        return padded_image, padded_label


@dataclass(frozen=True)
class EvaluationTransform:
    """Normalise only: the whole picture at its own size.

    Arguments:
        normalise: mean and std, the same as in training.
    """

    normalise: Normalise = field(default_factory=Normalise)

    def __call__(self, image: np.ndarray, label: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """One sample: float32 (3, H, W) and int64 (H, W) of uint8 (H, W, 3) and uint8 (H, W).

        Raises:
            ValueError: shapes or dtypes of image and label that do not belong together.
        """
        _check_pair("EvaluationTransform", image, label)
        return self.normalise(image), torch.from_numpy(label.astype(np.int64))


def _check_pair(caller: str, image: np.ndarray, label: np.ndarray) -> None:
    fits = image.ndim == 3 and image.shape[2] == 3 and image.shape[:2] == label.shape and label.size > 0
    if not fits or image.dtype != np.uint8 or label.dtype != np.uint8:
        raise ValueError(
            f"{caller}: image and label must be uint8 (H, W, 3) and uint8 (H, W), "
            f"got {image.dtype} {image.shape} and {label.dtype} {label.shape}; decode them with read_pair."
        )
