"""The loops of training and evaluation: `train` yields step after step, `evaluate` returns a confusion matrix.

Records, checkpoints and evaluations between two steps are up to the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ccgpu.models.precision import Precision
from ccgpu.models.prediction import Prediction, require_finite
from ccgpu.train.distributed import sum_over_processes, world_size
from ccgpu.train.metrics import ConfusionMatrix
from ccgpu.train.optimisation.update import Update


class NonFiniteLoss(RuntimeError):
    """The loss of the global batch became infinite or NaN; weights and checkpoints are from the step before."""


class Interrupted(Exception):
    """The user or the system asked to stop while an evaluation was running."""


@dataclass(frozen=True)
class Step:
    """One finished iteration.

    Attributes:
        iteration: its number, counted from 1.
        loss: the loss of the global batch.
        parts: the unweighted parts of that loss by name.
        lr: the schedule's learning rate.
        interrupted: whether any process was asked to stop; all processes have the same value.
    """

    iteration: int
    loss: float
    parts: Mapping[str, float]
    lr: float
    interrupted: bool


def train(
    update: Update,
    batches: Iterable[dict[str, Any]],
    *,
    start: int = 0,
    interrupted: Callable[[], bool] = lambda: False,
) -> Iterator[Step]:
    """Update a network with each batch and yield a `Step` after it, for the caller to record, save and evaluate.

    Args:
        update: the network, its optimiser and what else a step is made of.
        batches: this process's samples, "image" and "label", a batch for each iteration.
        start: number of iterations done before, in a resumed run.
        interrupted: whether to stop; called in each iteration. `Step.interrupted` is true if it is for any process.

    Raises:
        NonFiniteLoss: the loss of the global batch is infinite or NaN; the weights are from the iteration before.
    """
    for iteration, batch in enumerate(batches, start):
        lr = update.begin(iteration)
        loss = update.gradients(batch)
        # Losses and the request to stop share one reduction and one transfer to the host per iteration.
        stop = loss.total.new_tensor(float(interrupted()))
        values = torch.stack([loss.total, *loss.parts.values(), stop])
        total, *parts, stopped = (sum_over_processes(values) / world_size()).tolist()
        named = dict(zip(loss.parts, parts, strict=True))
        if not math.isfinite(total):
            raise NonFiniteLoss(
                f"train: the loss must be finite, got {total} in iteration {iteration + 1} at lr {lr:.3g} "
                f"({', '.join(f'{name} {value}' for name, value in named.items())}); try a lower --lr, --amp bf16 or "
                "off instead of fp16, --clip-gradients 1, or pretrained weights (--imagenet)."
            )
        update.apply(iteration)
        yield Step(iteration + 1, total, named, lr, stopped > 0)


@torch.no_grad()
def evaluate(
    net: nn.Module,
    samples: Iterable[dict[str, Any]],
    *,
    num_classes: int,
    precision: Precision,
    predict: Prediction,
    interrupted: Callable[[], bool] = lambda: False,
    seen: Callable[[str, torch.Tensor], None] = lambda name, classes: None,
) -> ConfusionMatrix:
    """Return the confusion matrix of `net` over the samples of all processes, each of which has its own share.

    The matrix holds integers, so its sum over processes is exact: the number of processes does not change the scores
    unless it changes the logits.

    Args:
        net: the network itself, not its wrapper for several processes; it is left in eval mode.
        samples: batches of one image, "image" (1, 3, H, W), "label" (1, H, W), "names", or of one clip, with T before
            H. The frames of a clip before number "first" are counted with another clip. Processes may have different
            numbers of samples.
        num_classes: number of classes of the logits.
        precision: device, autocast dtype and memory format.
        predict: network input -> class scores.
        interrupted: whether to stop; called before each batch.
        seen: called with the name and the predicted classes (H, W) of each image or frame.

    Returns:
        The matrix summed over all processes, on the CPU.

    Raises:
        Interrupted: `interrupted` returned true.
        NonFiniteScores: the network returned NaN or infinity; the message names the image.
    """
    net.eval()
    # On the network's device, because NCCL sums tensors of CUDA devices only.
    confusion = ConfusionMatrix(num_classes, device=precision.device)
    for batch in samples:
        if interrupted():
            raise Interrupted("evaluate: stopped between two images")
        with precision.autocast():
            scores = predict(net, precision.images(batch["image"]))
        classes, label = scores.argmax(dim=1)[0], batch["label"][0]
        if classes.ndim == 2:
            classes, label = classes[None], label[None]
        first = int(batch["first"][0])
        confusion.update(classes[first:], label[first:].to(precision.device))
        # After the update, which waits for the device anyway.
        require_finite(scores, " ".join(name for (name,) in batch["names"]))
        # torch's collation transposes names: it returns a tuple over the samples (here one) for each frame.
        for (name,), frame in zip(batch["names"][first:], classes[first:], strict=True):
            seen(name, frame)
    total = ConfusionMatrix(num_classes)
    total.matrix += sum_over_processes(confusion.matrix).cpu()
    return total
