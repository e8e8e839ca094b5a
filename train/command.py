"""A training command from top to bottom, for any data set: settings, wiring, the run.

`python -m train.NAME --data PATH` for each data set NAME (`cityscapes.py` and its neighbours); installed,
`python -m ccgpu.train.NAME`. Several processes share the global batch:

    python -m torch.distributed.run --nproc_per_node 4 -m train.cityscapes --data PATH
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from ccgpu.models import checkpoint
from ccgpu.models.backbones import load_imagenet
from ccgpu.models.ccnet import EMBEDDING_CHANNELS, CCNet
from ccgpu.models.published import RESNET
from ccgpu.train import distributed, engine, records, state
from ccgpu.train.data_set import DataSet
from ccgpu.train.datasets import EvaluationSet, StreamSampler, TrainStream, evaluation_indices
from ccgpu.train.distributed import is_main
from ccgpu.train.films import Clip, evaluation_clips, training_clips
from ccgpu.train.interrupts import DeferredInterrupts
from ccgpu.train.pairs import BadPicture, check_pairs
from ccgpu.train.plan import Plan, only_writer, open_run_folder, read_plan
from ccgpu.train.recipe import Settings, check_settings, criterion, prediction
from ccgpu.train.run import Run, say
from ccgpu.train.transforms import EvaluationTransform, Normalise, TrainTransform

Batches: TypeAlias = DataLoader[dict[str, Any]]

# What a wrong flag, data set or checkpoint raises before anything runs: told in one line, exit status 2.
BAD_INPUT = (ValueError, OSError, ImportError, state.CheckpointError)
# What `failure` tells later, in one line, where it is no mistake of the program's: exit status 1.
FAILURES = (BadPicture, OSError, MemoryError, RuntimeError)


def main(data_set: DataSet, argv: Sequence[str] | None = None) -> int:
    """Run the command of a data set and return its exit status.

    0: finished. 1: the run failed. 2: bad flags, data or checkpoint. 130, 143: stopped by Ctrl-C, SIGTERM.
    """
    parser = argparse.ArgumentParser(
        prog=data_set.name,
        description=f"Train and evaluate CCNet. {data_set.source} --data is {data_set.layout}",
        allow_abbrev=False,
    )
    try:
        plan = read_plan(parser, argv, Settings, presets(data_set), lambda settings: default_out(settings, data_set))
        if plan.checkpoint is not None and plan.checkpoint["data_set"] != data_set.name:
            raise ValueError(
                f"--resume must name a run of {data_set.name}, got one of {plan.checkpoint['data_set']} in "
                f"{plan.checkpoint_path}; continue it with the command that began it."
            )
        device = distributed.choose_device(plan.settings.device)
        check_settings(plan.settings, data_set, distributed.launched_world_size(), device)
    except BAD_INPUT as error:
        return fail(data_set.name, str(error), 2)
    # What happened is told before the processes part: as soon as one has ended, torchrun kills the others.
    with distributed.processes(device), contextlib.ExitStack() as held:
        try:
            try:
                run, batches, evaluated = prepare(plan, data_set, device, held)
            except BAD_INPUT as error:
                return fail(data_set.name, str(error), 2)
            return train_and_evaluate(plan, run, batches, evaluated)
        except (state.CheckpointError, engine.NonFiniteLoss) as error:  # of all processes alike
            return fail(data_set.name, str(error), 1)
        except FAILURES as error:
            again = f"continue with --resume --out {plan.out}"
            message = failure(error, again=again, smaller="lower --batch or --crop, or use --amp bf16")
            return fail(data_set.name, message, 1, everywhere=True)
        except KeyboardInterrupt:
            return fail(data_set.name, "stopped at once; --resume continues from the last checkpoint, if any", 130)


def fail(command: str, message: str, status: int, *, everywhere: bool = False) -> int:
    """Print an error, on the first process or `everywhere` (what not all processes meet); return the exit status."""
    if everywhere or is_main():
        print(f"{command}: {message}", file=sys.stderr)
    return status


def failure(error: Exception, *, again: str, smaller: str) -> str:
    """Return what to tell of an error that stopped a command between its pictures.

    Args:
        error: one of `FAILURES`, from this process or, with its traceback as torch's loader puts it, from another.
        again: how to go on when the cause is gone.
        smaller: how to do with less memory.

    Raises:
        RuntimeError: `error` itself, where it is a mistake of the program's and its traceback is wanted.
    """
    text = str(error)
    if text.startswith("Caught "):
        text = text.rpartition(f"{type(error).__name__}: ")[2].strip()
        # torch ties such an error into a circle with its loader, whose processes would stay.
        traceback.clear_frames(error.__traceback__)
    # torch has no class of its own for some of these.
    first = text.partition("\n")[0]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in text:
        return f"out of memory ({first}); {smaller}"
    if isinstance(error, (BadPicture, OSError)):
        return f"{text} Then {again}" if text.endswith(".") else f"{text}; make room or give access, then {again}"
    if text.startswith("DataLoader worker"):
        return f"a loader's process ended ({first.strip()}); if memory ran out, lower --workers, then {again}"
    if isinstance(error, torch.distributed.DistError) or "by peer" in text:
        return f"another process ended ({first.partition('. ')[0]}); it tells why"
    raise error


def presets(data_set: DataSet) -> Mapping[str | None, Mapping[str, Any]]:
    """Return the values of each preset: None is the data set's recipe, "demo" a short run on its drawn pictures."""
    return {None: data_set.recipe, "demo": {**data_set.recipe, **data_set.demo}}


def default_out(settings: Settings, data_set: DataSet) -> Path:
    """Return the run folder's name where the user gives none."""
    if settings.preset is not None:
        return Path("runs") / f"{data_set.name}-{settings.preset}"
    context = f"r{settings.loops}" if settings.context == "rcca" else settings.context
    clip = f"-t{settings.clip}" if settings.clip > 1 else ""
    return Path("runs") / f"{data_set.name}-{settings.backbone.replace(':', '-')}-{context}{clip}"


def prepare(
    plan: Plan[Settings], data_set: DataSet, device: torch.device, held: contextlib.ExitStack
) -> tuple[Run, Batches, set[int]]:
    """Build network, optimiser and data, from the beginning or from a checkpoint, then open the run folder.

    The folder is this command's alone until `held` is closed.

    Returns:
        The run, this process's training batches, and the iterations whose evaluation is recorded already.
    """
    settings, out = plan.settings, plan.out
    torch.manual_seed(settings.seed)
    precision = engine.Precision(device, settings.amp, settings.channels_last)
    net = build_network(settings, data_set, device, pretrained=plan.checkpoint is None)
    optimiser = torch.optim.SGD(
        net.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    scaler = precision.scaler()
    training, evaluation = open_data(settings, data_set, out)
    names = "\n".join(pair.name for clip in training for pair in clip)
    digest = hashlib.sha256(names.encode()).hexdigest()
    if plan.checkpoint is not None and plan.checkpoint_path is not None:
        state.restore(plan.checkpoint, plan.checkpoint_path, digest, net, optimiser, scaler)
    normalise = Normalise(net.backbone.mean, net.backbone.std)
    batches = load_training(settings, data_set, training, normalise, plan.start, device)
    val_set, val_loader = load_evaluation(evaluation, data_set, normalise, settings.clip, settings.workers, device)
    announce(plan, data_set, device, len(training), sum(len(clip) - first for clip, first in evaluation))
    held.enter_context(only_writer(out))
    evaluated = open_run_folder(plan, device)
    run = Run(
        out=out,
        data_set=data_set,
        settings=dataclasses.asdict(settings),
        data_digest=digest,
        batch=settings.batch,
        precision=precision,
        net=net,
        optimiser=optimiser,
        scaler=scaler,
        val_set=val_set,
        val_loader=val_loader,
        normalise=normalise,
        predict=prediction(settings, data_set),
        board=records.Board(out if is_main() and settings.tensorboard else None, plan.start),
        interrupts=DeferredInterrupts(),
    )
    return run, batches, evaluated


def train_and_evaluate(plan: Plan[Settings], run: Run, batches: Batches, evaluated: set[int]) -> int:
    """Train from where the plan starts, evaluate, and report; return the exit status."""
    settings = plan.settings
    steps = engine.train(
        distributed.wrap(run.net, run.precision.device),
        batches,
        run.optimiser,
        run.scaler,
        precision=run.precision,
        schedule=engine.poly(settings.lr, settings.iterations, settings.power),
        criterion=criterion(settings),
        start=plan.start,
        interrupted=run.interrupts,
    )
    with run.interrupts:
        try:
            # A checkpoint is written before its evaluation: a run stopped in between makes up for it here.
            if evaluation_due(settings, plan.start) and plan.start not in evaluated:
                run.evaluate(plan.start)
            finished = follow(steps, run, settings, plan.start)
        except engine.Interrupted:
            finished = False
        finally:
            run.board.close()
    if not finished:
        return fail(run.data_set.name, f"stopped; continue with --resume --out {plan.out}", run.interrupts.exit_status)
    if is_main():
        run.report()
    distributed.wait_for_all()
    return 0


def follow(steps: Iterator[engine.Step], run: Run, settings: Settings, start: int) -> bool:
    """Take step after step, with records, checkpoints and evaluations; return False where interrupted."""
    bar = tqdm(
        total=settings.iterations,
        initial=start,
        unit="step",
        disable=not is_main(),
        mininterval=0.2 if sys.stderr.isatty() else 10.0,  # seconds; a log file needs few lines
    )
    last, clock = start, time.perf_counter()
    with bar:
        for step in steps:
            now, done = step.iteration, step.iteration == settings.iterations
            bar.update()
            if now % settings.log_every == 0 or done:
                speed = (now - last) * settings.batch * settings.clip / (time.perf_counter() - clock)
                run.record(step, speed)
                bar.set_postfix_str(f"loss {step.loss:.3f}, lr {step.lr:.2g}, {speed:.1f} images/s", refresh=False)
                last, clock = now, time.perf_counter()
            due, pause = evaluation_due(settings, now), time.perf_counter()
            if due or step.interrupted or now % settings.save_every == 0:
                run.save(now)
            if step.interrupted:
                return False
            if due:
                run.evaluate(now)
            clock += time.perf_counter() - pause  # images/s is the speed of training alone
    return True


def evaluation_due(settings: Settings, iteration: int) -> bool:
    """Return whether the network after `iteration` steps is evaluated."""
    if iteration == 0:
        return settings.baselines
    periodic = settings.eval_every > 0 and iteration % settings.eval_every == 0
    return periodic or iteration == settings.iterations


def read_network(path: Path) -> checkpoint.Checkpoint:
    """Return what --checkpoint holds.

    Raises:
        ValueError, OSError: a file that cannot be used, or one with a backbone alone.
    """
    found = checkpoint.read(path)
    if found.source == RESNET:
        raise ValueError(f"--checkpoint must hold a whole network, got {path} with a backbone alone")
    return found


def build_network(settings: Settings, data_set: DataSet, device: torch.device, *, pretrained: bool) -> CCNet:
    """Return the network on its device, ready for the global batch; `pretrained` reads --imagenet.

    Raises:
        ValueError, OSError, ImportError: a network or weights that cannot be had.
    """
    try:
        net = CCNet(
            settings.backbone,
            data_set.labels.num_classes,
            context=settings.context,
            recurrence=settings.loops,
            dims=2 if settings.clip == 1 else 3,
            stem=settings.stem,
            head_channels=settings.head_channels,
            embedding=EMBEDDING_CHANNELS if settings.ccl else 0,
            dropout=settings.dropout,
            gamma=settings.gamma,
            nonlocal_form=settings.nonlocal_form,
            recompute=settings.recompute,
        )
        if pretrained and settings.imagenet is not None:
            load_imagenet(net.backbone, settings.imagenet)
    except RuntimeError as error:  # a package that cannot be imported, weights that cannot be fetched
        raise ValueError(str(error)) from error
    return place_network(net, settings, device)


def place_network(net: CCNet, settings: Settings, device: torch.device) -> CCNet:
    """Return a network on its device, in the memory order and form that the settings ask for."""
    order = torch.channels_last if settings.channels_last else torch.contiguous_format
    net = net.to(device)
    for parameter in net.parameters():
        if parameter.ndim == 4:  # a clip's 1x1x1 kernels have no such order, nor need of one
            parameter.data = parameter.data.contiguous(memory_format=order)
    distributed.convert_for_global_batch(net)
    if settings.compile:
        net.compile()
    return net


def open_data(settings: Settings, data_set: DataSet, out: Path) -> tuple[list[Clip], list[tuple[Clip, int]]]:
    """Return the checked clips to train and evaluate on (single pictures are clips of one).

    Without --data they are of pictures drawn into out/scenes. Clips never join two splits.
    """
    root = out / "scenes" if settings.data is None else Path(settings.data)
    if settings.data is None and data_set.draw is not None:
        if is_main():
            train, val = settings.scenes
            say(f"no --data: drawing pictures into {root}, {train} to train and {val} to evaluate on")
            out.mkdir(parents=True, exist_ok=True)
            (train_split, *_), (val_split, *_) = settings.train_split, settings.val_split
            data_set.draw(root, {train_split: train, val_split: val}, settings.scenes_size, settings.seed)
        distributed.wait_for_all()
    training = {split: data_set.find_pairs(root, split, True) for split in settings.train_split}
    evaluation = {split: data_set.find_pairs(root, split, True) for split in settings.val_split}
    check_pairs([pair for pairs in ({**training, **evaluation}).values() for pair in pairs])
    return (
        [clip for pairs in training.values() for clip in training_clips(pairs, settings.clip, data_set.film)],
        [clip for pairs in evaluation.values() for clip in evaluation_clips(pairs, settings.clip, data_set.film)],
    )


def load_training(
    settings: Settings,
    data_set: DataSet,
    clips: list[Clip],
    normalise: Normalise,
    start: int,
    device: torch.device,
) -> Batches:
    """Return this process's training batches from iteration `start` on."""
    transform = TrainTransform(
        settings.crop,
        settings.scale,
        settings.mirror,
        normalise,
        short_sides=settings.short_sides,
        fit=settings.fit,
        exchange=data_set.exchange,
    )
    stream = TrainStream(
        clips,
        data_set.labels,
        transform,
        settings.seed,
        settings.iterations * settings.batch,
        video=settings.clip > 1,
    )
    rank, processes = distributed.rank(), distributed.world_size()
    order = StreamSampler(start, settings.iterations, settings.batch, rank, processes)
    return engine.load_batches(stream, batches=order, workers=settings.workers, device=device)


def load_evaluation(
    clips: list[tuple[Clip, int]],
    data_set: DataSet,
    normalise: Normalise,
    clip: int,
    workers: int,
    device: torch.device,
) -> tuple[EvaluationSet, Batches]:
    """Return the evaluation set and this process's share of it."""
    val_set = EvaluationSet(clips, data_set.labels, EvaluationTransform(normalise), video=clip > 1)
    # One picture or clip a batch: a data set's pictures may differ in size.
    share = [[index] for index in evaluation_indices(len(val_set), distributed.rank(), distributed.world_size())]
    return val_set, engine.load_batches(val_set, batches=share, workers=workers, device=device, again=True)


def announce(plan: Plan[Settings], data_set: DataSet, device: torch.device, training: int, evaluation: int) -> None:
    """Say what is about to run, and where it departs from the recipe."""
    s, recipe = plan.settings, Settings(**data_set.recipe)
    if plan.resume:
        anew = f"no checkpoint in {plan.out}: starting from the beginning"
        on = f"continuing {plan.checkpoint_path} after iteration {plan.start}"
        say(anew if plan.checkpoint is None else on)
    context = f"R = {s.loops}" if s.context == "rcca" else f"context {s.context}"
    what, frames = ("pictures", "") if s.clip == 1 else ("clips", f"{s.clip} frames ")
    say(
        f"{s.backbone}, {context}, {s.iterations} iterations of {s.batch} {what} of {frames}{s.crop[0]}x{s.crop[1]}, "
        f"{training} {what} for training, {evaluation} pictures for evaluation, {device}, "
        f"{distributed.world_size()} process(es)"
    )
    if s.preset is None and (s.batch, s.crop) != (recipe.batch, recipe.crop):
        say(
            f"warning: batch {s.batch} and crop {s.crop[0]}x{s.crop[1]} depart from the recipe "
            f"({recipe.batch} and {recipe.crop[0]}x{recipe.crop[1]}), on which its mIoU depends"
        )
