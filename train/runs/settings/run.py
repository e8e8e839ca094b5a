"""Settings of the run itself: preset, records, device."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from ccgpu.train.loaders import LOADERS
from ccgpu.train.runs.flags import DEVICES, option
from ccgpu.train.runs.settings.limits import MOST_WORKERS

# The presets of all datasets (`Dataset.presets`); a dataset has some of them.
PRESETS = ("demo",)


@dataclass(frozen=True)
class RunSettings:
    """Preset, records and device of a run."""

    preset: str | None = option(
        None,
        "demo: a run of a few minutes on a CPU",
        group="run",
        unset="the dataset's recipe",
        choices=PRESETS,
    )
    eval_every: int = option(
        5000, "steps between evaluations, 0 for one at the end", kind=int, decides="nothing", least=0
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
        if self.wandb and importlib.util.find_spec("wandb") is None:
            return ['--wandb needs the package wandb, which is not installed: pip install "ccgpu[wandb]"']
        return []
