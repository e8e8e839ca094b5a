"""Settings of the data: which images a run is trained and evaluated on, and how their files are read."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ccgpu.models.image_files import EXIF, MAX_PIXELS
from ccgpu.models.prediction import LARGEST_SIDE
from ccgpu.train.runs.flags import option
from ccgpu.train.runs.settings.limits import MOST_FRAMES, MOST_IMAGES, SMALLEST


@dataclass(frozen=True)
class DataSettings:
    """The images of a run."""

    # An absolute path, so that the run can be continued and evaluated from any folder.
    data: str | None = option(
        None,
        "the dataset's folder",
        group="data",
        unset="synthetic images",
        kind=os.path.abspath,
        metavar="PATH",
        decides="nothing",
    )
    train_split: tuple[str, ...] = option(("train",), "splits to train on", count="+", metavar="NAME")
    val_split: tuple[str, ...] = option(("val",), "splits to evaluate on", count="+", metavar="NAME", decides="records")
    scenes: tuple[int, int] = option(
        (400, 60),
        "synthetic images for training and evaluation",
        kind=int,
        count=2,
        metavar=("TRAIN", "VAL"),
        least=1,
        most=MOST_IMAGES,
    )
    scenes_size: tuple[int, int] = option(
        (512, 1024),
        "size of synthetic images in pixels, H W",
        kind=int,
        count="size",
        least=SMALLEST,
        most=LARGEST_SIDE,
    )
    markers: int = option(
        1,
        "kinds of discs in far_context's images, each with its own square; an image has 1 to N of them",
        kind=int,
        least=1,
    )
    exif: str | None = option(
        None,
        "EXIF orientations: stored leaves pixels where they are, upright turns images",
        unset="an image that its label file does not follow is an error",
        choices=EXIF,
    )
    value_range: tuple[float, float] | None = option(
        None,
        "values that become black and white in images of more than 8 bits",
        unset="0 65535",
        kind=float,
        count=2,
        metavar=("LOW", "HIGH"),
    )
    max_pixels: int = option(
        MAX_PIXELS, "largest image that is read, in pixels", kind=int, metavar="N", decides="nothing", least=1
    )
    check: bool = option(True, "decode every image and label file before the first step", kind=bool, decides="nothing")
    clip: int = option(
        1, "frames of a clip, neighbours in a video; 1 for single images", kind=int, least=1, most=MOST_FRAMES
    )

    def problems(self) -> list[str]:
        """Return a line for each setting of this group that cannot work."""
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            low, high = self.value_range
            return [f"--value-range must be LOW HIGH with LOW < HIGH, got {low} {high}"]
        return []
