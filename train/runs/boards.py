"""Where a run's curves and pictures are watched: TensorBoard files, and Weights & Biases (optional, extra `wandb`)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ccgpu.models.weights import write_atomically
from ccgpu.train.distributed import is_main
from ccgpu.train.runs.outputs import check_utf8
from ccgpu.train.runs.settings.training import Settings

TENSORBOARD, WANDB, WANDB_ID = "tensorboard", "wandb", "wandb.id"  # what boards write in a run folder
PROJECT = "ccgpu"  # on Weights & Biases, unless the environment variable WANDB_PROJECT names another


class Board(Protocol):
    """What a training run asks of a board."""

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """Add numbers by name."""

    def image(self, iteration: int, name: str, image: np.ndarray) -> None:
        """Add an image, uint8 (H, W, 3)."""

    def close(self, *, finished: bool) -> None:
        """Write what is pending; `finished`: whether the run came to its end."""


class TensorBoard:
    """TensorBoard scalars and images of a run, in folder/tensorboard.

    Args:
        folder: the run folder.
        iteration: the iteration after which the run continues; TensorBoard hides later events of the former start.

    Raises:
        ValueError: TensorBoard cannot write to the folder, whose path is not in UTF-8.
    """

    def __init__(self, folder: Path, iteration: int) -> None:
        # Imported here: it costs seconds and only the process that writes needs it.
        from torch.utils.tensorboard import SummaryWriter

        check_utf8("--out", folder, "TensorBoard (--no-tensorboard writes no such files)")
        self._writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=iteration + 1)

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """Add numbers by name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)

    def image(self, iteration: int, name: str, image: np.ndarray) -> None:
        """Add an image, uint8 (H, W, 3)."""
        self._writer.add_image(name, image, iteration, dataformats="HWC")

    def close(self, *, finished: bool) -> None:
        """Write pending events and close the files."""
        self._writer.close()


class WeightsAndBiases:
    """The same scalars and images as a run of Weights & Biases, whose local files are in folder/wandb.

    The id of the run is kept in folder/wandb.id, so that a resumed training goes on in it. The curves are drawn over
    the iteration, because W&B's own step cannot go back to a checkpoint. Login, project and offline mode are the
    package's own affair: `wandb login`, WANDB_PROJECT, WANDB_MODE=offline.

    Args:
        folder: the run folder.
        iteration: the iteration after which the run continues; 0 begins another W&B run.
        settings: all settings by name, shown as the run's configuration.

    Raises:
        ValueError: the package cannot start, for example without a login.
    """

    def __init__(self, folder: Path, iteration: int, settings: Mapping[str, Any]) -> None:
        import wandb

        check_utf8("--out", folder, "Weights & Biases (--no-wandb leaves it out)")
        path = folder / WANDB_ID
        known = path.read_text(encoding="utf-8").strip() if iteration and path.exists() else None
        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=folder.resolve().name,
                dir=str(folder.resolve()),
                id=known,
                resume=None if known is None else "allow",
                config=dict(settings),
                settings=wandb.Settings(console="off"),  # the progress bar stays this process's own
            )
        except wandb.Error as error:
            raise ValueError(
                f"--wandb must be able to start Weights & Biases, got {' '.join(str(error).split())}; run `wandb "
                "login`, set WANDB_MODE=offline to send the curves later, or leave --wandb out."
            ) from error
        self._run.define_metric("*", step_metric="iteration")
        write_atomically(path, f"{self._run.id}\n")

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """Add numbers by name."""
        self._run.log({"iteration": iteration, **values})

    def image(self, iteration: int, name: str, image: np.ndarray) -> None:
        """Add an image, uint8 (H, W, 3)."""
        self._run.log({"iteration": iteration, name: self._wandb.Image(image)})

    def close(self, *, finished: bool) -> None:
        """Send what is pending; a run that came to no end is shown as failed until it is resumed."""
        self._run.finish(exit_code=0 if finished else 1)


def open_boards(folder: Path, iteration: int, settings: Settings) -> Sequence[Board]:
    """Return the boards that the settings ask for; none in all processes but the first.

    Args:
        folder: the run folder.
        iteration: the iteration after which the run continues.
        settings: the settings of the run.
    """
    if not is_main():
        return ()
    boards: list[Board] = []
    if settings.tensorboard:
        boards.append(TensorBoard(folder, iteration))
    if settings.wandb:
        boards.append(WeightsAndBiases(folder, iteration, dataclasses.asdict(settings)))
    return boards
