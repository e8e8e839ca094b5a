"""What a training command says before it begins: network and data, where it departs from the recipe, and odd splits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ccgpu.train import distributed
from ccgpu.train.data.clips import Clip
from ccgpu.train.distributed import say
from ccgpu.train.runs.plan import Plan
from ccgpu.train.runs.settings.training import Settings


def warn_of_shared_images(training: Sequence[Clip], evaluation: Sequence[tuple[Clip, int]]) -> None:
    """Print a warning where images are trained and evaluated on, as those of --val-split train are."""
    evaluated = {pair.image for clip, _ in evaluation for pair in clip}
    shared = sorted(evaluated & {pair.image for clip in training for pair in clip})
    if shared:
        say(
            f"warning: {len(shared)} of {len(evaluated)} images for evaluation are training images too, such as "
            f"{shared[0]}: the scores do not tell how well other images are predicted"
        )


def announce(plan: Plan[Settings], recipe: Settings, device: torch.device, training: int, evaluation: int) -> None:
    """Print network, data and device of the run, and where it departs from the recipe.

    Args:
        plan: settings and start of the run.
        recipe: settings of the run's preset, or of the dataset's recipe where it has none.
        device: the device of the run.
        training: number of training images or clips.
        evaluation: number of images that are evaluated.
    """
    s = plan.settings
    if plan.resume and plan.checkpoint is None:
        say(f"no checkpoint in {plan.out}: starting from the beginning")
    elif plan.resume:
        say(f"continuing {plan.checkpoint_path} after iteration {plan.start}")
    if plan.former_length is not None:
        former = dataclasses.replace(s, iterations=plan.former_length).learning_rates()
        say(
            f"extended from {plan.former_length} to {s.iterations} iterations, over which the schedule now goes: the "
            f"learning rate was {former(plan.former_length - 1):.3g} at the last step, and is "
            f"{s.learning_rates()(plan.start):.3g} at the next"
        )
    context = f"R = {s.loops}" if s.context == "rcca" else f"context {s.context}"
    what, frames = ("images", "") if s.clip == 1 else ("clips", f"{s.clip} frames ")
    say(
        f"{s.backbone}, {context}, {s.iterations} iterations of {s.batch} {what} of {frames}{s.crop[0]}x{s.crop[1]}, "
        f"{training} {what} for training, {evaluation} images for evaluation, {device}, "
        f"{distributed.world_size()} process(es)"
    )
    if s.preset != "demo" and (s.batch, s.crop) != (recipe.batch, recipe.crop):
        say(
            f"warning: batch {s.batch} and crop {s.crop[0]}x{s.crop[1]} depart from the "
            f"{'recipe' if s.preset is None else f'preset {s.preset}'} "
            f"({recipe.batch} and {recipe.crop[0]}x{recipe.crop[1]}), on which its mIoU depends"
        )
    for line in without_effect(s):
        say(f"warning: {line}")


def without_effect(settings: Settings) -> list[str]:
    """Return a line for each flag that changes nothing in a run of these settings."""
    lines = []
    pixels = settings.batch * settings.clip * settings.crop[0] * settings.crop[1]
    if settings.ohem is not None and settings.ohem[1] >= pixels:
        lines.append(
            f"--ohem keeps at least {settings.ohem[1]:.0f} pixels of a step, which has {pixels}: none is left out; "
            "give a smaller number"
        )
    every, patience = settings.eval_every, settings.patience
    evaluations = -(-settings.iterations // every) if every else 1
    if patience > 0 and patience >= evaluations - 1:
        lines.append(
            f"--patience {patience} cannot end a run of {evaluations} evaluation{'s' * (evaluations > 1)} early; lower "
            f"it, or --eval-every, which is {every}"
        )
    return lines
