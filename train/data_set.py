"""What a training command knows of its data set: one value in each command file, used by ``command.py``."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ccgpu.train.labels import Labels
from ccgpu.train.metrics import SCORES
from ccgpu.train.pairs import Pair


@dataclass(frozen=True, eq=False)
class DataSet:
    """A data set: classes, files, recipe.

    Args:
        name: such as "camvid"; the command is ``python -m train.camvid``.
        labels: the classes.
        layout: the folders and files in one line, for the help of ``--data``.
        find_pairs: (root, split, labelled) -> the pictures of a split, sorted; with labelled=False no label
            files are looked for and each ``Pair.label`` is None.
        recipe: defaults of the settings by name.
        source: where the recipe is from, a sentence for the help.
        scores: the official scores, the headline first, out of "miou", "pixel_accuracy", "mean_accuracy".
        draw: (root, number of pictures of each split, (height, width), seed) -> root, which then holds a
            drawn data set in this layout, whole or not at all; None: the command needs --data.
        demo: settings of the preset "demo" by name.
        film: name of a picture -> its film and frame number; None where pictures are no frames.
        mirrored: pairs of classes (train ids) that a mirror image exchanges, such as left and right arm.

    Raises:
        ValueError: no scores or unknown ones, a train id in ``mirrored`` that is no class or comes twice.
    """

    name: str
    labels: Labels
    layout: str
    find_pairs: Callable[[Path, str, bool], list[Pair]]
    recipe: Mapping[str, Any]
    source: str
    scores: tuple[str, ...]
    draw: Callable[[Path, Mapping[str, int], tuple[int, int], int], Path] | None = None
    demo: Mapping[str, Any] = field(default_factory=dict)
    film: Callable[[str], tuple[str, int]] | None = None
    mirrored: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.scores or not set(self.scores) <= set(SCORES):
            raise ValueError(
                f"DataSet: scores must be one or more of {tuple(SCORES)}, got {self.scores}; correct them."
            )
        classes = [train_id for pair in self.mirrored for train_id in pair]
        if len(set(classes)) != len(classes) or not set(classes) <= {*range(self.labels.num_classes)}:
            raise ValueError(
                f"DataSet: mirrored must be pairs of different train ids in 0..{self.labels.num_classes - 1}, "
                f"got {self.mirrored}; name each class once."
            )

    @property
    def exchange(self) -> np.ndarray:
        """Train id -> train id of the same thing in a mirror image, uint8 (256,), its own inverse.

        ``exchange[label]`` is a mirrored label's classes, ``logits[:, exchange[:K].tolist()]`` those of mirrored logits
        (B, K, H, W). (Without ``tolist`` torch takes uint8 for a mask.)
        """
        table = np.arange(256, dtype=np.uint8)
        for left, right in self.mirrored:
            table[[left, right]] = right, left
        return table


def find_data_set(name: str) -> DataSet:
    """Return the DATA_SET of a module: that of ccgpu.train.NAME, or else of the module NAME on Python's path.

    Raises:
        ValueError: no such module, or one without a `DataSet` of that name.
    """
    own = f"ccgpu.train.{name}"
    try:
        module = importlib.import_module(own if name.isidentifier() and importlib.util.find_spec(own) else name)
    except (ImportError, TypeError, ValueError) as error:  # the last two of what cannot be a name, "" and ".x"
        raise ValueError(
            f"--data-set must be a module that can be imported, got {name!r} ({error}); name the module of the data "
            "set that the checkpoint was trained on."
        ) from error
    found = getattr(module, "DATA_SET", None)
    if not isinstance(found, DataSet):
        raise ValueError(f"--data-set must be a module with a DATA_SET, got {module.__name__!r}; name another.")
    return found
