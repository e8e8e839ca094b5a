"""Settings of the loss, and the loss that follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ccgpu.train.data.class_weights import MEDIAN_FREQUENCY
from ccgpu.train.loss.consistency import FORMS
from ccgpu.train.loss.criterion import AUXILIARY_WEIGHT, ConsistencyWeights, Criterion
from ccgpu.train.loss.cross_entropy import AVERAGES, PixelLoss
from ccgpu.train.runs.flags import option
from ccgpu.train.runs.settings.limits import MOST_KEPT


@dataclass(frozen=True)
class LossSettings:
    """The loss of a run."""

    auxiliary_weight: float = option(
        AUXILIARY_WEIGHT,
        "weight of the auxiliary loss; 0: the network has no auxiliary head",
        group="loss",
        kind=float,
        least=0,
    )
    class_weights: tuple[str, ...] = option(
        (),
        "weights of the classes in the loss of the pixels, in the dataset's order, or the word "
        f"{MEDIAN_FREQUENCY}: from their pixels in the training label files, rare classes weigh more",
        unset="all 1",
        count="+",
        metavar="W",
    )
    label_smoothing: float = option(
        0.0, "share of the target that is spread over all classes, from 0 to below 1", kind=float, least=0
    )
    focal: float | None = option(
        None,
        "focal loss: the cross-entropy of a pixel times (1 - p) to the power GAMMA, p being its class's probability "
        "(2 is usual)",
        unset="cross-entropy",
        kind=float,
        metavar="GAMMA",
        least=0,
        excludes=("ohem",),
    )
    loss_average: str = option(
        "labelled",
        "what the sum over the pixels is divided by: the number (with class weights, the weights) of the labelled "
        "pixels, or of all, ignored ones included, as in mmsegmentation",
        choices=AVERAGES,
    )
    dice: float = option(0.0, "weight of the soft Dice loss of the main head", kind=float, metavar="W", least=0)
    ohem: tuple[float, float] | None = option(
        None,
        "train the main head on hard pixels alone: those whose class has a probability of at most THRESHOLD, and at "
        "least KEPT per step (authors: 0.7 400000, which is 100000 in each of four processes)",
        unset="all pixels",
        kind=float,
        count=2,
        metavar=("THRESHOLD", "KEPT"),
        least=0,
        excludes=("focal",),
    )
    ccl: bool = option(False, "add the category consistent loss", kind=bool)
    ccl_weights: tuple[float, float, float] = option(
        (1.0, 1.0, 0.001),
        "weights of the category consistent loss's terms",
        kind=float,
        count=3,
        metavar=("VARIANCE", "DISTANCE", "REGULARITY"),
        least=0,
    )
    ccl_margins: tuple[float, float] = option(
        (0.5, 1.5),
        "margins delta_v, delta_d of the category consistent loss",
        kind=float,
        count=2,
        metavar=("V", "D"),
        least=0,
    )
    ccl_form: str = option(
        "piecewise", "phi of the category consistent loss for distances above delta_d", choices=FORMS
    )

    def problems(self) -> list[str]:
        """Return a line for each setting of this group that cannot work."""
        problems = []
        weights = self.given_weights
        if self.class_weights and not self.counts_classes and not _are_weights(weights):
            problems.append(
                f"--class-weights must be numbers of 0 or more, above 0 for two classes or more, or "
                f"{MEDIAN_FREQUENCY}, got {' '.join(self.class_weights)}"
            )
        if self.ohem is not None:
            threshold, kept = self.ohem
            if not (0 < threshold <= 1 and kept <= MOST_KEPT and float(kept).is_integer()):
                problems.append(
                    f"--ohem must be a probability and a number of pixels up to {MOST_KEPT}, got {threshold} {kept}"
                )
        if self.label_smoothing >= 1:
            problems.append(f"--label-smoothing must be below 1, got {self.label_smoothing}")
        if self.focal is not None and self.label_smoothing > 0:
            problems.append(f"--label-smoothing must be 0 with --focal, got {self.label_smoothing}")
        if self.focal is not None and self.ohem is not None:
            problems.append(
                "--focal must come without --ohem, got both: each of them turns the loss to the hard pixels"
            )
        usual = LossSettings()
        if not self.ccl:
            problems += [
                f"--{name.replace('_', '-')} must come with --ccl, got it without"
                for name in ("ccl_weights", "ccl_margins", "ccl_form")
                if getattr(self, name) != getattr(usual, name)
            ]
        if self.ccl_margins[0] > self.ccl_margins[1]:
            problems.append(f"--ccl-margins must be V D with V <= D, got {self.ccl_margins[0]} {self.ccl_margins[1]}")
        return problems

    @property
    def counts_classes(self) -> bool:
        """Whether the weights of the classes follow from the training label files."""
        return self.class_weights == (MEDIAN_FREQUENCY,)

    @property
    def given_weights(self) -> tuple[float, ...] | None:
        """The weights of the classes as numbers; None where --class-weights gives none."""
        try:
            return tuple(map(float, self.class_weights)) or None
        except ValueError:  # words
            return None

    def criterion(self, class_weights: tuple[float, ...] | None) -> Criterion:
        """Return the loss that the settings ask for, with the weights of `choose_class_weights`."""
        return Criterion(
            auxiliary_weight=self.auxiliary_weight,
            pixels=PixelLoss(class_weights, self.label_smoothing, self.focal, self.loss_average),
            ohem=None if self.ohem is None else (self.ohem[0], int(self.ohem[1])),
            dice_weight=self.dice,
            consistency=ConsistencyWeights(*self.ccl_weights, *self.ccl_margins, self.ccl_form) if self.ccl else None,
        )


def _are_weights(weights: tuple[float, ...] | None) -> bool:
    """Return whether these can weigh classes; any network reaches loss 0 on the pixels of a single class."""
    return (
        weights is not None
        and all(0 <= weight < math.inf for weight in weights)
        and sum(weight > 0 for weight in weights) > 1
    )
