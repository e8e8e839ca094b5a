"""Training and evaluation: `train` yields step after step, `evaluate` fills a confusion matrix, nothing else.

Records, checkpoints and evaluations lie between two steps; the commands decide on them, the loop knows none.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ccgpu.models.prediction import Prediction
from ccgpu.train.distributed import sum_over_processes, world_size
from ccgpu.train.losses import Criterion
from ccgpu.train.metrics import ConfusionMatrix

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteLoss(RuntimeError):
    """The loss of the global batch became infinite or NaN; weights and checkpoints are those before it."""


class Interrupted(Exception):
    """The user or the system asked to stop while an evaluation was running."""


@dataclass(frozen=True)
class Precision:
    """What the numbers of a run are computed in.

    Attributes:
        device: where the network lives.
        amp: "off" (float32), "bf16" or "fp16" under autocast; fp16 wants a gradient scaler.
        channels_last: images in NHWC memory order; convert the network likewise.
    """

    device: torch.device
    amp: str = "off"
    channels_last: bool = False

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context of a forward pass."""
        return torch.autocast(self.device.type, dtype=AMP_DTYPES[self.amp], enabled=self.amp != "off")

    def scaler(self) -> torch.amp.GradScaler:
        """Return the gradient scaler of a run, which does nothing except for fp16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.amp == "fp16")

    def images(self, images: torch.Tensor) -> torch.Tensor:
        """Return a batch of images or clips on the device, in the memory order asked for."""
        nhwc = torch.channels_last if images.ndim == 4 else torch.channels_last_3d
        order = nhwc if self.channels_last else torch.preserve_format
        return images.to(self.device, non_blocking=True, memory_format=order)


@dataclass(frozen=True)
class Step:
    """One finished iteration: its number counted from 1, the losses of the global batch, the learning rate.

    `parts` are the unweighted parts of the loss by name; `interrupted` is true on every process where any of them was
    asked to stop.
    """

    iteration: int
    loss: float
    parts: Mapping[str, float]
    lr: float
    interrupted: bool


def poly(lr: float, iterations: int, power: float = 0.9) -> Callable[[int], float]:
    """Return the schedule i -> lr * (1 - i / iterations) ** power, i = 0 .. iterations - 1 (paper, section
    4.2).
    """
    return lambda iteration: lr * (1 - iteration / iterations) ** power


def load_batches(
    dataset: Dataset[dict[str, Any]],
    *,
    batches: Iterable[list[int]],
    workers: int,
    device: torch.device,
    again: bool = False,
) -> DataLoader[dict[str, Any]]:
    """Return a loader of `dataset` in the order of `batches` (lists of positions), the same for any number of
    workers.

    Workers are spawned, not forked: Numba's OpenMP threads kill forked children. Each computes with one
    thread. They end with the last batch, or stay where the loader is to be gone through `again`. The loader draws
    nothing from the global random state, on which exact resume depends.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        worker_init_fn=_start_worker,
        multiprocessing_context="spawn" if workers > 0 else None,
        persistent_workers=again and workers > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
    )


def _start_worker(_: int) -> None:
    # Ctrl-C reaches the whole process group; the main process decides when the workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def train(
    net: nn.Module,
    batches: Iterable[dict[str, Any]],
    optimiser: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    precision: Precision,
    schedule: Callable[[int], float],
    criterion: Criterion,
    start: int = 0,
    interrupted: Callable[[], bool] = lambda: False,
) -> Iterator[Step]:
    """Optimise `net` and yield a `Step` after each iteration, for the caller to record, save and evaluate.

    Args:
        net: images (B, 3, H, W) or clips (B, 3, T, H, W) -> what `criterion` takes; wrapped for the processes.
        batches: this process's samples of each iteration, "image" and "label"; one batch an iteration.
        optimiser: its learning rate is set in each iteration.
        scaler: from `precision.scaler()`.
        precision: device, autocast, memory order.
        schedule: iteration (counted from 0) -> learning rate.
        criterion: the loss, of the network's outputs and the label.
        start: number of the first iteration, that of a checkpoint on resume.
        interrupted: asked in each iteration; the answer of all processes together goes into the step.

    Raises:
        NonFiniteLoss: the loss of the global batch is infinite or NaN; the weights are those before this
            iteration.
    """
    for iteration, batch in enumerate(batches, start):
        net.train()
        lr = schedule(iteration)
        for group in optimiser.param_groups:
            group["lr"] = lr
        label = batch["label"].to(precision.device, non_blocking=True)
        with precision.autocast():
            outputs = net(precision.images(batch["image"]))
        loss = criterion(outputs, label)
        # One reduction and one transfer to the host an iteration: losses of the global batch, and who wants
        # to stop.
        stop = loss.total.new_tensor(float(interrupted()))
        values = torch.stack([loss.total.detach(), *loss.parts.values(), stop])
        total, *parts, stopped = (sum_over_processes(values) / world_size()).tolist()
        named = dict(zip(loss.parts, parts, strict=True))
        if not math.isfinite(total):
            raise NonFiniteLoss(
                f"train: the loss must be finite, got {total} in iteration {iteration + 1} at lr {lr:.3g} "
                f"({', '.join(f'{name} {value}' for name, value in named.items())}); try a lower --lr, --amp bf16 or "
                "off instead of fp16, or pretrained weights (--imagenet)."
            )
        optimiser.zero_grad(set_to_none=True)
        scaler.scale(loss.total).backward()
        scaler.step(optimiser)
        scaler.update()
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
    """Compute the confusion matrix of `net` over all processes' samples; each process brings its own share.

    The matrix holds integers, so it does not depend on the number of processes where the logits do not.

    Args:
        net: the network itself, not its wrapper for several processes; it is left in eval mode.
        samples: batches of one image, "image" (1, 3, H, W), "label" (1, H, W), "names"; or of one clip, with T before
            H and "first", the number of its frames that another clip counts. Shares may have different lengths.
        num_classes: number of classes of the logits.
        precision: device, autocast, memory order.
        predict: how an image becomes class scores.
        interrupted: asked before each batch.
        seen: told the name and the predicted classes (H, W) of each image or frame.

    Returns:
        The matrix summed over all processes, on the CPU.

    Raises:
        Interrupted: where `interrupted` says so.
    """
    net.eval()
    # On the device, so that the sum over processes can run over NCCL.
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
        # torch's collation turns a tuple of names a sample into a tuple of samples a name.
        for (name,), frame in zip(batch["names"][first:], classes[first:], strict=True):
            seen(name, frame)
    total = ConfusionMatrix(num_classes)
    total.matrix += sum_over_processes(confusion.matrix).cpu()
    return total
