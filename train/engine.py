"""Training and evaluation: `train` yields step after step, `evaluate` fills a confusion matrix, nothing else.

Records, checkpoints and evaluations lie between two steps; the commands decide on them, the loop knows none.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ccgpu.train.distributed import sum_over_processes, world_size
from ccgpu.train.losses import segmentation_loss
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
        channels_last: pictures in NHWC memory order; convert the network likewise.
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
        """Return a batch of pictures on the device, in the memory order asked for."""
        order = torch.channels_last if self.channels_last else torch.preserve_format
        return images.to(self.device, non_blocking=True, memory_format=order)


@dataclass(frozen=True)
class Step:
    """One finished iteration: its number counted from 1, the losses of the global batch, the learning rate.

    `interrupted` is true on every process where any of them was asked to stop.
    """

    iteration: int
    loss: float
    main: float
    auxiliary: float
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
) -> DataLoader[dict[str, Any]]:
    """Return a loader of `dataset` in the order of `batches` (lists of positions), the same for any number of
    workers.

    Workers are spawned, not forked: Numba's OpenMP threads kill forked children. Each computes with one
    thread. The loader draws nothing from the global random state, on which exact resume depends.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        worker_init_fn=_start_worker,
        multiprocessing_context="spawn" if workers > 0 else None,
        persistent_workers=workers > 0,
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
    auxiliary_weight: float,
    start: int = 0,
    interrupted: Callable[[], bool] = lambda: False,
) -> Iterator[Step]:
    """Optimise `net` and yield a `Step` after each iteration, for the caller to record, save and evaluate.

    Args:
        net: (B, 3, H, W) -> logits, or (logits, auxiliary logits), all (B, classes, H, W); wrapped for
            the processes.
        batches: this process's samples of each iteration, "image" and "label"; one batch an iteration.
        optimiser: its learning rate is set in each iteration.
        scaler: from `precision.scaler()`.
        precision: device, autocast, memory order.
        schedule: iteration (counted from 0) -> learning rate.
        auxiliary_weight: weight of the auxiliary head's loss.
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
        loss = segmentation_loss(outputs, label, auxiliary_weight)
        # One reduction and one transfer to the host an iteration: losses of the global batch, and who wants
        # to stop.
        stop = loss.total.new_tensor(float(interrupted()))
        parts = torch.stack([loss.total, loss.main, loss.auxiliary, stop])
        total, main, auxiliary, stopped = (sum_over_processes(parts) / world_size()).tolist()
        if not math.isfinite(total):
            raise NonFiniteLoss(
                f"train: the loss must be finite, got {total} in iteration {iteration + 1} at lr {lr:.3g} "
                f"(main {main}, auxiliary {auxiliary}); try a lower --lr, --amp bf16 or off instead of fp16, "
                "or pretrained weights (--imagenet)."
            )
        optimiser.zero_grad(set_to_none=True)
        scaler.scale(loss.total).backward()
        scaler.step(optimiser)
        scaler.update()
        yield Step(iteration + 1, total, main, auxiliary, lr, stopped > 0)


def window_starts(size: int, crop: int, stride: int) -> list[int]:
    """Return where windows of `crop` pixels start along an axis of `size`: every `stride`, the last at the
    border.

    Raises:
        ValueError: crop or stride below 1, or a stride above the crop, which would leave pixels out.
    """
    if crop < 1 or not 1 <= stride <= crop:
        raise ValueError(
            f"window_starts: stride must be in 1..crop, got stride {stride} for crop {crop}; lower the stride."
        )
    last = max(size - crop, 0)
    return [*range(0, last, stride), last]


@torch.no_grad()
def predict_logits(
    net: nn.Module,
    images: torch.Tensor,
    *,
    mode: str = "whole",
    crop: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Compute the logits of pictures of any size, from the whole picture or averaged over overlapping
    windows.

    sliding: logits[y, x] = mean over the windows that hold (y, x) of the window's logits there

    The last window of each axis lies at the border. A picture smaller than a window is padded at the bottom
    and right with 0, the mean colour after normalisation, and the logits are cut back.

    Args:
        net: in eval mode, (B, 3, h, w) -> (B, classes, h, w).
        images: (B, 3, H, W).
        mode: "whole" or "sliding"; the paper's table is sliding.
        crop: window (height, width) in pixels, for sliding; the paper's is (769, 769).
        stride: step (down, right) in pixels, 1 .. crop, for sliding; the authors' code has (513, 513).

    Returns:
        (B, classes, H, W) float32 or wider.

    Raises:
        ValueError: another mode, sliding without crop and stride, or a stride above the crop.
    """
    if mode == "whole":
        logits = net(images)
        return logits if logits.dtype == torch.float64 else logits.float()
    if mode != "sliding" or crop is None or stride is None:
        raise ValueError(
            f"predict_logits: mode must be whole, or sliding with crop and stride, got {mode!r}, {crop}, "
            f"{stride}; give all three."
        )
    height, width = images.shape[2:]
    padding = (0, max(crop[1] - width, 0), 0, max(crop[0] - height, 0))
    padded = nn.functional.pad(images, padding)
    total: torch.Tensor | None = None
    count = torch.zeros(padded.shape[2:], device=images.device)
    for top in window_starts(padded.shape[2], crop[0], stride[0]):
        for left in window_starts(padded.shape[3], crop[1], stride[1]):
            window = (..., slice(top, top + crop[0]), slice(left, left + crop[1]))
            logits = net(padded[window])
            if total is None:
                wide = torch.promote_types(logits.dtype, torch.float32)
                total = torch.zeros(*logits.shape[:2], *padded.shape[2:], dtype=wide, device=images.device)
            total[window] += logits
            count[window] += 1
    assert total is not None  # window_starts is never empty
    return (total / count)[..., :height, :width]


def evaluate(
    net: nn.Module,
    samples: Iterable[dict[str, Any]],
    *,
    num_classes: int,
    precision: Precision,
    mode: str = "whole",
    crop: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> ConfusionMatrix:
    """Compute the confusion matrix of `net` over all processes' samples; each process brings its own share.

    The matrix holds integers, so it does not depend on the number of processes where the logits do not.

    Args:
        net: the network itself, not its wrapper for several processes; it is left in eval mode.
        samples: batches of "image" (B, 3, H, W) and "label" (B, H, W); shares may have different lengths.
        num_classes: number of classes of the logits.
        precision: device, autocast, memory order.
        mode: see `predict_logits`, as `crop` and `stride`.
        crop: window size.
        stride: window step.
        interrupted: asked before each batch.

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
            raise Interrupted("evaluate: stopped between two pictures")
        with precision.autocast():
            logits = predict_logits(net, precision.images(batch["image"]), mode=mode, crop=crop, stride=stride)
        confusion.update(logits.argmax(dim=1), batch["label"].to(precision.device))
    total = ConfusionMatrix(num_classes)
    total.matrix += sum_over_processes(confusion.matrix).cpu()
    return total
