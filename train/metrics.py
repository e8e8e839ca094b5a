"""Scores of a segmentation: confusion matrix -> IoU per class, mean IoU, accuracies, the results table.

The tests compare the scores with the Cityscapes evaluation (cityscapesScripts, `evalPixelLevelSemanticLabeling`) and
with the rules of the other datasets' evaluations.
"""

import math
from collections.abc import Callable, Sequence

import torch

from ccgpu.models.labels import IGNORE


class ConfusionMatrix:
    """Counts of pixels by (label, prediction), summed over all images of an evaluation.

    `matrix[i, j]` is the number of pixels of class i that were predicted as class j; pixels with the label 255 do not
    count. The matrices of parts of a dataset add up to the matrix of the whole, so `matrix` may be summed over
    processes.

    Args:
        num_classes: number of classes, 1..255.
        device: the device of `matrix`; the CPU by default. `update` takes tensors of any device.

    Raises:
        ValueError: num_classes out of range.

    Source: Cordts et al., The Cityscapes Dataset, CVPR 2016, section 4.2; its evaluation script.

    Examples:
        >>> confusion = ConfusionMatrix(2)
        >>> confusion.update(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, 255]]))
        >>> confusion.matrix.tolist()
        [[1, 1], [0, 0]]
        >>> confusion.iou().tolist()
        [0.5, 0.0]
    """

    def __init__(self, num_classes: int, *, device: torch.device | str | None = None) -> None:
        if not 1 <= num_classes <= IGNORE:
            raise ValueError(
                f"ConfusionMatrix: num_classes must be in 1..{IGNORE}, got {num_classes}; "
                f"give the number of classes without the ignored label {IGNORE}."
            )
        self.num_classes = num_classes
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: torch.Tensor, label: torch.Tensor) -> None:
        """Add the pixels of one image or batch.

        Args:
            prediction: class of each pixel, any integer dtype, any shape, values 0..num_classes-1.
            label: true class of each pixel, an integer tensor of the same shape and device, values
                0..num_classes-1 or 255 (not counted).

        Raises:
            TypeError: a tensor is not of an integer dtype.
            ValueError: shapes or devices differ, or values are out of range. Nothing is counted then.
        """
        for name, values in (("prediction", prediction), ("label", label)):
            if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
                raise TypeError(
                    f"ConfusionMatrix.update: {name} must be of an integer dtype, got {values.dtype}; "
                    "pass class numbers (logits.argmax(1))."
                )
        if prediction.shape != label.shape:
            raise ValueError(
                f"ConfusionMatrix.update: prediction must have the label's shape {tuple(label.shape)}, "
                f"got {tuple(prediction.shape)}; resize the logits to the label before argmax."
            )
        if prediction.device != label.device:
            raise ValueError(
                f"ConfusionMatrix.update: prediction must be on the label's device {label.device}, "
                f"got {prediction.device}; move one of them."
            )
        prediction, label = prediction.reshape(-1).long(), label.reshape(-1).long()
        valid = label != IGNORE
        self._check_range("prediction", prediction, "")
        self._check_range("label", label[valid], f" or {IGNORE}")
        pairs = label[valid] * self.num_classes + prediction[valid]
        counts = torch.bincount(pairs, minlength=self.num_classes**2)
        self.matrix += counts.view(self.num_classes, self.num_classes).to(self.matrix.device)

    def _check_range(self, name: str, values: torch.Tensor, also: str) -> None:
        if values.numel() == 0:
            return
        lowest, highest = (int(bound) for bound in torch.aminmax(values))
        if lowest < 0 or highest >= self.num_classes:
            raise ValueError(
                f"ConfusionMatrix.update: {name} must hold values in 0..{self.num_classes - 1}{also}, "
                f"got {lowest}..{highest}; map label ids to train ids and check the number of classes."
            )

    def iou(self) -> torch.Tensor:
        """Return each class's intersection over union, true positives / (true + false positives + false negatives).

        Returns:
            float64 (num_classes,) in 0..1 on the CPU; NaN for a class that occurs neither in a label nor in a
            prediction at a labelled pixel.
        """
        matrix = self.matrix.cpu()
        hits = matrix.diagonal()
        return hits.double() / (matrix.sum(0) + matrix.sum(1) - hits).double()

    def miou(self) -> float:
        """Return the mean of `iou()` over the classes that occur, in 0..1; NaN before a pixel is counted."""
        return self.iou().nanmean().item()

    def pixel_accuracy(self) -> float:
        """Return the share of labelled pixels that are predicted correctly, in 0..1; NaN before a pixel is counted."""
        total = int(self.matrix.sum())
        return int(self.matrix.diagonal().sum()) / total if total else math.nan

    def class_accuracy(self) -> torch.Tensor:
        """Return the share of each class's pixels that are predicted correctly.

        Returns:
            float64 (num_classes,) in 0..1 on the CPU; NaN for a class without labelled pixels.
        """
        matrix = self.matrix.cpu()
        return matrix.diagonal().double() / matrix.sum(1).double()

    def mean_accuracy(self) -> float:
        """Return the mean of `class_accuracy()` over classes with pixels, in 0..1; NaN before a pixel is counted."""
        return self.class_accuracy().nanmean().item()


def results_table(confusion: ConfusionMatrix, names: Sequence[str]) -> str:
    """Return the table of an evaluation: IoU, accuracy and share of the labelled pixels per class, then the means.

    Args:
        confusion: the evaluation's counts.
        names: one name per class, in the order of the classes.

    Returns:
        Lines of text in percent, without a final newline; "-" for the undefined score of a class that does not occur.

    Raises:
        ValueError: the number of names is not the number of classes.
    """
    if len(names) != confusion.num_classes:
        raise ValueError(
            f"results_table: names must hold {confusion.num_classes} names, one per class, got {len(names)}; "
            "pass the names of the classes that the matrix counts."
        )
    pixels = confusion.matrix.cpu().sum(1).double()
    shares = pixels / pixels.sum()
    width = max(len("pixel accuracy"), *(len(name) for name in names))
    rule = "-" * (width + 27)
    lines = [f"{'class':<{width}}{'IoU %':>9}{'acc %':>9}{'pixels %':>9}", rule]
    columns = zip(names, confusion.iou(), confusion.class_accuracy(), shares, strict=True)
    lines += [f"{name:<{width}}{_percent(a)}{_percent(b)}{_percent(c)}" for name, a, b, c in columns]
    lines += [
        rule,
        f"{'mean':<{width}}{_percent(confusion.miou())}{_percent(confusion.mean_accuracy())}",
        f"{'pixel accuracy':<{width}}{'':>9}{_percent(confusion.pixel_accuracy())}",
    ]
    return "\n".join(lines)


def _percent(share: float | torch.Tensor) -> str:
    value = float(share)
    return f"{'-':>9}" if math.isnan(value) else f"{100 * value:>9.2f}"


# Name of a score in records -> its name in texts, and the method that computes it.
SCORES: dict[str, tuple[str, Callable[[ConfusionMatrix], float]]] = {
    "miou": ("mIoU", ConfusionMatrix.miou),
    "pixel_accuracy": ("pixel accuracy", ConfusionMatrix.pixel_accuracy),
    "mean_accuracy": ("mean accuracy", ConfusionMatrix.mean_accuracy),
}


def scores_line(confusion: ConfusionMatrix, scores: Sequence[str]) -> str:
    """Return the named scores (keys of `SCORES`) as "mIoU 42.00 %, pixel accuracy 80.00 %"; "-" for NaN."""
    values = [(SCORES[name][0], SCORES[name][1](confusion)) for name in scores]
    return ", ".join(f"{name} -" if math.isnan(value) else f"{name} {100 * value:.2f} %" for name, value in values)
