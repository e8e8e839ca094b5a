"""`Update`: one step of the optimisation, from a batch to changed weights."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ccgpu.models.precision import Precision
from ccgpu.train.loss.criterion import Criterion, Loss
from ccgpu.train.optimisation.averaging import Average
from ccgpu.train.optimisation.optimisers import set_learning_rate
from ccgpu.train.optimisation.schedules import Schedule


@dataclass(frozen=True)
class Update:
    """One step of the optimisation: `begin`, `gradients` of a batch, and `apply`, which changes the weights.

    Attributes:
        net: images (B, C, H, W) or clips (B, C, T, H, W) -> the input of `criterion`; wrapped by `distributed.wrap`.
        optimiser: of `build_optimiser`.
        scaler: from `precision.scaler()`.
        precision: device, autocast dtype and memory format.
        schedule: iteration (counted from 0) -> learning rate.
        criterion: the loss.
        accumulate: number of pieces into which this process's share of a batch is cut. They go through the network one
            after the other, in the memory of one, and their gradients add up to the batch's. Piece k has the samples
            k, k + accumulate, ... of the batch, on any number of processes, so that batch norm sees the same pieces.
        clip: the largest norm of the gradient of all parameters together; a longer one is scaled to it. None: any.
        frozen: modules that stay in eval mode.
        average: the average of the weights; None for none.
    """

    net: nn.Module
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: Precision
    schedule: Schedule
    criterion: Criterion
    accumulate: int = 1
    clip: float | None = None
    frozen: Sequence[nn.Module] = ()
    average: Average[Any] | None = None

    def begin(self, iteration: int) -> float:
        """Prepare the network for an iteration, counted from 0, and return its learning rate."""
        self.net.train()
        for module in self.frozen:
            module.eval()
        lr = self.schedule(iteration)
        set_learning_rate(self.optimiser, lr)
        return lr

    def gradients(self, batch: Mapping[str, Any]) -> Loss:
        """Put the gradient of a batch's loss into the parameters, times the scaler's factor, and return the loss.

        Args:
            batch: this process's samples, "image" and "label"; their number is a multiple of `accumulate`.

        Returns:
            The loss of the whole batch and its parts, detached.

        Raises:
            ValueError: the number of samples is no multiple of `accumulate`.
        """
        if len(batch["image"]) % self.accumulate:
            raise ValueError(
                f"Update: batch must hold a multiple of {self.accumulate} samples, got {len(batch['image'])}; "
                "cut it into pieces of one size."
            )
        images = self.precision.images(batch["image"])
        label = batch["label"].to(self.precision.device, non_blocking=True)
        totals = self.criterion.totals(label, pieces=self.accumulate)
        self.optimiser.zero_grad(set_to_none=True)
        losses = []
        for piece in range(self.accumulate):
            own = slice(piece, None, self.accumulate)
            with self._synchronising(last=piece == self.accumulate - 1):
                with self.precision.autocast():
                    outputs = self.net(images[own])
                loss = self.criterion(outputs, label[own], totals)
                self.scaler.scale(loss.total).backward()
            losses.append(loss)
        parts = {name: torch.stack([loss.parts[name] for loss in losses]).sum() for name in losses[0].parts}
        return Loss(torch.stack([loss.total.detach() for loss in losses]).sum(), parts)

    def apply(self, iteration: int) -> None:
        """Change the weights by the gradients, and the average by the weights, in an iteration counted from 0."""
        if self.clip is not None:
            self.scaler.unscale_(self.optimiser)
            parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self._own_net(), iteration)

    def _own_net(self) -> nn.Module:
        """Return the network without its wrapper for several processes."""
        return self.net.module if isinstance(self.net, nn.parallel.DistributedDataParallel) else self.net

    def _synchronising(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Return the context of a piece: gradients are averaged over the processes with the last piece alone."""
        if last or not isinstance(self.net, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self.net.no_sync()
