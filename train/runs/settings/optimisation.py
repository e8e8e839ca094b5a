"""Settings of the optimisation: steps, optimiser, schedule, precision."""

from __future__ import annotations

from dataclasses import dataclass

from ccgpu.models.precision import AMP_DTYPES
from ccgpu.train.runs.flags import option
from ccgpu.train.runs.settings.limits import MOST_BATCH, MOST_ITERATIONS, MOST_SEED


@dataclass(frozen=True)
class OptimisationSettings:
    """The optimisation of a run."""

    iterations: int = option(60000, "optimiser steps", group="optimisation", kind=int, least=1, most=MOST_ITERATIONS)
    batch: int = option(8, "images or clips per step, over all processes", kind=int, least=1, most=MOST_BATCH)
    lr: float = option(1e-2, "learning rate of SGD at the start", kind=float, least=0)
    momentum: float = option(0.9, "momentum of SGD", kind=float, least=0, most=1)
    weight_decay: float = option(1e-4, "weight decay of SGD", kind=float, least=0, most=1)
    power: float = option(0.9, "power of the poly schedule", kind=float, least=0, most=100)
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
        return problems
