"""A training command from start to end, for any dataset: read the plan, prepare the run, train, evaluate, report.

`ccgpu train NAME --data PATH` for each dataset NAME (`cityscapes.py` and its neighbours), or `ccgpu train DIR`. Several
processes share the global batch:

    python -m torch.distributed.run --nproc_per_node 4 -m ccgpu.train train cityscapes --data PATH
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ccgpu.models.image_format import ImageFormat
from ccgpu.models.labels import class_differences
from ccgpu.models.normalisation import Normalise
from ccgpu.models.precision import Precision
from ccgpu.models.weights import write_atomically
from ccgpu.train import distributed, engine
from ccgpu.train.dataset import Dataset, Opened
from ccgpu.train.distributed import is_main, say
from ccgpu.train.loaders import is_lost_loader
from ccgpu.train.optimisation.update import Update
from ccgpu.train.runs import announcements, checkpoints
from ccgpu.train.runs.boards import open_boards
from ccgpu.train.runs.class_weights import choose_class_weights
from ccgpu.train.runs.errors import BAD_INPUT, fail, run_command
from ccgpu.train.runs.flags import combine
from ccgpu.train.runs.initial import name_of_network, normalised_as, read_initial
from ccgpu.train.runs.interrupts import DeferredInterrupts
from ccgpu.train.runs.parser import command_parser
from ccgpu.train.runs.plan import (
    REPORT,
    Plan,
    Request,
    only_writer,
    open_run_folder,
    read_request,
    write_settings,
)
from ccgpu.train.runs.scores import Scores
from ccgpu.train.runs.settings.training import Settings, check_recipe, check_settings
from ccgpu.train.runs.setup import (
    Batches,
    as_trained,
    build_network,
    build_optimisation,
    load_evaluation,
    load_training,
    open_data,
)
from ccgpu.train.runs.training_run import TrainingRun


@dataclass(frozen=True)
class Source:
    """Where a training command has its dataset from: a dataset that is known, or one that is opened from the flags.

    Attributes:
        usage: what follows "ccgpu train" in the help: the dataset, and the flags.
        description: of the command, for its help.
        settings: dataclass of the settings, `Settings` or one with more.
        defaults: defaults of the flags by name, for the help.
        presets: settings by name of each preset, as far as they are known before the dataset is opened.
        default_out: flags by name -> the run folder for a command line without --out.
        unset: what the help says of flags without a default, see `add_flags`.
        argument: request -> what names the dataset after "ccgpu train".
        open: (request, device) -> the dataset; called within the group of processes.
    """

    usage: tuple[str, str]
    description: str
    settings: type[Settings]
    defaults: Mapping[str, Any]
    presets: Mapping[str | None, Mapping[str, Any]]
    default_out: Callable[[Mapping[str, Any]], Path]
    unset: Mapping[str, str]
    argument: Callable[[Request[Any]], str]
    open: Callable[[Request[Any], torch.device], Opened]

    @classmethod
    def of(cls, dataset: Dataset) -> Source:
        """Return the source of a dataset that is known."""
        return cls(
            usage=(dataset.name, "[--data PATH] [--out DIR] [flags]"),
            description=f"Train and evaluate CCNet. {dataset.source} --data is {dataset.layout}",
            settings=Settings,
            defaults=dataset.recipe,
            presets=presets(dataset),
            default_out=lambda flags: default_out(_chosen(flags, dataset), dataset),
            unset={
                **(
                    {}
                    if dataset.write_synthetic
                    else {"data": "none, it must be given", "scenes": "", "scenes_size": ""}
                ),
                **({"markers": ""} if dataset.markers == 1 else {}),
                **({} if dataset.presets else {"preset": ""}),
                **({} if dataset.frame_of else {"clip": ""}),
                **({"value_range": ""} if dataset.images.raw else {}),
            },
            argument=lambda request: dataset.name,
            open=lambda request, device: Opened(_for_settings(dataset, request)),
        )


def _for_settings(dataset: Dataset, request: Request[Settings]) -> Dataset:
    return dataset if dataset.for_settings is None else dataset.for_settings(request.settings(presets(dataset)))


def _chosen(flags: Mapping[str, Any], dataset: Dataset) -> Settings:
    return combine(Settings, preset=presets(dataset).get(flags.get("preset"), dataset.recipe), saved=None, flags=flags)


def main(given: Dataset | Source, argv: Sequence[str] | None = None) -> int:
    """Run the training command of a dataset and return its exit status.

    0: finished. 1: the run failed. 2: bad flags, data or checkpoint. 130, 143: stopped by Ctrl-C, SIGTERM.
    """
    source = Source.of(given) if isinstance(given, Dataset) else given
    parser = command_parser(f"train {source.usage[0]}", source.description, source.usage[1])
    try:
        if isinstance(given, Dataset):
            check_recipe(given)
        request = read_request(parser, argv, source.settings, source.defaults, source.default_out, source.unset)
        chosen = request.settings(source.presets)
        if chosen.init is not None and request.checkpoint is None:
            request = dataclasses.replace(request, initial=read_initial(chosen.init, request.flags))
        device = distributed.choose_device(chosen.device)
    except BAD_INPUT as error:
        return fail("train", str(error), 2)
    except KeyboardInterrupt:  # to read the checkpoint of a large network takes seconds
        return fail("train", "stopped before the run began", 130)
    # Errors are reported inside the process group, because torchrun kills the other ranks once one exits.
    with distributed.processes(device), contextlib.ExitStack() as locks:
        return run_command(
            "train",
            lambda: prepare(source, request, device, locks),
            lambda prepared: train_and_evaluate(resuming(source, request), *prepared),
            again=f"continue with {resuming(source, request)}",
            smaller="lower --batch or --crop, or use --amp bf16 (a run with a checkpoint keeps them: in another --out)",
            stopped="stopped at once; --resume continues from the last checkpoint, if any",
            explained={checkpoints.CheckpointError: 1, engine.NonFiniteLoss: 1},
            everywhere=True,
        )


def resuming(source: Source, request: Request[Any]) -> str:
    """Return the command that continues a run."""
    return f"ccgpu train {shlex.quote(source.argument(request))} --resume --out {shlex.quote(str(request.out))}"


def check_resumed(plan: Plan[Settings], dataset: Dataset) -> None:
    """Raise ValueError if the run that a plan continues was trained on another dataset, or on other classes."""
    saved = plan.checkpoint
    if saved is None:
        return
    if saved["dataset"] != dataset.name:
        raise ValueError(
            f"--resume must name a run of {dataset.name}, got one of {saved['dataset']} in "
            f"{plan.checkpoint_path}; continue it with the command that began it."
        )
    iteration, position = saved["iteration"], saved["position"]
    if iteration > plan.settings.iterations or position != iteration * plan.settings.batch:
        raise ValueError(
            f"--resume must name a checkpoint of at most {plan.settings.iterations} iterations of "
            f"{plan.settings.batch} samples, got {plan.checkpoint_path} after {iteration} iterations and {position} "
            "samples; the file was changed: name another."
        )
    images = ImageFormat.from_plain(saved["images"])
    if images != dataset.images:
        raise ValueError(
            f"--resume must go on with images of {images}, as {plan.checkpoint_path} holds, got {dataset.name} with "
            f"{dataset.images}; put the former images back, or start a new run in another --out."
        )
    changed = "" if saved["labels"] is None else class_differences(saved["labels"], dataset.labels, exact=True)
    if changed:
        raise ValueError(
            f"--resume must go on with the classes of {plan.checkpoint_path}, got {dataset.name} with {changed}; "
            "write the dataset's classes as the checkpoint has them, or start a new run in another --out."
        )


def check_same_start(start: int, digest: str) -> None:
    """Raise ValueError, in all processes, unless all of them start at one iteration and train on the same images."""
    everyone = distributed.gather_values((start, digest))
    for rank, (theirs, images) in enumerate(everyone):
        if theirs != everyone[0][0]:
            raise ValueError(
                f"all processes must start at the same iteration, got {everyone[0][0]} on rank 0 and {theirs} on rank "
                f"{rank}; put --out on storage that all machines share, under the same path."
            )
        if images != everyone[0][1]:
            raise ValueError(
                f"all processes must train on the same images, got others on rank {rank} than on rank 0; put --data on "
                "storage that all machines share, or copy it to each of them whole."
            )


def presets(dataset: Dataset) -> Mapping[str | None, Mapping[str, Any]]:
    """Return the settings of each preset by name; None is the dataset's recipe, of which a preset changes a part."""
    return {None: dataset.recipe, **{name: {**dataset.recipe, **own} for name, own in dataset.presets.items()}}


def default_out(settings: Settings, dataset: Dataset) -> Path:
    """Return the run folder for a command line without --out."""
    start = "" if settings.init is None else f"-from-{name_of_network(Path(settings.init))}"
    if settings.preset is not None or start:
        preset = "" if settings.preset is None else f"-{settings.preset}"
        return Path("runs") / f"{dataset.name}{preset}{start}"
    context = f"r{settings.loops}" if settings.context == "rcca" else settings.context
    clip = f"-t{settings.clip}" if settings.clip > 1 else ""
    return Path("runs") / f"{dataset.name}-{settings.backbone.replace(':', '-')}-{context}{clip}"


def prepare(
    source: Source, request: Request[Settings], device: torch.device, locks: contextlib.ExitStack
) -> tuple[Plan[Settings], TrainingRun, Batches, set[int]]:
    """Open the dataset, build network and optimiser, load the checkpoint of a resumed run, then open the run folder.

    The run folder stays locked for other commands until `locks` is closed.

    Returns:
        The plan, the run, this process's training batches, and the iterations whose evaluation is recorded already.
    """
    opened = source.open(request, device)
    dataset = opened.dataset
    plan = request.plan(presets(dataset))
    check_resumed(plan, dataset)
    check_settings(plan.settings, dataset, distributed.launched_world_size(), device)
    settings, out = plan.settings, plan.out
    if plan.checkpoint is not None:  # the mean and std of the images may be others by now
        images = ImageFormat.from_plain(plan.checkpoint["images"])
        dataset = as_trained(dataset, images, plan.checkpoint["network"])
    elif request.initial is not None:
        dataset = normalised_as(dataset, request.initial)
    checkpoints.seed_all(settings.seed)
    # The network and its optimiser.
    precision = Precision(device, settings.amp, settings.channels_last)
    net = build_network(settings, dataset, device, pretrained=plan.checkpoint is None, initial=request.initial)
    frozen, optimiser, average = build_optimisation(settings, net)
    scaler = precision.scaler()
    # The images; a run continues only on the training images that it began with.
    training, evaluation = open_data(settings, opened, out)
    names = "\n".join(pair.name for clip in training for pair in clip)
    digest = hashlib.sha256(os.fsencode(names)).hexdigest()
    check_same_start(plan.start, digest)
    if plan.checkpoint is not None and plan.checkpoint_path is not None:
        averaged = None if average is None else average.net
        checkpoints.restore(plan.checkpoint, plan.checkpoint_path, digest, net, optimiser, scaler, averaged)
    normalise = Normalise(net.backbone.mean, net.backbone.std)
    batches = load_training(settings, dataset, training, normalise, plan.start, device)
    val_set, val_loader = load_evaluation(evaluation, dataset, normalise, settings, settings.workers, device)
    announcements.warn_of_shared_images(training, evaluation)
    recipe = Settings(**presets(dataset)[settings.preset])
    announcements.announce(plan, recipe, device, len(training), sum(len(clip) - first for clip, first in evaluation))
    weights = choose_class_weights(plan, opened, training)
    # The run folder comes last, so that nothing is written for a run that cannot start.
    locks.enter_context(only_writer(out))
    recorded = open_run_folder(plan, dataset.scores[0])
    run = TrainingRun(
        out=out,
        dataset=dataset,
        settings=dataclasses.asdict(settings),
        lengths=plan.lengths,
        scores=Scores.of(recorded, dataset.scores[0]),
        data_digest=digest,
        folder=opened.folder,
        class_weights=weights,
        batch=settings.batch,
        precision=precision,
        net=net,
        frozen=frozen,
        optimiser=optimiser,
        scaler=scaler,
        average=average,
        val_set=val_set,
        val_loader=val_loader,
        normalise=normalise,
        predict=settings.prediction(dataset.flip_pairs),
        boards=(),
        interrupts=DeferredInterrupts(),
    )
    # Before settings.json: where --extend is killed between the two, the checkpoint knows both lengths.
    if plan.needs_checkpoint:
        run.save(plan.start)
    write_settings(plan, device, dict(zip(dataset.labels.names, weights or (), strict=False)))
    if opened.report and is_main():
        write_atomically(out / REPORT, opened.report + "\n")
    run.boards = open_boards(out, plan.start, settings)
    return plan, run, batches, {record["iteration"] for record in recorded if record["kind"] == "evaluation"}


def train_and_evaluate(
    again: str, plan: Plan[Settings], run: TrainingRun, batches: Batches, evaluated: set[int]
) -> int:
    """Train from the iteration at which the plan starts, evaluate, and report; return the exit status."""
    settings = plan.settings
    update = Update(
        distributed.wrap(run.net, run.precision.device),
        run.optimiser,
        run.scaler,
        run.precision,
        settings.learning_rates(),
        settings.criterion(run.class_weights),
        accumulate=settings.accumulate,
        clip=settings.clip_gradients,
        frozen=run.frozen,
        average=run.average,
    )
    fed = saving(batches, run, settings, plan.start)
    steps = engine.train(update, fed, start=plan.start, interrupted=run.interrupts)
    finished = False
    with run.interrupts:
        try:
            # A checkpoint is written before it is evaluated: a run that was stopped between the two evaluates it now.
            if evaluation_due(settings, plan.start) and plan.start not in evaluated:
                run.evaluate(plan.start)
            # An extended run trains to its next evaluation at least, however many brought nothing before.
            ended = plan.start not in plan.lengths[:-1] and run.scores.stalled_at(plan.start, settings.patience)
            finished = ended or follow(steps, run, settings, plan.start)
        except engine.Interrupted:
            pass
        except RuntimeError as error:  # a scheduler's SIGTERM reaches the loaders' processes too, and ends them
            if not (run.interrupts() and is_lost_loader(error)):
                raise
        finally:
            for board in run.boards:
                board.close(finished=finished)
    if not finished:
        return fail(
            "train",
            f"stopped; continue with {again}",
            run.interrupts.exit_status,
        )
    if is_main():
        run.report()
    distributed.wait_for_all()
    return 0


def follow(steps: Iterator[engine.Step], run: TrainingRun, settings: Settings, start: int) -> bool:
    """Run the training steps, with records, checkpoints and evaluations between them; return False if interrupted.

    With --patience the steps may end early.
    """
    bar = tqdm(
        total=settings.iterations,
        initial=start,
        unit="step",
        disable=not is_main(),
        mininterval=distributed.bar_interval(),
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
                if run.scores.stalled_at(now, settings.patience):
                    return True
            clock += time.perf_counter() - pause  # images/s is the speed of training alone
    return True


def saving(batches: Batches, run: TrainingRun, settings: Settings, start: int) -> Iterator[dict[str, Any]]:
    """Yield the training batches; where one cannot be read, write a checkpoint of the last step before the error.

    Nothing was computed with such a batch, so network, optimiser and random states are those after that step. The first
    of several processes writes the checkpoint only if its own batch cannot be read: else it is amid the next step.
    """
    done = start
    try:
        for batch in batches:
            yield batch
            done += 1
    except Exception:
        saved = done == start or done % settings.save_every == 0 or evaluation_due(settings, done)
        if not saved:
            run.save(done)
            say(f"a batch cannot be read: saved the state after step {done}")
        raise


def evaluation_due(settings: Settings, iteration: int) -> bool:
    """Return whether the network is evaluated after `iteration` steps."""
    if iteration == 0:
        return settings.baselines
    periodic = settings.eval_every > 0 and iteration % settings.eval_every == 0
    return periodic or iteration == settings.iterations
