"""`Criterion`: the training loss of the global batch, the weighted sum of its parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ccgpu.models.ccnet import Outputs
from ccgpu.train.loss.consistency import category_consistent_loss
from ccgpu.train.loss.cross_entropy import PixelLoss
from ccgpu.train.loss.dice import dice_loss
from ccgpu.train.loss.hard_pixels import ohem_label
from ccgpu.train.loss.inputs import label_at

# Weight of the auxiliary head's loss (Huang et al., TPAMI 2020, section 4.2; PSPNet uses the same).
AUXILIARY_WEIGHT = 0.4


class Loss(NamedTuple):
    """The loss and its parts, 0-d; the mean of each over the processes is its value for the global batch.

    Attributes:
        total: the loss, differentiable.
        parts: its parts by name, detached and unweighted: "main", "auxiliary" (0 without that head), with the Dice loss
            "dice", and with the category consistent loss "variance", "distance", "regularity".
    """

    total: torch.Tensor
    parts: dict[str, torch.Tensor]


class Totals(NamedTuple):
    """What the losses of a batch's pieces are divided by, so that they add up to the loss of the batch.

    Attributes:
        divisor: of the pixels' losses, `PixelLoss.divisor` of the whole batch of all processes, 0-d float64.
        pieces: the number of pieces.
    """

    divisor: torch.Tensor
    pieces: int


@dataclass(frozen=True)
class ConsistencyWeights:
    """Weights of the terms of `category_consistent_loss` in the total loss, and its arguments; defaults: the paper's.

    Attributes:
        variance: weight of the variance, 0 or more.
        distance: weight of the distance, 0 or more.
        regularity: weight of the regularity, 0 or more.
        delta_v: argument of `category_consistent_loss`.
        delta_d: argument of `category_consistent_loss`.
        form: argument of `category_consistent_loss`.
    """

    variance: float = 1.0
    distance: float = 1.0
    regularity: float = 0.001
    delta_v: float = 0.5
    delta_d: float = 1.5
    form: str = "piecewise"


@dataclass(frozen=True)
class Criterion:
    """The training loss of a network's outputs.

        total = main + auxiliary_weight * auxiliary + dice_weight * dice
                + weights.variance * variance + weights.distance * distance + weights.regularity * regularity

    main and auxiliary are the `PixelLoss` of the two heads, main of the hard pixels alone if `ohem` is set; dice is the
    `dice_loss` of the main head's logits at all labelled pixels; the last three are the `category_consistent_loss` of
    the embedding, with the label resized to its positions (`label_at`).

    The mean over the hard pixels is over their number (or weights) alone with `pixels.average` "labelled", and with
    "all" over all pixels, hard or not, as in mmsegmentation.

    Attributes:
        auxiliary_weight: weight of the auxiliary head's loss, 0 or more.
        pixels: the loss of a pixel, and what its mean is over.
        ohem: threshold and kept of `ohem_label`; None for all pixels.
        dice_weight: weight of the Dice loss, 0 or more; 0: that loss is left out.
        consistency: weights of the category consistent loss; None: that loss is left out.

    Examples:
        >>> import torch
        >>> from ccgpu.train.loss.criterion import Criterion
        >>> loss = Criterion()(torch.zeros(1, 4, 2, 2), torch.tensor([[[0, 1], [2, 255]]]))
        >>> round(loss.total.item(), 4), list(loss.parts)
        (1.3863, ['main', 'auxiliary'])
    """

    auxiliary_weight: float = AUXILIARY_WEIGHT
    pixels: PixelLoss = field(default_factory=PixelLoss)
    ohem: tuple[float, int] | None = None
    dice_weight: float = 0.0
    consistency: ConsistencyWeights | None = None

    def totals(self, label: torch.Tensor, pieces: int = 1) -> Totals:
        """Return what the losses of a batch's pieces are divided by; every process must call it.

            totals = criterion.totals(label, pieces=K)
            for each piece:
                criterion(net(its images), its label, totals).total.backward()

        adds up the gradient of the whole batch's loss, in the memory of a piece. This is exact for the pixels' losses
        with their weights, smoothing and focal factor. OHEM, with the mean over the hard pixels of `average`
        "labelled", the Dice loss and the category consistent loss are those of each piece, divided by the number of
        pieces: they need all pixels at once. OHEM keeps its share of the pixels in each piece, kept // pieces.

        Args:
            label: (B, *S) int64, this process's share of the whole batch.
            pieces: number of pieces into which each process's share is cut, 1 or more.

        Raises:
            ValueError: pieces is below 1.
        """
        if pieces < 1:
            raise ValueError(f"Criterion: pieces must be 1 or more, got {pieces}; pass the number of pieces.")
        return Totals(self.pixels.divisor(label), pieces)

    def __call__(self, outputs: torch.Tensor | Outputs, label: torch.Tensor, totals: Totals | None = None) -> Loss:
        """Return the loss of a batch, or of a piece of one: the losses of all pieces add up to that of the batch.

        Args:
            outputs: outputs of a `CCNet` in train mode, floating point, or its logits alone: logits and auxiliary
                logits (B, classes, *S), embedding (B, E, *S') of the features' size.
            label: (B, *S) int64, 0 .. classes - 1, or 255 for ignored pixels.
            totals: for a piece, `totals` of the whole batch's label; None: `label` is that of a whole batch.

        Raises:
            ValueError: the shapes do not fit each other, or `consistency` is set and there is no embedding.
        """
        logits, auxiliary, embedding = Outputs(outputs) if isinstance(outputs, torch.Tensor) else outputs
        divisor, pieces = self.totals(label) if totals is None else totals
        main = self._main(logits, label, divisor, pieces)
        total = main
        parts = {"main": main.detach(), "auxiliary": torch.zeros_like(main.detach())}
        if auxiliary is not None:
            share = self.pixels(auxiliary, label, divisor)
            total = total + self.auxiliary_weight * share
            parts["auxiliary"] = share.detach()
        if self.dice_weight > 0:
            dice = dice_loss(logits, label) / pieces
            total = total + self.dice_weight * dice
            parts["dice"] = dice.detach()
        if self.consistency is not None:
            if embedding is None:
                raise ValueError(
                    "Criterion: outputs must have an embedding for the category consistent loss, got none; build the "
                    "network with CCNet(..., embedding=16)."
                )
            weights = self.consistency
            terms = category_consistent_loss(
                embedding,
                label_at(label, tuple(embedding.shape[2:])),
                num_classes=logits.shape[1],
                delta_v=weights.delta_v,
                delta_d=weights.delta_d,
                form=weights.form,
            )
            weighted = weights.variance * terms.variance + weights.distance * terms.distance
            total = total + (weighted + weights.regularity * terms.regularity) / pieces
            parts |= {name: term.detach() / pieces for name, term in terms._asdict().items()}
        return Loss(total, parts)

    def _main(self, logits: torch.Tensor, label: torch.Tensor, divisor: torch.Tensor, pieces: int) -> torch.Tensor:
        """Return the main head's loss, with OHEM that of the hard pixels."""
        if self.ohem is None:
            return self.pixels(logits, label, divisor)
        threshold, kept = self.ohem
        hard = ohem_label(logits, label, threshold, kept // pieces)
        if self.pixels.average == "labelled":  # how many pixels are hard is not known before the forward
            divisor = self.pixels.divisor(hard) * pieces
        return self.pixels(logits, hard, divisor)
