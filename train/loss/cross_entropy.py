"""The loss of the pixels: cross-entropy, with class weights, smoothed labels or the focal factor, and its mean."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ccgpu.models.labels import IGNORE
from ccgpu.train.distributed import sum_over_processes, world_size
from ccgpu.train.loss.inputs import check_shapes, precise

# What the sum over the pixels is divided by: the labelled pixels, or all of them.
AVERAGES = ("labelled", "all")


@dataclass(frozen=True)
class PixelLoss:
    """The mean of a loss over the pixels of the global batch: cross-entropy in one of its forms.

        share   = world_size / divisor * sum over own labelled pixels of loss
        loss    = w_y ce                                  ce = -log p_y, p = softmax(logits), y the pixel's class
                  (1 - e) w_y ce - e / K sum_c w_c log p_c      with label smoothing e, as torch defines it
                  w_y (1 - p_y)^focal ce                        with focal
        divisor = sum over the labelled pixels of all processes of w_y, with average "all" plus the number of ignored
                  pixels

    Without class weights all w are 1, so that the divisor is the number of labelled pixels, or with "all" that of all
    pixels. With class weights and "labelled" the loss is the weighted mean that `torch.nn.CrossEntropyLoss` computes.
    A divisor of 0 (no labelled pixel, or only such of classes of weight 0) makes loss and gradients 0.

    `DistributedDataParallel` averages gradients over processes; with the factor world_size the average is the gradient
    of the mean over the global batch, whatever the share of ignored pixels in each process.

    "all" is mmsegmentation's mean where `avg_non_ignore` is off. With class weights its versions differ: 0.x divides by
    the number of pixels, 1.x by the sum of all pixels' weights, and fails on ignored pixels, which have none. Here an
    ignored pixel counts 1, which agrees with 1.x wherever that computes a loss.

    Attributes:
        class_weights: a weight for each class, 0 or more, finite, one of them above 0; None: all 1.
        label_smoothing: e, 0 or more and below 1: the share of the target that is spread over all K classes.
        focal: exponent of the focal loss, 0 or more, 2 in its paper; None: cross-entropy. Weights are its alpha.
        average: "labelled" or "all".

    Raises:
        ValueError: an argument is out of its range, or focal is combined with label smoothing.

    Source: label smoothing: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016; focal
    loss: Lin et al., "Focal Loss for Dense Object Detection", 2017.

    Examples:
        >>> import torch
        >>> from ccgpu.train.loss.cross_entropy import PixelLoss
        >>> label = torch.tensor([[[0, 1], [2, 255]]])
        >>> round(PixelLoss(class_weights=(1.0, 5.0, 2.0))(torch.zeros(1, 3, 2, 2), label).item(), 4)
        1.0986
        >>> round(PixelLoss(average="all")(torch.zeros(1, 3, 2, 2), label).item(), 4)
        0.824
    """

    class_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    focal: float | None = None
    average: str = "labelled"

    def __post_init__(self) -> None:
        weights = self.class_weights
        if weights is not None and not (all(0 <= weight < math.inf for weight in weights) and any(weights)):
            raise ValueError(
                f"PixelLoss: class_weights must be finite numbers of 0 or more, not all 0, got {weights}; pass one for "
                "each class."
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"PixelLoss: label_smoothing must be 0 or more and below 1, got {self.label_smoothing}; 0.1 is usual."
            )
        if self.focal is not None and not 0 <= self.focal < math.inf:
            raise ValueError(f"PixelLoss: focal must be an exponent of 0 or more, got {self.focal}; 2 is usual.")
        if self.focal is not None and self.label_smoothing:
            raise ValueError(
                f"PixelLoss: label_smoothing must be 0 with focal, got {self.label_smoothing}; choose one of the two."
            )
        if self.average not in AVERAGES:
            raise ValueError(f"PixelLoss: average must be one of {AVERAGES}, got {self.average!r}; pass one of these.")

    def __call__(self, logits: torch.Tensor, label: torch.Tensor, divisor: torch.Tensor | None = None) -> torch.Tensor:
        """Return this process's share of the loss of the global batch, 0-d.

        Args:
            logits: (B, classes, *S), floating point; computed in float32 at least.
            label: (B, *S) int64, 0 .. classes - 1, or 255 for ignored pixels.
            divisor: of a batch of which `label` is a part, from `divisor`; None: that of `label`.

        Returns:
            0-d tensor; the mean of the shares over the processes is the loss of the global batch.

        Raises:
            ValueError: the shapes do not fit each other, or there are not as many weights as classes.
        """
        check_shapes("PixelLoss", logits, label)
        if self.class_weights is not None and len(self.class_weights) != logits.shape[1]:
            raise ValueError(
                f"PixelLoss: class_weights must be a weight for each of the {logits.shape[1]} classes of logits, got "
                f"{len(self.class_weights)}; pass {logits.shape[1]}."
            )
        scores = precise(logits)
        if self.focal is None:
            weights = None if self.class_weights is None else scores.new_tensor(self.class_weights)
            total = F.cross_entropy(
                scores, label, weights, ignore_index=IGNORE, reduction="sum", label_smoothing=self.label_smoothing
            )
        else:
            entropy = F.cross_entropy(scores, label, ignore_index=IGNORE, reduction="none")
            # 1 - p_y; kept above 0, where the derivative of a power below 1 is infinite.
            doubt = -torch.expm1(-entropy).clamp(max=-torch.finfo(entropy.dtype).tiny)
            total = (self._of_pixels(label, scores.dtype) * doubt**self.focal * entropy).sum()
        divisor = self.divisor(label) if divisor is None else divisor
        return total * torch.where(divisor > 0, world_size() / divisor, 0).to(total.dtype)

    @torch.no_grad()
    def divisor(self, label: torch.Tensor) -> torch.Tensor:
        """Return what the sum of the pixels' losses over all processes is divided by, 0-d float64.

        Every process must call it.

        Args:
            label: (B, *S) int64, this process's labels.
        """
        labelled = (label != IGNORE).sum()
        own = labelled.double() if self.class_weights is None else self._of_pixels(label, torch.float64).sum()
        return sum_over_processes(own + (label.numel() - labelled) if self.average == "all" else own)

    def _of_pixels(self, label: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight of each pixel, that of its class, (B, *S); 0 for ignored pixels."""
        if self.class_weights is None:
            return (label != IGNORE).to(dtype)
        weights = torch.tensor((*self.class_weights, 0.0), dtype=dtype, device=label.device)
        return weights[label.masked_fill(label == IGNORE, len(self.class_weights))]
