"""Augmentation and normalisation of training and evaluation images: pure functions of image, label map and generator.

An image is (H, W, C) of uint8, uint16 or float32, such as RGB of uint8, its label map uint8 (H, W) of train ids; a clip
of T frames is (T, H, W, C) with label maps (T, H, W). Every function transforms all frames and their label maps alike.
There is no hidden random state: the same arguments give the same result in any process.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from ccgpu.models.labels import IGNORE
from ccgpu.models.network_input import resize_pixels
from ccgpu.models.normalisation import Normalise
from ccgpu.models.stored_values import DTYPES


def scaled_window(
    image: np.ndarray,
    label: np.ndarray,
    scaled: tuple[int, int],
    start: tuple[int, int],
    size: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Return a window of the image or clip resized to `scaled`, without resizing what lies outside of the window.

    The result is the same as resizing first and cropping second: pixel (y, x) is sampled at (start + (y, x) + 1/2) *
    original / scaled - 1/2, bilinearly in the image (with Pillow's smoothing where the image is shrunk), and at the
    nearest pixel in the label map. Each channel is resized by itself; RGB of uint8 is rounded to whole values, all
    other images become float32.

    Args:
        image: (H, W, C) or (T, H, W, C) of uint8, uint16 or float32.
        label: uint8 (H, W) or (T, H, W).
        scaled: height and width after resizing.
        start: top and left of the window in the resized image.
        size: height and width of the window; it must lie inside the resized image.

    Returns:
        The image (h, w, C), uint8 or float32, and the label map uint8 (h, w), or (T, h, w, C) and (T, h, w).

    Raises:
        ValueError: image and label do not belong together, or the window leaves the resized image.
    """
    _check_pair("scaled_window", image, label)
    (height, width), (top, left), (rows, columns) = scaled, start, size
    if min(rows, columns) < 1 or min(top, left, height - top - rows, width - left - columns) < 0:
        raise ValueError(
            f"scaled_window: size must lie inside the resized image {scaled}, got {size} at {start}; cut less."
        )
    original = label.shape[-2:]
    step_y, step_x = original[0] / height, original[1] / width
    # Without min, rounding may move the far corner past the border, which Pillow refuses.
    bottom = min((top + rows) * step_y, original[0])
    right = min((left + columns) * step_x, original[1])
    box = (left * step_x, top * step_y, right, bottom)
    channels = image.shape[-1]
    windows = [resize_pixels(frame, (rows, columns), box) for frame in image.reshape(-1, *original, channels)]
    # Computed in integers, so that a centre on the border of two pixels does not depend on rounding.
    y = (2 * (top + np.arange(rows)) + 1) * original[0] // (2 * height)
    x = (2 * (left + np.arange(columns)) + 1) * original[1] // (2 * width)
    return np.stack(windows).reshape(*label.shape[:-2], rows, columns, channels), label[..., y[:, None], x]


@dataclass(frozen=True, eq=False)
class TrainTransform:
    """Augmentation of a training sample: random scale, random crop, random flip, normalisation.

    The image is resized to factor * base size. The factor is uniform in [low, high]; the base size is the image's
    own, or the one that `random_short_sides` or `fit_crop` gives, with the image's aspect ratio. The crop's corner
    is uniform over the positions inside the resized image. Where the resized image is smaller than the crop, the rest
    at the right and the bottom is 0 after normalisation (the mean colour) and has the label 255. The probability of a
    flip is 1/2. All frames of a clip share the same random numbers.

    Args:
        crop: height and width of the result, in pixels.
        random_scale: lowest and highest factor.
        random_flip: whether images are flipped at all.
        normalise: mean and std.
        random_short_sides: the shorter side of the base size in pixels is one of these, with equal probability; (): the
            image's own.
        fit_crop: whether the base size is the largest that fits into the crop.
        exchange: class -> class of the same object in a flipped image, uint8 (256,) (see `Dataset.exchange`); None:
            classes do not change.

    Raises:
        ValueError: a crop or short side is below 1; a scale is not positive and finite, or the lowest is above the
            highest; short sides come with fit; exchange is not uint8 (256,).

    Source: CCNet, section 4.1 (scale 0.75..2.0, flip; crop 769 x 769 on Cityscapes; short sides 300..600 on ADE20K);
        padding as in the authors' code.
    """

    crop: tuple[int, int] = (769, 769)
    random_scale: tuple[float, float] = (0.75, 2.0)
    random_flip: bool = True
    normalise: Normalise = field(default_factory=Normalise)
    random_short_sides: tuple[int, ...] = ()
    fit_crop: bool = False
    exchange: np.ndarray | None = None

    def __post_init__(self) -> None:
        if len(self.crop) != 2 or min(self.crop) < 1:
            raise ValueError(f"TrainTransform: crop must be (height, width) >= 1, got {self.crop}; give pixels.")
        low, high = self.random_scale
        if not (0 < low <= high < float("inf")):
            raise ValueError(
                f"TrainTransform: random_scale must be 0 < low <= high, got {self.random_scale}; give two factors."
            )
        if min(self.random_short_sides, default=1) < 1 or (self.fit_crop and self.random_short_sides):
            raise ValueError(
                f"TrainTransform: random_short_sides must be >= 1, and none with fit_crop, got "
                f"{self.random_short_sides} and fit_crop={self.fit_crop}; give pixels or choose one of the two."
            )
        if self.exchange is not None and (self.exchange.dtype != np.uint8 or self.exchange.shape != (256,)):
            raise ValueError(
                f"TrainTransform: exchange must be uint8 (256,), got {self.exchange.dtype} {self.exchange.shape}; "
                "give Dataset.exchange."
            )

    def __call__(
        self, image: np.ndarray, label: np.ndarray, generator: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the augmented image and label map.

        Args:
            image: (H, W, C) or (T, H, W, C) of uint8, uint16 or float32.
            label: uint8 (H, W) or (T, H, W), train ids.
            generator: gives four random numbers (scale, top, left, flip), whatever the settings, and before them one
                more if there are short sides.

        Returns:
            float32 (C, h, w) and int64 (h, w), or (C, T, h, w) and (T, h, w), with (h, w) = crop.

        Raises:
            ValueError: shapes or dtypes of image and label do not belong together.
        """
        _check_pair("TrainTransform", image, label)
        original = label.shape[-2:]
        base = self._base(original, generator)
        low, high = self.random_scale
        factor = low + (high - low) * generator.random()
        height, width = (max(1, round(side * base * factor)) for side in original)
        size = min(height, self.crop[0]), min(width, self.crop[1])
        top = int(generator.integers(height - size[0] + 1))
        left = int(generator.integers(width - size[1] + 1))
        flipped = generator.random() < 0.5 and self.random_flip
        image, label = scaled_window(image, label, (height, width), (top, left), size)
        if flipped and self.exchange is not None:
            label = self.exchange[label]
        frames = label.shape[:-2]
        padded_image = torch.zeros(image.shape[-1], *frames, *self.crop)
        padded_label = torch.full((*frames, *self.crop), IGNORE, dtype=torch.int64)
        padded_image[..., : size[0], : size[1]] = self.normalise(image)
        padded_label[..., : size[0], : size[1]] = torch.from_numpy(label.astype(np.int64))
        if flipped:
            padded_image, padded_label = padded_image.flip(-1), padded_label.flip(-1)
        return padded_image, padded_label

    def _base(self, original: tuple[int, ...], generator: np.random.Generator) -> float:
        """Return the ratio of the base size to the image's own size."""
        if self.random_short_sides:
            return self.random_short_sides[generator.integers(len(self.random_short_sides))] / min(original)
        if self.fit_crop:
            return min(side / own for side, own in zip(self.crop, original, strict=True))
        return 1.0


@dataclass(frozen=True)
class EvaluationTransform:
    """Normalisation of whole images or clips at their own size, without augmentation.

    Args:
        normalise: mean and std, as in training.
    """

    normalise: Normalise = field(default_factory=Normalise)

    def __call__(self, image: np.ndarray, label: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return float32 (C, H, W) and int64 (H, W) for an image (H, W, C) and uint8 (H, W), or with T before H.

        Raises:
            ValueError: shapes or dtypes of image and label do not belong together.
        """
        _check_pair("EvaluationTransform", image, label)
        return self.normalise(image), torch.from_numpy(label.astype(np.int64))


def _check_pair(caller: str, image: np.ndarray, label: np.ndarray) -> None:
    fits = image.ndim in (3, 4) and image.shape[:-1] == label.shape and image.size > 0
    if not fits or image.dtype.name not in DTYPES or label.dtype != np.uint8:
        raise ValueError(
            f"{caller}: image and label must be (H, W, C) of {', '.join(DTYPES)}, and uint8 (H, W), or with T before "
            f"H, got {image.dtype} {image.shape} and {label.dtype} {label.shape}; decode them with read_pair."
        )
