"""The weights of the classes in a run's loss: as --class-weights names them, or from the training label files."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

from ccgpu.models.checkpoint_keys import RunCheckpoint
from ccgpu.models.labels import Labels
from ccgpu.train.data.census import Census
from ccgpu.train.data.checking import File, check_labels
from ccgpu.train.data.class_weights import median_frequency
from ccgpu.train.data.clips import Clip
from ccgpu.train.dataset import Opened
from ccgpu.train.distributed import let_first_process, say
from ccgpu.train.runs.checkpoints import CheckpointError
from ccgpu.train.runs.data_check import find_facts
from ccgpu.train.runs.plan import Plan
from ccgpu.train.runs.settings.training import Settings
from ccgpu.train.runs.setup import data_root, reading_of


def choose_class_weights(plan: Plan[Settings], opened: Opened, training: Sequence[Clip]) -> tuple[float, ...] | None:
    """Return a weight for each class, which are printed; None where all classes weigh the same.

    A resumed run keeps the weights that its checkpoint holds. Counting the pixels of the classes opens every training
    label file that was not opened before, also with --no-check.

    Args:
        plan: settings that `check_settings` accepts, and start of the run.
        opened: the dataset.
        training: the clips to train on.

    Raises:
        ValueError: label files cannot be used.
        CheckpointError: the checkpoint's weights are not those of the settings.
    """
    settings, labels = plan.settings, opened.dataset.labels
    if plan.checkpoint is not None:
        weights = _saved(plan.checkpoint, plan, labels)
    elif settings.counts_classes:
        weights = let_first_process(lambda: _count(settings, opened, training, plan.out))
    else:
        weights = settings.given_weights
    if weights is not None:
        say(weights_table(weights, labels))
    return weights


def weights_table(weights: Sequence[float], labels: Labels) -> str:
    """Return the weights as text, a class a line."""
    width = max(len("class"), *map(len, labels.names))
    rows = [f"{name:<{width}}{weight:>20.4f}" for name, weight in zip(labels.names, weights, strict=True)]
    return "\n".join([f"{'class':<{width}}{'weight in the loss':>20}", *rows])


def _saved(saved: RunCheckpoint, plan: Plan[Settings], labels: Labels) -> tuple[float, ...] | None:
    """Return the weights that a checkpoint holds."""
    weights = None if saved["class_weights"] is None else tuple(saved["class_weights"])
    settings = plan.settings
    fits = (weights is None) == (settings.class_weights == ()) and settings.given_weights in (None, weights)
    if not fits or (weights is not None and len(weights) != labels.num_classes):
        raise CheckpointError(
            f"resume: {plan.checkpoint_path} must hold the weights of the {labels.num_classes} classes that "
            f"--class-weights asks for, got {weights}; the file was changed: name another."
        )
    return weights


def _count(
    settings: Settings, opened: Opened, training: Sequence[Clip], out: Path
) -> Generator[None, None, tuple[float, ...]]:
    """Return the weights of median frequency balancing, in the first of several processes."""
    labels, reading = opened.dataset.labels, reading_of(settings, opened.dataset)
    files = [*dict.fromkeys(pair.label for clip in training for pair in clip if pair.label is not None)]
    missing: list[File] = [(path, True) for path in files if (path, True) not in opened.facts]
    found = yield from find_facts(data_root(settings, out), missing, reading, settings.workers > 0)
    facts = {**opened.facts, **found}
    check_labels(files, facts, labels, reading)
    census = Census.of("training", (facts[path, True] for path in files), labels.coding)
    weights, absent = median_frequency(census, labels)
    if absent:
        say(f"note: no training label file holds {', '.join(absent)}: weight 1 in the loss (--class-weights)")
    return weights
