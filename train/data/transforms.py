"""Augmentation and normalisation of training and evaluation images: pure functions of image, label map and generator.

An image is (H, W, C) of uint8, uint16 or float32, such as RGB of uint8, its label map uint8 (H, W) of train ids; a clip
of T frames is (T, H, W, C) with label maps (T, H, W). Every function transforms all frames and their label maps alike.
There is no hidden random state: the same arguments give the same result in any process.
"""

import dataclasses
from dataclasses import dataclass, field

import numpy as np
import torch

from ccgpu.models.labels import IGNORE
from ccgpu.models.normalisation import Normalise
from ccgpu.models.stored_values import DTYPES
from ccgpu.train.data.augmentation.crops import TRIES, is_mixed
from ccgpu.train.data.augmentation.geometry import Window, crop_image, crop_label
from ccgpu.train.data.augmentation.photometric import Distortion, distort, draw_distortion

_ROUNDING = 1e-6  # of a quotient of two floats that is a whole number


@dataclass(frozen=True)
class Parameters:
    """What is done to a training sample.

    Attributes:
        factor: the random factor of the base size.
        window: where the crop lies in the resized image, and by how much it is turned.
        tries: number of crops that were drawn; the last one is taken.
        flipped: whether the crop is flipped along its width, last of all.
        distortion: of its colours; None: none.
    """

    factor: float
    window: Window
    tries: int
    flipped: bool
    distortion: Distortion | None


def scale_steps(random_scale: tuple[float, float], step: float) -> int | None:
    """Return the number of steps from the lowest to the highest factor, or None if it is not a whole number."""
    steps = (random_scale[1] - random_scale[0]) / step
    return round(steps) if abs(steps - round(steps)) < _ROUNDING else None


@dataclass(frozen=True, eq=False)
class TrainTransform:
    """Augmentation of a training sample: random scale, crop, rotation, flip and colours, then normalisation.

    The image is resized to factor * base size. The factor is uniform in [low, high], or one of low, low + step, ...,
    high with equal probability; the base size is the image's own, or the one that `random_short_sides` or `fit_crop`
    gives, with the image's aspect ratio and at most `random_long_side` long. The crop's corner is uniform over the
    positions inside the resized image. With `cat_max_ratio`, ten crops are looked at; the first one in which more than
    one class occurs and each in less than this share of the labelled pixels is taken, or else the eleventh as it is.
    The crop is turned about the centre of the image's part in it, by an angle uniform in [-random_rotation,
    random_rotation]: its corners show what lies there in the resized image. Where the crop leaves the resized image, it
    is 0 after normalisation (the mean colour) and has the label 255; where a resized image smaller than the crop is not
    turned, that is the rest at the right and the bottom. The probability of a flip is 1/2. The colours are distorted as
    `draw_distortion` says. All frames of a clip share the same random numbers.

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
        random_scale_step: the step from one factor to the next; 0: all factors of the range.
        random_long_side: the longer side of the base size is at most this, in pixels; None: of any length.
        cat_max_ratio: the share of the labelled pixels of a crop that no class may reach, above 0; 1: any crop is
            taken.
        random_rotation: largest angle in degrees, 0 to 180; 0: crops are not turned.
        photometric: whether the colours are distorted, for images of 8-bit RGB alone.

    Raises:
        ValueError: a crop or side is below 1; a scale is not positive and finite, or the lowest is above the highest;
            the step does not lead from the lowest to the highest; short sides come with fit; exchange is not uint8
            (256,); cat_max_ratio or random_rotation is out of its range.

    Source: CCNet, section 4.1 (scale 0.75..2.0, flip; crop 769 x 769 on Cityscapes; short sides 300..600 on ADE20K);
        padding and the step 0.1 from 0.7 to 2.1 as in the authors' code; cat_max_ratio, random_long_side and
        photometric as RandomCrop, RandomResize and PhotoMetricDistortion of mmsegmentation.
    """

    crop: tuple[int, int] = (769, 769)
    random_scale: tuple[float, float] = (0.75, 2.0)
    random_flip: bool = True
    normalise: Normalise = field(default_factory=Normalise)
    random_short_sides: tuple[int, ...] = ()
    fit_crop: bool = False
    exchange: np.ndarray | None = None
    random_scale_step: float = 0.0
    random_long_side: int | None = None
    cat_max_ratio: float = 1.0
    random_rotation: float = 0.0
    photometric: bool = False

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
        step, side = self.random_scale_step, self.random_long_side
        if not 0 <= step < float("inf") or (step and scale_steps(self.random_scale, step) is None):
            raise ValueError(
                f"TrainTransform: random_scale_step must be 0, or lead from {low} to {high} in whole steps, got {step};"
                " change the step or random_scale."
            )
        if side is not None and side < 1:
            raise ValueError(f"TrainTransform: random_long_side must be >= 1, got {side}; give pixels or None.")
        if not 0 < self.cat_max_ratio <= 1:
            raise ValueError(
                f"TrainTransform: cat_max_ratio must be above 0 and at most 1, got {self.cat_max_ratio}; give a share."
            )
        if not 0 <= self.random_rotation <= 180:
            raise ValueError(
                f"TrainTransform: random_rotation must be from 0 to 180, got {self.random_rotation}; give degrees."
            )

    def __call__(
        self, image: np.ndarray, label: np.ndarray, generator: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the augmented image and label map.

        Args:
            image: (H, W, C) or (T, H, W, C) of uint8, uint16 or float32.
            label: uint8 (H, W) or (T, H, W), train ids.
            generator: gives the random numbers, as for `draw`.

        Returns:
            float32 (C, h, w) and int64 (h, w), or (C, T, h, w) and (T, h, w), with (h, w) = crop.

        Raises:
            ValueError: shapes or dtypes of image and label do not belong together, or colours are distorted and the
                image is not 8-bit RGB.
        """
        _check_pair("TrainTransform", image, label)
        return self.apply(image, label, self.draw(label, generator))

    def draw(self, label: np.ndarray, generator: np.random.Generator) -> Parameters:
        """Return what is done to a sample.

        Args:
            label: uint8 (H, W) or (T, H, W), train ids; its values matter for cat_max_ratio alone.
            generator: gives four random numbers (scale, top, left, flip), whatever the settings, and before them one
                more if there are short sides; after them one more for a rotation, nine for the colours, and two for
                each further crop that is tried. So a setting changes none of the numbers of those before it.
        """
        original = label.shape[-2:]
        base = self._base(original, generator)
        factor = self._factor(generator.random())
        height, width = (max(1, round(side * base * factor)) for side in original)
        window = _move(Window((height, width), self.crop), generator)
        flipped = generator.random() < 0.5 and self.random_flip
        if self.random_rotation:
            window = dataclasses.replace(window, angle=generator.uniform(-self.random_rotation, self.random_rotation))
        distortion = draw_distortion(generator) if self.photometric else None
        tries = 1
        if self.cat_max_ratio < 1:
            while tries <= TRIES and not is_mixed(crop_label(label, window), self.cat_max_ratio):
                window, tries = _move(window, generator), tries + 1
        return Parameters(factor, window, tries, flipped, distortion)

    def apply(self, image: np.ndarray, label: np.ndarray, parameters: Parameters) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the image and label map of a call whose random numbers gave these parameters."""
        pixels, inside = crop_image(image, parameters.window)
        classes = crop_label(label, parameters.window)
        if parameters.distortion is not None:
            pixels = distort(pixels, parameters.distortion)
        if parameters.flipped and self.exchange is not None:
            classes = np.where(inside, self.exchange[classes], np.uint8(IGNORE))
        values, target = self.normalise(pixels), torch.from_numpy(classes.astype(np.int64))
        if not inside.all():
            values[..., torch.from_numpy(~inside)] = 0
        return (values.flip(-1), target.flip(-1)) if parameters.flipped else (values, target)

    def _base(self, original: tuple[int, ...], generator: np.random.Generator) -> float:
        """Return the ratio of the base size to the image's own size."""
        base = 1.0
        if self.random_short_sides:
            base = self.random_short_sides[generator.integers(len(self.random_short_sides))] / min(original)
        elif self.fit_crop:
            base = min(side / own for side, own in zip(self.crop, original, strict=True))
        return base if self.random_long_side is None else min(base, self.random_long_side / max(original))

    def _factor(self, number: float) -> float:
        """Return the random factor that belongs to a random number in [0, 1)."""
        low, high = self.random_scale
        if not self.random_scale_step:
            return low + (high - low) * number
        steps = scale_steps(self.random_scale, self.random_scale_step)
        assert steps is not None  # __post_init__ refuses it
        chosen = int(number * (steps + 1))
        return high if chosen == steps else low + chosen * self.random_scale_step


def _move(window: Window, generator: np.random.Generator) -> Window:
    """Return a window with a random corner, uniform over the positions inside the resized image."""
    rows, columns = (whole - part + 1 for whole, part in zip(window.scaled, window.size, strict=True))
    return dataclasses.replace(window, start=(int(generator.integers(rows)), int(generator.integers(columns))))


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
