"""`Dataset`: classes, files and recipe of a dataset; each command file defines one, and `command.py` trains on it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ccgpu.models.image_format import ImageFormat
from ccgpu.models.labels import Labels
from ccgpu.train.data.checking import File
from ccgpu.train.data.facts import Facts
from ccgpu.train.data.pairs import Pair
from ccgpu.train.metrics import SCORES


@dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset: classes, files, recipe.

    Attributes:
        name: such as "camvid"; the command is `ccgpu train camvid`.
        labels: the classes.
        layout: the folders and files in one line, for the help of `--data`.
        find_pairs: (root, split, labelled) -> the images of a split, sorted; with labelled=False label files are not
            looked for and each `Pair.label` is None.
        recipe: defaults of the settings by name.
        source: a sentence for the help that says where the recipe comes from.
        scores: the official scores, the headline first, out of "miou", "pixel_accuracy", "mean_accuracy".
        write_synthetic: (root, number of images of each split, (height, width), seed) -> root, which then holds
            a synthetic dataset in this layout, written atomically; None: the command needs --data.
        presets: the settings of each value of `--preset`, by name, as far as they differ from the recipe's: "demo" is a
            short run on synthetic images.
        frame_of: name of an image -> its video and frame number; None where images are not frames of videos.
        flip_pairs: pairs of classes (train ids) that swap when an image is flipped, such as left and right arm.
        images: how the images are read: as 8-bit RGB, or with all channels and values as stored.
        markers: largest value of `--markers`, the kinds of objects in synthetic images; 1: they have no kinds.
        for_settings: settings of a run -> the dataset whose synthetic images they describe; None: their number and size
            are all that can be chosen.
        mean, std: normalisation, one number for each channel in units of the stored values; None, for 8-bit RGB alone:
            the backbone's.

    Raises:
        ValueError: there are no scores or unknown ones, a train id in `flip_pairs` is no class or occurs twice, or mean
            and std are not one finite number for each channel of `images`, with a positive std.
    """

    name: str
    labels: Labels
    layout: str
    find_pairs: Callable[[Path, str, bool], list[Pair]]
    recipe: Mapping[str, Any]
    source: str
    scores: tuple[str, ...]
    write_synthetic: Callable[[Path, Mapping[str, int], tuple[int, int], int], Path] | None = None
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    frame_of: Callable[[str], tuple[str, int]] | None = None
    flip_pairs: tuple[tuple[int, int], ...] = ()
    images: ImageFormat = field(default_factory=ImageFormat)
    markers: int = 1
    for_settings: Callable[[Any], Dataset] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

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
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is None and not self.images.raw:
                continue
            if (
                values is None
                or len(values) != self.images.channels
                or not np.isfinite(values).all()
                or (name == "std" and min(values) <= 0)
            ):
                raise ValueError(
                    f"Dataset: {name} must be {self.images.channels} finite numbers{', positive' * (name == 'std')}, "
                    f"for images of {self.images}, got {values}; give one for each channel, in units of the stored "
                    "values."
                )

    @property
    def exchange(self) -> np.ndarray:
        """Train id -> train id of the same object in a flipped image, uint8 (256,), its own inverse.

        After flipping, `exchange[label]` corrects the classes of a label map, `logits[:, exchange[:K].tolist()]` the
        channels of logits (B, K, H, W). (Without `tolist` torch would use the uint8 values as a mask.)
        """
        table = np.arange(256, dtype=np.uint8)
        for left, right in self.flip_pairs:
            table[[left, right]] = right, left
        return table


@dataclass(frozen=True, eq=False)
class Opened:
    """A dataset as a run uses it, and what was found out when it was opened.

    Attributes:
        dataset: the dataset.
        folder: for a folder of images and masks what it was taken for, plain values to be saved with the run; None for
            other datasets.
        report: the same as text; empty for other datasets.
        facts: what files are that were decoded already; in the first of several processes alone.
    """

    dataset: Dataset
    folder: Mapping[str, Any] | None = None
    report: str = ""
    facts: Mapping[File, Facts] = field(default_factory=dict)


def find_dataset(name: str, num_classes: int | None = None) -> Dataset:
    """Return the DATASET of a module: of ccgpu.train.NAME, or else of the module NAME on Python's path.

    Args:
        name: the value of --dataset, or the dataset that a run was trained on.
        num_classes: number of classes of the network that the dataset is for; None: any.

    Raises:
        ValueError: there is no such module, it has no `DATASET`, or the number of classes is another.
    """
    own = f"ccgpu.train.{name}"
    try:
        module = importlib.import_module(own if name.isidentifier() and importlib.util.find_spec(own) else name)
    except (ImportError, TypeError, ValueError) as error:  # the last two: for "" and ".x", which cannot be modules
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
    """Raise unless there are as many classes as the network has.

    Args:
        labels: the classes.
        num_classes: number of classes of the network.
        source: where the classes come from, for the message.

    Raises:
        ValueError: the numbers differ.
    """
    if labels.num_classes != num_classes:
        raise ValueError(
            f"--dataset must have the network's {num_classes} classes, got {source} with {labels.num_classes}; name "
            "another."
        )
