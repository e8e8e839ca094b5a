"""Settings of the evaluation, and the prediction that follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ccgpu.models.prediction import AVERAGES, LARGEST_SIDE, MODES, MULTI_SCALE, SCALES, Prediction, size_problem
from ccgpu.train.runs.flags import option
from ccgpu.train.runs.settings.limits import SMALLEST


@dataclass(frozen=True)
class EvaluationSettings:
    """How the images of a run are predicted for its evaluation."""

    mode: str = option(
        "sliding", "predict sliding windows or whole images", group="evaluation", choices=MODES, decides="records"
    )
    window: tuple[int, int] = option(
        (769, 769), "window in pixels", kind=int, count="size", least=SMALLEST, most=LARGEST_SIDE, decides="records"
    )
    stride: tuple[int, int] = option(
        (513, 513), "window step in pixels", kind=int, count="size", least=1, most=LARGEST_SIDE, decides="records"
    )
    scales: tuple[float, ...] = option(
        (1.0,),
        "scales to average over",
        kind=float,
        count="*",
        bare=MULTI_SCALE,
        metavar="S",
        decides="records",
        least=SCALES[0],
        most=SCALES[1],
    )
    flip: bool = option(False, "average with the flipped image", kind=bool, decides="records")
    average: str = option("logits", "average logits or probabilities", choices=AVERAGES, decides="records")
    short_side: int | None = option(
        None,
        "resize images to this short side, in pixels",
        unset="the image's own",
        kind=int,
        least=SMALLEST,
        most=LARGEST_SIDE,
        decides="records",
        excludes=("fit",),
    )
    long_side: int | None = option(
        None,
        "with --short-side: longest side of resized images, in pixels",
        unset="no limit",
        kind=int,
        least=SMALLEST,
        most=LARGEST_SIDE,
        decides="records",
        excludes=("fit",),
    )
    fit: tuple[int, int] | None = option(
        None,
        "resize images to the largest size that fits into H W",
        unset="the image's own size",
        kind=int,
        count="size",
        least=SMALLEST,
        most=LARGEST_SIDE,
        decides="records",
        excludes=("short_side", "long_side"),
    )
    baselines: bool = option(False, "evaluate the untrained network and 'everything is class 0' too", kind=bool)

    def problems(self) -> list[str]:
        """Return a line for each setting of this group that cannot work."""
        problems = []
        if any(step > side for step, side in zip(self.stride, self.window, strict=True)):
            problems.append(f"--stride must be at most --window {self.window}, got {self.stride}")
        if problem := size_problem(self.short_side, self.long_side, self.fit, ("--short-side", "--long-side", "--fit")):
            problems.append(problem)
        return problems

    def prediction(self, flip_pairs: Sequence[tuple[int, int]]) -> Prediction:
        """Return how images are predicted for the evaluation.

        Args:
            flip_pairs: pairs of classes that flipping an image exchanges (`Dataset.flip_pairs`).
        """
        return Prediction(
            mode=self.mode,
            window=self.window,
            stride=self.stride,
            scales=self.scales,
            flip=self.flip,
            average=self.average,
            short_side=self.short_side,
            long_side=self.long_side,
            fit=self.fit,
            flip_pairs=tuple(flip_pairs),
        )
