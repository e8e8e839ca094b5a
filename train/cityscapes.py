"""Train CCNet on Cityscapes: `python -m train.cityscapes --data PATH`; installed, `-m
ccgpu.train.cityscapes`.

The defaults are the paper's recipe (Huang et al., TPAMI 2020, section 4.2). Without `--data` the pictures are
drawn (`scenes.py`); `--preset demo` is a small run on them for a CPU. Several processes share the global
batch:

    python -m torch.distributed.run --nproc_per_node 4 -m train.cityscapes --data PATH
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from ccgpu.models.ccnet import BACKBONES, CCNet
from ccgpu.models.resnet import load_imagenet
from ccgpu.train import distributed, engine, records, state
from ccgpu.train.datasets import (
    BadPicture,
    EvaluationSet,
    Pair,
    StreamSampler,
    TrainStream,
    check_pairs,
    evaluation_indices,
    find_pairs,
)
from ccgpu.train.distributed import is_main
from ccgpu.train.interrupts import DeferredInterrupts
from ccgpu.train.labels import CLASS_NAMES
from ccgpu.train.losses import AUXILIARY_WEIGHT
from ccgpu.train.plan import Plan, open_run_folder, read_plan
from ccgpu.train.run import Run, say
from ccgpu.train.scenes import write_scenes
from ccgpu.train.settings import option, range_problems
from ccgpu.train.transforms import EvaluationTransform, Normalise, TrainTransform

# Pixels a side: two positions of the features at output stride 8; batch norm fails on a single one.
SMALLEST = 16

Batches: TypeAlias = DataLoader[dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """What a run is made of; every field is a flag of the command."""

    preset: str | None = option(None, "demo: a run of a few minutes on a CPU", choices=("demo",))
    data: str | None = option(
        None, "folder with leftImg8bit/ and gtFine/; left out: drawn scenes", metavar="PATH", decides="nothing"
    )
    train_split: tuple[str, ...] = option(("train",), "splits to train on", count="+", metavar="NAME")
    val_split: tuple[str, ...] = option(("val",), "splits to evaluate on", count="+", metavar="NAME", decides="records")
    scenes: tuple[int, int] = option(
        (400, 60),
        "drawn scenes for training and evaluation",
        kind=int,
        count=2,
        metavar=("TRAIN", "VAL"),
        least=1,
    )
    scenes_size: tuple[int, int] = option(
        (512, 1024), "pixels of a drawn scene, H W", kind=int, count="size", least=SMALLEST
    )
    backbone: str = option("resnet101", "paper: resnet101", choices=tuple(BACKBONES))
    stem: str = option("deep", "first convolutions; paper: deep (three 3x3)", choices=("deep", "7x7"))
    imagenet: str | None = option(None, "file of ImageNet weights for the backbone; paper: pretrained", metavar="PATH")
    recurrence: int = option(2, "loops R of the criss-cross attention, 0 for none; paper: 2", kind=int, least=0)
    head_channels: int = option(512, "channels of the head; paper: 512", kind=int, least=1)
    dropout: float = option(
        0.1, "probability of a channel's dropout in the heads; paper: 0.1", kind=float, least=0, most=1
    )
    auxiliary_weight: float = option(AUXILIARY_WEIGHT, "weight of the auxiliary loss; paper: 0.4", kind=float, least=0)
    iterations: int = option(60000, "optimiser steps; paper: 60000", kind=int, least=1)
    batch: int = option(8, "pictures a step over all processes; paper: 8", kind=int, least=1)
    crop: tuple[int, int] = option(
        (769, 769), "training crop in pixels; paper: 769", kind=int, count="size", least=SMALLEST
    )
    scale: tuple[float, float] = option(
        (0.75, 2.0),
        "range of the random scale; paper: 0.75 2.0",
        kind=float,
        count=2,
        metavar=("LOW", "HIGH"),
    )
    mirror: bool = option(True, "mirror half of the training pictures; paper: yes", kind=bool)
    lr: float = option(1e-2, "learning rate of SGD at the start; paper: 0.01", kind=float, least=0)
    momentum: float = option(0.9, "momentum of SGD; paper: 0.9", kind=float, least=0, most=1)
    weight_decay: float = option(1e-4, "weight decay of SGD; paper: 0.0001", kind=float, least=0)
    power: float = option(0.9, "power of the poly schedule; paper: 0.9", kind=float, least=0)
    seed: int = option(0, "seed of weights, order, augmentation, dropout and drawn scenes", kind=int, least=0)
    amp: str = option("off", "autocast; fp16 scales the loss and needs CUDA", choices=tuple(engine.AMP_DTYPES))
    channels_last: bool = option(False, "NHWC memory order, faster with amp on CUDA", kind=bool)
    compile: bool = option(False, "compile the network with torch.compile", kind=bool)
    eval: str = option(
        "sliding", "evaluate windows or whole pictures; paper: sliding", choices=("whole", "sliding"), decides="records"
    )
    eval_crop: tuple[int, int] = option(
        (769, 769), "window in pixels; paper: 769", kind=int, count="size", least=SMALLEST, decides="records"
    )
    eval_stride: tuple[int, int] = option(
        (513, 513), "window step in pixels; paper: 513", kind=int, count="size", least=1, decides="records"
    )
    baselines: bool = option(False, "evaluate the untrained network and 'everything is road' too", kind=bool)
    eval_every: int = option(
        5000, "steps between evaluations, 0 for one at the end", kind=int, decides="nothing", least=0
    )
    save_every: int = option(1000, "steps between checkpoints", kind=int, decides="nothing", least=1)
    log_every: int = option(50, "steps between records of the loss", kind=int, decides="nothing", least=1)
    tensorboard: bool = option(True, "write TensorBoard files", kind=bool, decides="nothing")
    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda"), decides="nothing")
    workers: int = option(4, "loader processes for each training process", kind=int, decides="nothing", least=0)


# About 4 minutes on two CPU cores (AVX-512): mIoU 34.9 %, against 0.4 % untrained and 1.6 % for "everything is road".
PRESETS: dict[str | None, dict[str, Any]] = {
    None: {},
    "demo": {
        "scenes": (160, 24),
        "scenes_size": (128, 256),
        "backbone": "resnet18",
        "head_channels": 64,
        "iterations": 360,
        "batch": 4,
        "crop": (97, 129),
        "scale": (0.75, 1.5),
        "lr": 0.04,
        "channels_last": True,
        "eval": "whole",
        "baselines": True,
        "eval_every": 0,
        "save_every": 120,
        "log_every": 10,
        "workers": 0,
    },
}


# What a wrong flag, data set or checkpoint raises before training: told in one line, exit status 2.
BAD_INPUT = (ValueError, OSError, state.CheckpointError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    0: finished. 1: the run failed. 2: bad flags, data or checkpoint. 130, 143: stopped by Ctrl-C, SIGTERM.
    """
    parser = argparse.ArgumentParser(
        prog="cityscapes",
        description="Train and evaluate CCNet; the defaults are the paper's recipe.",
        allow_abbrev=False,
    )
    try:
        plan = read_plan(parser, argv, Settings, PRESETS, default_out)
        device = distributed.choose_device(plan.settings.device)
        check_settings(plan.settings, distributed.launched_world_size(), device)
    except BAD_INPUT as error:
        return fail(str(error), 2)
    try:
        with distributed.processes(device):
            try:
                run, batches, evaluated = prepare(plan, device)
            except BAD_INPUT as error:
                return fail(str(error), 2)
            return train_and_evaluate(plan, run, batches, evaluated)
    except BadPicture as error:
        # A loader's process puts its traceback before the message.
        message = str(error).splitlines()[-1].rpartition("BadPicture: ")[2]
        return fail(f"{message} Then continue with --resume --out {plan.out}", 1)
    except (state.CheckpointError, engine.NonFiniteLoss) as error:
        return fail(str(error), 1)
    except OSError as error:
        return fail(f"{error}; make room or give access, then continue with --resume --out {plan.out}", 1)
    except torch.OutOfMemoryError as error:
        return fail(f"out of device memory ({error}); lower --batch or --crop, or use --amp bf16", 1)
    except KeyboardInterrupt:
        return fail("stopped at once; --resume continues from the last checkpoint, if there is one", 130)


def fail(message: str, status: int) -> int:
    """Print an error on the first process and return the exit status."""
    if is_main():
        print(f"cityscapes: {message}", file=sys.stderr)
    return status


def prepare(plan: Plan[Settings], device: torch.device) -> tuple[Run, Batches, set[int]]:
    """Build network, optimiser and data, from the beginning or from a checkpoint, then open the run folder.

    Returns:
        The run, this process's training batches, and the iterations whose evaluation is recorded already.
    """
    settings, out = plan.settings, plan.out
    torch.manual_seed(settings.seed)
    precision = engine.Precision(device, settings.amp, settings.channels_last)
    net = build_network(settings, device, pretrained=plan.checkpoint is None)
    optimiser = torch.optim.SGD(
        net.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    scaler = precision.scaler()
    train_pairs, val_pairs = open_data(settings, out)
    digest = hashlib.sha256("\n".join(pair.name for pair in train_pairs).encode()).hexdigest()
    if plan.checkpoint is not None and plan.checkpoint_path is not None:
        state.restore(plan.checkpoint, plan.checkpoint_path, digest, net, optimiser, scaler)
    batches, val_set, val_loader = load(settings, train_pairs, val_pairs, plan.start, device)
    announce(plan, device, len(train_pairs), len(val_pairs))
    evaluated = open_run_folder(plan, device)
    run = Run(
        out=out,
        settings=dataclasses.asdict(settings),
        data_digest=digest,
        batch=settings.batch,
        precision=precision,
        net=net,
        optimiser=optimiser,
        scaler=scaler,
        val_set=val_set,
        val_loader=val_loader,
        windows={"mode": settings.eval, "crop": settings.eval_crop, "stride": settings.eval_stride},
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
        auxiliary_weight=settings.auxiliary_weight,
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
        return fail(f"stopped; continue with --resume --out {plan.out}", run.interrupts.exit_status)
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
                speed = (now - last) * settings.batch / (time.perf_counter() - clock)
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


def default_out(settings: Settings) -> Path:
    """Return the run folder's name where the user gives none."""
    name = f"{settings.backbone}-r{settings.recurrence}" if settings.preset is None else settings.preset
    return Path("runs") / f"cityscapes-{name}"


def check_settings(s: Settings, processes: int, device: torch.device) -> None:
    """Refuse settings that cannot work, all in one error, before anything is written.

    Raises:
        ValueError: with one line for each problem.
    """
    problems = range_problems(s)
    if s.lr == 0:
        problems.append(f"--lr must be more than 0, got {s.lr}")
    if not 0 < s.scale[0] <= s.scale[1] < math.inf:
        problems.append(f"--scale must be LOW HIGH with 0 < LOW <= HIGH, got {s.scale[0]} {s.scale[1]}")
    if any(step > side for step, side in zip(s.eval_stride, s.eval_crop, strict=True)):
        problems.append(f"--eval-stride must be at most --eval-crop {s.eval_crop}, got {s.eval_stride}")
    if s.batch % processes:
        problems.append(f"--batch must be a multiple of the {processes} processes, got {s.batch}")
    if s.amp == "fp16" and device.type == "cpu":
        problems.append("--amp fp16 needs a CUDA device, got the CPU; use --amp bf16 or off")
    if s.data is None and not {*s.train_split, *s.val_split} <= {"train", "val"}:
        problems.append("--train-split and --val-split must be train or val where --data is left out")
    if problems:
        raise ValueError("; ".join(problems))


def build_network(settings: Settings, device: torch.device, *, pretrained: bool) -> CCNet:
    """Return the network on its device, ready for the global batch; `pretrained` reads --imagenet."""
    net = CCNet(
        settings.backbone,
        len(CLASS_NAMES),
        recurrence=settings.recurrence,
        stem=settings.stem,
        head_channels=settings.head_channels,
        dropout=settings.dropout,
    )
    if pretrained and settings.imagenet is not None:
        load_imagenet(net.backbone, settings.imagenet)
    order = torch.channels_last if settings.channels_last else torch.contiguous_format
    net = net.to(device).to(memory_format=order)  # type: ignore[call-overload]  # missing from torch's stub
    distributed.convert_for_global_batch(net)
    if settings.compile:
        net.compile()
    return net


def open_data(settings: Settings, out: Path) -> tuple[list[Pair], list[Pair]]:
    """Return the checked pairs to train and evaluate on; without --data, of scenes drawn into out/scenes."""
    root = out / "scenes" if settings.data is None else Path(settings.data)
    if settings.data is None:
        if is_main():
            train, val = settings.scenes
            say(f"no --data: drawing street scenes into {root}, {train} to train and {val} to evaluate on")
            out.mkdir(parents=True, exist_ok=True)
            write_scenes(root, splits={"train": train, "val": val}, size=settings.scenes_size, seed=settings.seed)
        distributed.wait_for_all()
    train_pairs = [pair for split in settings.train_split for pair in find_pairs(root, split)]
    val_pairs = [pair for split in settings.val_split for pair in find_pairs(root, split)]
    check_pairs(train_pairs + val_pairs)
    return train_pairs, val_pairs


def load(
    settings: Settings, train_pairs: list[Pair], val_pairs: list[Pair], start: int, device: torch.device
) -> tuple[Batches, EvaluationSet, Batches]:
    """Return this process's training batches from `start` on, the evaluation set, and its share of that."""
    rank, processes = distributed.rank(), distributed.world_size()
    transform = TrainTransform(settings.crop, settings.scale, settings.mirror, Normalise())
    stream = TrainStream(train_pairs, transform, settings.seed, settings.iterations * settings.batch)
    order = StreamSampler(start, settings.iterations, settings.batch, rank, processes)
    val_set = EvaluationSet(val_pairs, EvaluationTransform(Normalise()))
    # One picture a batch: a data set's pictures may differ in size.
    share = [[index] for index in evaluation_indices(len(val_set), rank, processes)]
    batches = engine.load_batches(stream, batches=order, workers=settings.workers, device=device)
    val_loader = engine.load_batches(val_set, batches=share, workers=settings.workers, device=device)
    return batches, val_set, val_loader


def announce(plan: Plan[Settings], device: torch.device, training: int, evaluation: int) -> None:
    """Say what is about to run, and where it departs from the paper."""
    s, recipe = plan.settings, Settings()
    if plan.resume:
        anew = f"no checkpoint in {plan.out}: starting from the beginning"
        on = f"continuing {plan.checkpoint_path} after iteration {plan.start}"
        say(anew if plan.checkpoint is None else on)
    say(
        f"{s.backbone}, R = {s.recurrence}, {s.iterations} iterations of {s.batch} pictures "
        f"{s.crop[0]}x{s.crop[1]}, {training} for training, {evaluation} for evaluation, {device}, "
        f"{distributed.world_size()} process(es)"
    )
    if s.preset is None and (s.batch, s.crop) != (recipe.batch, recipe.crop):
        say(
            f"warning: batch {s.batch} and crop {s.crop[0]}x{s.crop[1]} depart from the paper's recipe "
            f"({recipe.batch} and {recipe.crop[0]}x{recipe.crop[1]}), on which its mIoU depends"
        )


if __name__ == "__main__":
    sys.exit(main())
