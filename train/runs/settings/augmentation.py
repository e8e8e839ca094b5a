"""Settings of the augmentation of training images, and the transform that follows from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ccgpu.models.normalisation import Normalise
from ccgpu.models.prediction import LARGEST_SIDE, SCALES
from ccgpu.train.data.transforms import TrainTransform, scale_steps
from ccgpu.train.runs.flags import option
from ccgpu.train.runs.settings.limits import SMALLEST

SMALLEST_SHARE = 0.01  # of the labelled pixels: every crop of 100 classes or fewer has a class with more


@dataclass(frozen=True)
class AugmentationSettings:
    """The augmentation of a run's training images."""

    crop: tuple[int, int] = option(
        (769, 769),
        "training crop in pixels",
        group="augmentation",
        kind=int,
        count="size",
        least=SMALLEST,
        most=LARGEST_SIDE,
    )
    random_short_sides: tuple[int, ...] = option(
        (),
        "choose the image's short side at random from these, in pixels",
        unset="the image's own",
        kind=int,
        count="*",
        metavar="N",
        least=SMALLEST,
        most=LARGEST_SIDE,
        excludes=("fit_crop",),
    )
    fit_crop: bool = option(
        False,
        "first resize the image to the largest size that fits into the crop",
        kind=bool,
        excludes=("random_short_sides",),
    )
    random_long_side: int | None = option(
        None,
        "limit of the image's long side before the random scale, in pixels",
        unset="no limit",
        kind=int,
        least=SMALLEST,
        most=LARGEST_SIDE,
    )
    random_scale: tuple[float, float] = option(
        (0.75, 2.0),
        "range of the random scale",
        kind=float,
        count=2,
        metavar=("LOW", "HIGH"),
        least=SCALES[0],
        most=SCALES[1],
    )
    random_scale_step: float = option(
        0.0,
        "choose the random scale from LOW, LOW + X, ..., HIGH; 0: from the whole range",
        kind=float,
        least=0.0,
        most=SCALES[1],
    )
    cat_max_ratio: float = option(
        1.0,
        "try up to ten crops for one in which no class has this share of the labelled pixels; 1: take any",
        kind=float,
        least=SMALLEST_SHARE,
        most=1.0,
    )
    random_rotation: float = option(
        0.0, "turn crops by a random angle of up to X degrees to either side", kind=float, least=0.0, most=180.0
    )
    random_flip: bool = option(True, "flip half of the training images", kind=bool)
    photometric: bool = option(
        False,
        "colour jitter: change brightness, contrast, saturation and hue of the crops at random (8-bit RGB)",
        kind=bool,
    )

    def problems(self) -> list[str]:
        """Return a line for each setting of this group that cannot work."""
        problems = []
        if self.random_scale[0] > self.random_scale[1]:
            low, high = self.random_scale
            problems.append(f"--random-scale must be LOW HIGH with LOW <= HIGH, got {low} {high}")
        elif self.random_scale_step > 0 and scale_steps(self.random_scale, self.random_scale_step) is None:
            low, high = self.random_scale
            problems.append(
                f"--random-scale-step must lead from {low} to {high} of --random-scale in whole steps, got "
                f"{self.random_scale_step}"
            )
        if self.fit_crop and self.random_short_sides:
            problems.append("--fit-crop and --random-short-sides exclude each other")
        return problems

    def transform(self, normalise: Normalise, exchange: np.ndarray | None = None) -> TrainTransform:
        """Return how training samples are augmented.

        Args:
            normalise: mean and std.
            exchange: class -> class of the same object in a flipped image (`Dataset.exchange`).
        """
        return TrainTransform(
            self.crop,
            self.random_scale,
            self.random_flip,
            normalise,
            random_short_sides=self.random_short_sides,
            fit_crop=self.fit_crop,
            exchange=exchange,
            random_scale_step=self.random_scale_step,
            random_long_side=self.random_long_side,
            cat_max_ratio=self.cat_max_ratio,
            random_rotation=self.random_rotation,
            photometric=self.photometric,
        )
