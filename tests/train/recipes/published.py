"""The published trainings that presets reproduce: what is drawn, computed and predicted in each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor

from ccgpu.train import ade20k, cityscapes, command, voc
from ccgpu.train.runs.settings.training import Settings
from tests.models.published_files import State, authors_file, mmsegmentation_file
from tests.models.published_networks import authors_network, mmsegmentation_network
from tests.train.recipes import authors, mmsegmentation
from tests.train.recipes.drawn import Crop

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Training:
    """A published training, rendered in plain NumPy and torch, and the preset that reproduces it.

    Attributes:
        module: the command.
        preset: its preset.
        steps: number of steps.
        batch: images of a step.
        weight_decay: of SGD.
        rates: number of steps -> learning rate of each.
        loss: (logits, auxiliary logits, label) -> loss.
        state: the entries of a file with random weights.
        network: (entries, images) -> both heads' logits in training; updates running statistics in the entries.
        image: height and width of an image of the dataset.
        scale: (long, short) side of the config's images; None: their own.
        draw: (label, scale, crop, generator) -> where the crop of a sample lies, and its label map.
        seen: height and width at which that image is evaluated.
        predict: (network, images of that size) -> logits.
    """

    module: ModuleType
    preset: str
    steps: int
    batch: int
    weight_decay: float
    rates: Callable[[int], list[float]]
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    state: Callable[[], State]
    network: Callable[[State, Tensor], tuple[Tensor, Tensor]]
    image: tuple[int, int]
    scale: tuple[int, int] | None
    draw: Callable[[np.ndarray, Any, tuple[int, int], np.random.Generator], tuple[Crop, np.ndarray]]
    seen: tuple[int, int]
    predict: Callable[[Network, Tensor], Tensor]

    def __str__(self) -> str:
        return f"{self.module.DATASET.name}-{self.preset}"

    def settings(self, **changes: Any) -> Settings:
        """The preset's settings, with changes."""
        return dataclasses.replace(Settings(**command.presets(self.module.DATASET)[self.preset]), **changes)


def _authors_crop(
    label: np.ndarray, scale: None, crop: tuple[int, int], generator: np.random.Generator
) -> tuple[Crop, np.ndarray]:
    """Their crop depends on the image's size alone; its label map is not needed."""
    return authors.draw((label.shape[0], label.shape[1]), crop, generator), label


_AUTHORS = Training(
    module=cityscapes,
    preset="authors",
    steps=60_000,
    batch=8,
    weight_decay=1e-4,
    rates=authors.learning_rates,
    loss=authors.loss,
    state=partial(authors_file, 50),
    network=partial(authors_network, training=True),
    image=(1024, 2048),
    scale=None,
    draw=_authors_crop,
    seen=(1024, 2048),
    predict=authors.windows,
)
_WHOLE = Training(
    module=cityscapes,
    preset="mmseg-512x1024",
    steps=40_000,
    batch=8,
    weight_decay=5e-4,
    rates=mmsegmentation.learning_rates,
    loss=mmsegmentation.loss,
    state=partial(mmsegmentation_file, 50),
    network=partial(mmsegmentation_network, align_corners=False, training=True),
    image=(1024, 2048),
    scale=(2048, 1024),
    draw=mmsegmentation.draw,
    seen=(1024, 2048),
    predict=lambda net, images: net(images),
)
TRAININGS = (
    _AUTHORS,
    _WHOLE,
    dataclasses.replace(
        _WHOLE,
        preset="mmseg-769",
        network=partial(mmsegmentation_network, align_corners=True, training=True),
        scale=(2049, 1025),
        seen=(1025, 2049),
        predict=partial(mmsegmentation.windows, window=(769, 769), stride=(513, 513)),
    ),
    dataclasses.replace(
        _WHOLE,
        module=ade20k,
        preset="mmseg-ade20k",
        steps=80_000,
        batch=16,
        image=(256, 1195),  # its longer side limits the size
        scale=(2048, 512),
        seen=(439, 2048),
    ),
    dataclasses.replace(
        _WHOLE,
        module=voc,
        preset="mmseg-voc",
        steps=20_000,
        batch=16,
        image=(375, 500),
        scale=(2048, 512),
        seen=(512, 683),
    ),
)
