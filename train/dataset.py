"""What a training command knows of its dataset: each command file defines one `Dataset`, which `command.py` runs."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ccgpu.models.labels import Labels
from ccgpu.train.data.pairs import Pair
from ccgpu.train.metrics import SCORES

DEMO: Mapping[str, Any] = {
    "scenes": (160, 24),
    "backbone": "resnet18",
    "head_channels": 64,
    "iterations": 360,
    "batch": 4,
    "crop": (97, 129),
    "lr": 0.04,
    "channels_last": True,
    "baselines": True,
    "eval_every": 0,
    "save_every": 120,
    "log_every": 10,
    "workers": 0,
}
"""Settings that the demos share: about 4 minutes on two CPU cores (AVX-512), measured with those of Cityscapes."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset: classes, files, recipe.

    Attributes:
        name: such as "camvid"; the command is `python -m train.camvid`.
        labels: the classes.
        layout: the folders and files in one line, for the help of `--data`.
        find_pairs: (root, split, labelled) -> the images of a split, sorted; with labelled=False label files are not
            looked for and each `Pair.label` is None.
        recipe: defaults of the settings by name.
        source: where the recipe is from, a sentence for the help.
        scores: the official scores, the headline first, out of "miou", "pixel_accuracy", "mean_accuracy".
        write_synthetic: (root, number of images of each split, (height, width), seed) -> root, which then holds
            a synthetic dataset in this layout, written atomically; None: the command needs --data.
        demo: settings of the preset "demo" by name.
        frame_of: name of an image -> its video and frame number; None where images are no frames.
        flip_pairs: pairs of classes (train ids) that a flipped image exchanges, such as left and right arm.

    Raises:
        ValueError: no scores or unknown ones, a train id in `flip_pairs` that is no class or comes twice.
    """

    name: str
    labels: Labels
    layout: str
    find_pairs: Callable[[Path, str, bool], list[Pair]]
    recipe: Mapping[str, Any]
    source: str
    scores: tuple[str, ...]
    write_synthetic: Callable[[Path, Mapping[str, int], tuple[int, int], int], Path] | None = None
    demo: Mapping[str, Any] = field(default_factory=dict)
    frame_of: Callable[[str], tuple[str, int]] | None = None
    flip_pairs: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.scores or not set(self.scores) <= set(SCORES):
            raise ValueError(
                f"Dataset: scores must be one or more of {tuple(SCORES)}, got {self.scores}; correct them."
            )
        classes = [train_id for pair in self.flip_pairs for train_id in pair]
        if len(set(classes)) != len(classes) or not set(classes) <= {*range(self.labels.num_classes)}:
            raise ValueError(
                f"Dataset: flip_pairs must be pairs of different train ids in 0..{self.labels.num_classes - 1}, "
                f"got {self.flip_pairs}; name each class once."
            )

    @property
    def exchange(self) -> np.ndarray:
        """Train id -> train id of the same thing in a flipped image, uint8 (256,), its own inverse.

        `exchange[label]` are the classes of a flipped label map, `logits[:, exchange[:K].tolist()]` the flipped logits
        (B, K, H, W). (Without `tolist` torch takes uint8 for a mask.)
        """
        table = np.arange(256, dtype=np.uint8)
        for left, right in self.flip_pairs:
            table[[left, right]] = right, left
        return table


def find_dataset(name: str, num_classes: int | None = None) -> Dataset:
    """Return the DATASET of a module: of ccgpu.train.NAME, or else of the module NAME on Python's path.

    Args:
        name: the value of --dataset, or the dataset that a run was trained on.
        num_classes: number of classes of the network that the dataset is for; None: any.

    Raises:
        ValueError: no such module, one without a `Dataset` of that name, or another number of classes.
    """
    own = f"ccgpu.train.{name}"
    try:
        module = importlib.import_module(own if name.isidentifier() and importlib.util.find_spec(own) else name)
    except (ImportError, TypeError, ValueError) as error:  # "" and ".x", which cannot be names, raise the last two
        raise ValueError(
            f"--dataset must be a module that can be imported, got {name!r} ({error}); name the module of the dataset "
            "that the checkpoint was trained on."
        ) from error
    found = getattr(module, "DATASET", None)
    if not isinstance(found, Dataset):
        raise ValueError(f"--dataset must be a module with a DATASET, got {module.__name__!r}; name another.")
    if num_classes is not None:
        check_classes(found.labels, num_classes, found.name)
    return found


def check_classes(labels: Labels, num_classes: int, source: str) -> None:
    """Refuse the classes of a source where a network has another number of them.

    Raises:
        ValueError: the numbers differ.
    """
    if labels.num_classes != num_classes:
        raise ValueError(
            f"--dataset must have the network's {num_classes} classes, got {source} with {labels.num_classes}; name "
            "another."
        )
