"""Settings of the run itself: preset, records, device."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

from ccgpu.train.loaders import LOADERS
from ccgpu.train.runs.flags import DEVICES, option
from ccgpu.train.runs.settings.limits import MOST_WORKERS

PRESETS: Mapping[str, tuple[str, ...]] = {
    "demo": ("cityscapes", "ade20k", "voc", "lip", "camvid", "far_context"),
    "cpu": ("camvid",),
    "paper": ("cityscapes", "ade20k", "lip", "camvid"),
    "authors": ("cityscapes",),
    "mmseg-512x1024": ("cityscapes",),
    "mmseg-769": ("cityscapes",),
    "mmseg-ade20k": ("ade20k",),
    "mmseg-voc": ("voc",),
}
"""The presets, and our datasets that have each (`Dataset.presets`)."""


@dataclass(frozen=True)
class RunSettings:
    """Preset, records and device of a run."""

    preset: str | None = option(
        None,
        "train as others trained: as the paper, as the authors' code, as a config of mmsegmentation; or demo: a run of "
        "a few minutes on a CPU; or cpu: a training of two hours on one core",
        group="run",
        unset="the dataset's recipe",
        choices=tuple(PRESETS),
    )
    eval_every: int = option(
        5000, "steps between evaluations, 0 for one at the end", kind=int, decides="nothing", least=0
    )
    patience: int = option(
        0,
        "early stopping: end after so many evaluations in a row without a better first score, 0 for never",
        kind=int,
        metavar="N",
        decides="nothing",
        least=0,
    )
    save_every: int = option(1000, "steps between checkpoints", kind=int, decides="nothing", least=1)
    log_every: int = option(50, "steps between records of the loss", kind=int, decides="nothing", least=1)
    tensorboard: bool = option(True, "write TensorBoard files", kind=bool, decides="nothing")
    wandb: bool = option(
        False, "send curves and pictures to Weights & Biases (extra wandb)", kind=bool, decides="nothing"
    )
    device: str = option("auto", "where to run", choices=DEVICES, decides="nothing")
    workers: int = option(
        LOADERS, "loader processes for each training process", kind=int, decides="nothing", least=0, most=MOST_WORKERS
    )

    def problems(self) -> list[str]:
        """Return a line for each setting of this group that cannot work."""
        problems = []
        if self.patience > 0 and self.eval_every == 0:
            problems.append(
                f"--patience must come with evaluations during training, got {self.patience} and --eval-every 0"
            )
        if self.wandb and importlib.util.find_spec("wandb") is None:
            problems.append('--wandb needs the package wandb, which is not installed: pip install "ccgpu[wandb]"')
        return problems
