"""Settings of the augmentation of training images."""

from __future__ import annotations

from dataclasses import dataclass

from ccgpu.models.prediction import LARGEST_SIDE, SCALES
from ccgpu.train.runs.flags import option
from ccgpu.train.runs.settings.limits import SMALLEST


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
        excludes="fit_crop",
    )
    fit_crop: bool = option(
        False,
        "first resize the image to the largest size that fits into the crop",
        kind=bool,
        excludes="random_short_sides",
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
    random_flip: bool = option(True, "flip half of the training images", kind=bool)

    def problems(self) -> list[str]:
        """Return a line for each setting of this group that cannot work."""
        problems = []
        if self.random_scale[0] > self.random_scale[1]:
            low, high = self.random_scale
            problems.append(f"--random-scale must be LOW HIGH with LOW <= HIGH, got {low} {high}")
        if self.fit_crop and self.random_short_sides:
            problems.append("--fit-crop and --random-short-sides exclude each other")
        return problems
