"""Settings of the optimisation: steps, optimiser, schedule, precision; and the schedule that follows from them."""

from __future__ import annotations

from dataclasses import dataclass

from ccgpu.models.precision import AMP_DTYPES
from ccgpu.train.optimisation.freezing import FREEZE
from ccgpu.train.optimisation.optimisers import OPTIMISERS
from ccgpu.train.optimisation.schedules import POWER, SCHEDULES, Schedule, build_schedule
from ccgpu.train.runs.flags import option
from ccgpu.train.runs.settings.limits import ADAMW_DIVERGES, MOST_BATCH, MOST_FACTOR, MOST_ITERATIONS, MOST_SEED


@dataclass(frozen=True)
class OptimisationSettings:
    """The optimisation of a run."""

    iterations: int = option(
        60000,
        "optimiser steps; N epochs are N * images / batch",
        group="optimisation",
        kind=int,
        least=1,
        most=MOST_ITERATIONS,
    )
    batch: int = option(8, "images or clips per step, over all processes", kind=int, least=1, most=MOST_BATCH)
    accumulate: int = option(
        1,
        "gradient accumulation: the batch of a step goes through the network in K pieces one after the other, in the "
        "memory of one; batch norm sees the pieces one by one, and so do --ohem, --dice and --ccl",
        kind=int,
        metavar="K",
        least=1,
        most=MOST_BATCH,
    )
    optimiser: str = option("sgd", "SGD with momentum, or AdamW", choices=OPTIMISERS)
    lr: float = option(1e-2, "learning rate from which the schedule starts (adamw: 1e-4 is usual)", kind=float, least=0)
    momentum: float = option(0.9, "momentum of SGD; beta1 of AdamW, whose beta2 is 0.999", kind=float, least=0, most=1)
    weight_decay: float = option(
        1e-4,
        "weight decay: part of the gradient in SGD, apart from it in AdamW (0.01 is usual there)",
        kind=float,
        least=0,
        most=1,
    )
    schedule: str = option(
        "poly",
        "how the learning rate falls: poly (1 - i/N)^power over N iterations; mmseg-poly (1 - i/(N - 1))^power, "
        "mmsegmentation's; cosine; constant: not at all",
        choices=SCHEDULES,
    )
    power: float = option(POWER, "power of the poly schedules", kind=float, least=0, most=100)
    min_lr: float = option(0.0, "learning rate towards which the schedule falls", kind=float, least=0)
    warmup_steps: int = option(
        0, "first steps, over which the learning rate rises evenly to the schedule's", kind=int, least=0
    )
    head_lr: float = option(
        1.0,
        "factor of the learning rate outside the backbone, such as 10 for new heads on a trained backbone",
        kind=float,
        metavar="FACTOR",
        least=0,
        most=MOST_FACTOR,
    )
    clip_gradients: float | None = option(
        None,
        "largest norm of the gradient of all weights together; a longer one is scaled to it",
        unset="any",
        kind=float,
        metavar="NORM",
        least=0,
    )
    ema: float | None = option(
        None,
        "evaluate and predict with the exponential moving average of the weights: after each step it keeps a share "
        "DECAY of itself, such as 0.999, in the first steps less",
        unset="the last step's weights",
        kind=float,
        metavar="DECAY",
        least=0,
        most=1,
    )
    freeze: str | None = option(
        None,
        "leave a part that came with weights as it is: the backbone, or the norms, that is statistics, scale and shift "
        "of the batch norms",
        unset="train all",
        choices=FREEZE,
    )
    seed: int = option(
        0, "seed of weights, order, augmentation, dropout and synthetic images", kind=int, least=0, most=MOST_SEED
    )
    amp: str = option("off", "autocast; fp16 scales the loss and needs CUDA", choices=tuple(AMP_DTYPES))
    channels_last: bool = option(False, "NHWC memory format, faster with amp on CUDA", kind=bool)
    compile: bool = option(False, "compile the network with torch.compile", kind=bool)

    def problems(self) -> list[str]:
        """Return a line for each setting of this group that cannot work."""
        problems = []
        if self.lr == 0:
            problems.append(f"--lr must be more than 0, got {self.lr}")
        if self.momentum == 1:
            problems.append(f"--momentum must be less than 1, got {self.momentum}")
        if self.clip_gradients == 0:
            problems.append(f"--clip-gradients must be more than 0, got {self.clip_gradients}")
        if self.ema in (0, 1):
            problems.append(f"--ema must be more than 0 and less than 1, got {self.ema}")
        if self.head_lr == 0:
            problems.append(f"--head-lr must be more than 0, got {self.head_lr}")
        highest = self.lr * max(self.head_lr, 1.0)
        if self.optimiser == "adamw" and highest >= ADAMW_DIVERGES:
            problems.append(
                f"{'--lr' if self.head_lr <= 1 else '--lr times --head-lr'} must be less than {ADAMW_DIVERGES} with "
                f"--optimiser adamw, which diverges at SGD's learning rates, got {highest:g}; --lr 1e-4 is usual"
            )
        if self.min_lr > self.lr:
            problems.append(f"--min-lr must be at most --lr {self.lr}, got {self.min_lr}")
        if self.schedule == "constant" and self.min_lr > 0:
            problems.append(f"--min-lr must come with a --schedule that falls, got {self.min_lr} with constant")
        if self.schedule not in ("poly", "mmseg-poly") and self.power != POWER:
            problems.append(f"--power must come with --schedule poly or mmseg-poly, got {self.schedule}")
        if self.warmup_steps > self.iterations:
            problems.append(f"--warmup-steps must be at most --iterations {self.iterations}, got {self.warmup_steps}")
        return problems

    def learning_rates(self) -> Schedule:
        """Return the learning-rate schedule that the settings ask for."""
        return build_schedule(
            self.schedule,
            self.lr,
            self.iterations,
            power=self.power,
            min_lr=self.min_lr,
            warmup_steps=self.warmup_steps,
        )
