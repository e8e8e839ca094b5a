"""`Settings`: all settings of a training command, and whether they can work together and with the dataset.

The defaults are the paper's recipe for Cityscapes (Huang et al., TPAMI 2020, section 4.2); a dataset's own recipe
replaces some of them (`Dataset.recipe`).
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass

import torch

from ccgpu.models.precision import amp_problems
from ccgpu.train.dataset import Dataset
from ccgpu.train.runs.flags import flag, is_value, range_problems
from ccgpu.train.runs.settings.augmentation import AugmentationSettings
from ccgpu.train.runs.settings.data import DataSettings
from ccgpu.train.runs.settings.evaluation import EvaluationSettings
from ccgpu.train.runs.settings.loss import LossSettings
from ccgpu.train.runs.settings.network import NetworkSettings
from ccgpu.train.runs.settings.optimisation import OptimisationSettings
from ccgpu.train.runs.settings.run import PRESETS, RunSettings

# In the order of the help.
GROUPS = (
    DataSettings,
    NetworkSettings,
    LossSettings,
    AugmentationSettings,
    OptimisationSettings,
    EvaluationSettings,
    RunSettings,
)


# A dataclass takes the fields of its last base first.
@dataclass(frozen=True)
class Settings(
    RunSettings,
    EvaluationSettings,
    OptimisationSettings,
    AugmentationSettings,
    LossSettings,
    NetworkSettings,
    DataSettings,
):
    """All settings of a run; every field is a flag of the command, and all are saved with the run."""

    @property
    def loops(self) -> int:
        """R, the network's loops of attention: by default 2 for images and 3 for clips; 0 without attention."""
        if self.context != "rcca":
            return 0
        return (2 if self.clip == 1 else 3) if self.recurrence is None else self.recurrence

    def problems(self) -> list[str]:
        """Return a line for each setting that cannot work, whatever the dataset."""
        problems = range_problems(self) + [problem for group in GROUPS for problem in group.problems(self)]
        if self.freeze is not None and self.imagenet is None and self.init is None:
            problems.append(f"--freeze must come with --imagenet or --init, got {self.freeze} of random weights")
        return problems


def check_recipe(dataset: Dataset) -> None:
    """Raise ValueError if a dataset's recipe or preset holds what is no setting, or a value that no flag could give."""
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    presets = ((f"preset {name}", values) for name, values in dataset.presets.items())
    for kind, values in (("recipe", dataset.recipe), *presets):
        for name, value in values.items():
            if name not in fields:
                near = difflib.get_close_matches(name, fields, n=1)
                raise ValueError(
                    f"Dataset: {kind} of {dataset.name} must hold settings, got {name!r}; "
                    f"{f'did you mean {near[0]!r}?' if near else '--help lists all, as flags.'}"
                )
            if not is_value(fields[name], value):
                default = fields[name].default
                example = "" if default is None else f", such as {default!r}"
                raise ValueError(
                    f"Dataset: {kind} of {dataset.name} must hold what the flags can give, got {name!r}: "
                    f"{value!r:.60}; write a value of {flag(name)}{example}."
                )


def check_settings(s: Settings, dataset: Dataset, processes: int, device: torch.device) -> None:
    """Raise if settings cannot work, before anything is written.

    Raises:
        ValueError: settings cannot work; the message lists all problems.
    """
    problems = s.problems()
    if s.clip > 1 and dataset.frame_of is None:
        problems.append(f"--clip must be 1 for {dataset.name}, whose images are no videos, got {s.clip}")
    if s.markers > dataset.markers:
        most = "1" if dataset.markers == 1 else f"at most {dataset.markers}"
        problems.append(f"--markers must be {most} for {dataset.name}, got {s.markers}")
    if s.photometric and dataset.images.raw:
        problems.append(
            f"--photometric must be left out for images of {dataset.images}, because it is defined for 8-bit RGB alone"
        )
    classes = dataset.labels.num_classes
    if s.given_weights is not None and len(s.given_weights) != classes:
        problems.append(
            f"--class-weights must be a number for each of the {classes} classes of {dataset.name} "
            f"({', '.join(dataset.labels.names[:3])}{', ...' * (classes > 3)}), got {len(s.given_weights)}"
        )
    pieces = max(s.accumulate, 1)  # less is told above
    if s.batch % processes:
        problems.append(f"--batch must be a multiple of the {processes} processes, got {s.batch}")
    elif s.batch // processes % pieces:
        shares = f"the {processes} processes times " if processes > 1 else ""
        problems.append(f"--batch must be a multiple of {shares}--accumulate {pieces}, got {s.batch}")
    if s.context in ("psp", "aspp") and s.batch // pieces * s.clip < 2:
        what = "--batch" if s.accumulate == 1 else "--batch divided by --accumulate"
        problems.append(f"{what} must be 2 or more for --context {s.context}, which normalises one value an image")
    problems += amp_problems(s.amp, device)
    if s.init is None and s.normalisation == "authors" and (dataset.images.raw or dataset.mean is not None):
        problems.append(
            f"--normalisation must be imagenet for {dataset.name}, whose images have a mean and std of their own "
            f"({dataset.images}), got authors"
        )
    if s.preset is not None and s.preset not in dataset.presets:
        own = f"one of {', '.join(dataset.presets)} for {dataset.name}"
        known = own if dataset.presets else f"left out for {dataset.name}, which has no presets"
        others = PRESETS.get(s.preset, ())
        problems.append(f"--preset must be {known}, got {s.preset}{', a preset of ' * bool(others)}{', '.join(others)}")
    if s.data is None and dataset.write_synthetic is None:
        problems.append("--data must name the dataset's folder, got nothing")
    synthetic = {*dataset.recipe.get("train_split", ("train",)), *dataset.recipe.get("val_split", ("val",))}
    if s.data is None and not {*s.train_split, *s.val_split} <= synthetic:
        problems.append(f"--train-split and --val-split must be of {sorted(synthetic)} where --data is left out")
    if s.data is None and s.scenes[0] < len({*s.train_split}):
        problems.append(
            f"--scenes must be {len({*s.train_split})} images or more to train on, one for each of "
            f"{' '.join(s.train_split)}, got {s.scenes[0]}"
        )
    if problems:
        raise ValueError("; ".join(problems))
