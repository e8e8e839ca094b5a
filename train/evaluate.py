"""Evaluate a trained network: `ccgpu evaluate --checkpoint RUN/last.pt --data PATH`.

Images are predicted whole or in sliding windows, at several scales (`--scales`), also flipped (`--flip`). Flags
default to the values of the run's own evaluation, including the dataset; for a published or converted file to what it
says of its evaluation, as in mmsegmentation's config, and else to the dataset's recipe. `--save-predictions DIR` writes
the label files that a test server takes, also for images without labels (`--unlabelled`).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from ccgpu.models import checkpoint
from ccgpu.models.ccnet import CCNet
from ccgpu.models.image_files import EXIF
from ccgpu.models.normalisation import Normalise
from ccgpu.models.precision import AMP_DTYPES, Precision, amp_problems
from ccgpu.models.prediction import AVERAGES, LARGEST_SIDE, MODES, Prediction
from ccgpu.train import distributed, engine
from ccgpu.train.data.clips import Clip, evaluation_clips
from ccgpu.train.data.pairs import Pair
from ccgpu.train.data.submission import save_prediction
from ccgpu.train.dataset import Dataset
from ccgpu.train.distributed import say
from ccgpu.train.loaders import LOADERS, is_lost_loader
from ccgpu.train.metrics import results_table, scores_line
from ccgpu.train.runs import records
from ccgpu.train.runs.data_check import check_data
from ccgpu.train.runs.errors import BAD_FILE, fail, run_command
from ccgpu.train.runs.flags import (
    add_checkpoint,
    add_device,
    add_value_range,
    chosen_range,
    saved_values,
    without_excluded,
)
from ccgpu.train.runs.folder import settings_of_run
from ccgpu.train.runs.interrupts import DeferredInterrupts
from ccgpu.train.runs.outputs import add_overwrite, check_output_folder, check_outputs, check_outside
from ccgpu.train.runs.parser import command_parser
from ccgpu.train.runs.prediction_flags import add_scales, add_sizes, chosen_scales, chosen_sizes, height_width
from ccgpu.train.runs.settings.evaluation import EvaluationSettings
from ccgpu.train.runs.settings.limits import MOST_WORKERS
from ccgpu.train.runs.settings.training import Settings
from ccgpu.train.runs.setup import (
    UNCHECKED,
    dataset_of_network,
    load_evaluation,
    place_network,
    read_network,
    reading_of,
)


@dataclass(frozen=True)
class Evaluation:
    """A prepared evaluation: the network, the images and how they are predicted.

    Attributes:
        iteration: steps that the network was trained for; None for a converted or published network.
        settings: the run's settings, changed by the flags.
        dataset: classes and official scores.
        net: the network with its weights, on its device.
        loader: this process's share of the images.
        precision: device, autocast dtype and memory format.
        predict: network input -> class scores.
    """

    iteration: int | None
    settings: Settings
    dataset: Dataset
    net: CCNet
    loader: DataLoader[dict[str, Any]]
    precision: Precision
    predict: Prediction


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 finished, 1 failed, 2 bad input, 130 or 143 stopped."""
    flags = read_flags(argv)
    try:
        device = distributed.choose_device(flags.device)
    except ValueError as error:
        return fail("evaluate", str(error), 2)
    with distributed.processes(device):
        return run_command(
            "evaluate",
            lambda: prepare(flags, device),
            lambda evaluation: score(flags, evaluation),
            again="run the command again",
            smaller="use --mode sliding or --amp bf16",
            refused=BAD_FILE,
            everywhere=True,
        )


def read_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; None for those left out, whose values come from the checkpoint's settings."""
    usage = "--checkpoint FILE [--data PATH] [flags]"
    parser = command_parser("evaluate", __doc__, usage)
    group = parser.add_argument_group("network and data")
    add = group.add_argument
    add_checkpoint(group)
    add("--data", type=Path, metavar="PATH", help="the dataset's folder (default: the run's)")
    add("--dataset", metavar="MODULE", help="module with a DATASET (default: the run's)")
    add("--split", nargs="+", metavar="NAME", help="splits to evaluate on (default: the run's)")
    add("--unlabelled", action="store_true", help="the images have no labels: save predictions, score nothing")
    add("--exif", choices=EXIF, help="leave pixels as stored, or turn images upright (default: the run's)")
    add_value_range(group, "the run's")
    add("--max-pixels", type=int, metavar="N", help="largest image that is read (default: the run's)")
    add("--check", action=argparse.BooleanOptionalAction, help="decode every file first (default: the run's)")
    group = parser.add_argument_group("prediction")
    add = group.add_argument
    add("--mode", choices=MODES, help="whole images or sliding windows (default: the run's)")
    add("--window", type=int, nargs="+", metavar="N", help="window in pixels, H W or N (default: the run's)")
    add("--stride", type=int, nargs="+", metavar="N", help="window step in pixels, H W or N (default: the run's)")
    add_scales(group, "the run's")
    add("--flip", action=argparse.BooleanOptionalAction, help="average with the flipped image (default: the run's)")
    add("--average", choices=AVERAGES, help="average logits or probabilities (default: the run's)")
    add_sizes(group, "the run's")
    group = parser.add_argument_group("results")
    add = group.add_argument
    add("--save-predictions", type=Path, metavar="DIR", help="write each prediction as a file of label ids")
    add_overwrite(group, "predictions that exist in DIR")
    add("--record", type=Path, metavar="FILE", help="append the scores to this file of JSON lines")
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--amp", choices=tuple(AMP_DTYPES), help="autocast (default: the run's)")
    add("--channels-last", action=argparse.BooleanOptionalAction, help="NHWC memory format (default: the run's)")
    add("--compile", action=argparse.BooleanOptionalAction, help="compile with torch.compile (default: the run's)")
    add_device(group)
    add("--workers", type=int, default=LOADERS, metavar="N", help=f"loader processes (default: {LOADERS})")
    return parser.parse_args(argv)


def prepare(flags: argparse.Namespace, device: torch.device) -> Evaluation:
    """Read the checkpoint, find the images, and check that the results can be written.

    Raises:
        ValueError, OSError, ImportError: flags, data or a checkpoint that cannot be used.
    """
    if not 0 <= flags.workers <= MOST_WORKERS:
        raise ValueError(f"--workers must be from 0 to {MOST_WORKERS}, got {flags.workers}")
    if flags.unlabelled and flags.save_predictions is None:
        raise ValueError("--unlabelled must come with --save-predictions DIR: without labels there is nothing to score")
    if flags.unlabelled and flags.record is not None:
        raise ValueError("--record must not come with --unlabelled: without labels there are no scores to record")
    found = read_network(flags.checkpoint)
    dataset = dataset_of_network(found, flags.dataset, flags.data)
    run = found.run
    kind = Settings if run is None else settings_of_run(run)
    settings = evaluation_settings(recipe_of(found, dataset) if run is None else run["settings"], flags, kind)
    if problems := amp_problems(settings.amp, device):
        raise ValueError(problems[0])
    predict = settings.prediction(dataset.flip_pairs)
    net = place_network(checkpoint.build(found), settings, device)
    clips = find_clips(flags, settings, dataset)
    check_places(flags, [pair for clip, _ in clips for pair in clip])
    normalise = Normalise(net.backbone.mean, net.backbone.std)
    _, loader = load_evaluation(clips, dataset, normalise, settings, flags.workers, device)
    if distributed.is_main():
        make_places(flags)
    distributed.wait_for_all()
    iteration = None if run is None else run["iteration"]
    origin = found.source if run is None else f"iteration {iteration}"
    what = "images" if settings.clip == 1 else f"clips of up to {settings.clip} images"
    if run is None:
        for note in found.notes:
            say(f"note: {note}")
    kept = kept_of_file(found, settings)
    say(f"{flags.checkpoint}, {origin}: {dataset.name}, {len(clips)} {what}, {describe(predict)}{kept}")
    precision = Precision(device, settings.amp, settings.channels_last)
    return Evaluation(iteration, settings, dataset, net, loader, precision, predict)


def recipe_of(found: checkpoint.Checkpoint, dataset: Dataset) -> dict[str, Any]:
    """Return the settings for a converted or published network: the dataset's recipe, with what the file says.

    Raises:
        ValueError: the network is for clips, whose length is not in the file.
    """
    if found.network.get("dims", 2) == 3:
        raise ValueError(
            "--checkpoint must be a run's last.pt for a network for clips, got a file that lacks their length"
        )
    asked: dict[str, Any] = {**evaluation_of(found)}
    if found.value_range is not None:
        asked["value_range"] = found.value_range
    return dataclasses.asdict(Settings(**without_excluded(Settings, {**dataset.recipe, **asked}, asked)))


def evaluation_of(found: checkpoint.Checkpoint) -> dict[str, Any]:
    """Return the settings of the evaluation that a converted or published file holds, by name."""
    told = {name: value for name, value in found.prediction.items() if name != "flip_pairs"}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}


def kept_of_file(found: checkpoint.Checkpoint, settings: Settings) -> str:
    """Return a text that names the settings which a converted or published file gave; empty for a run's."""
    told = {} if found.run is not None else evaluation_of(found)
    if settings.mode == "whole":
        told = {name: value for name, value in told.items() if name not in ("window", "stride")}
    kept = [name.replace("_", " ") for name, value in told.items() if getattr(settings, name) == value]
    return f" ({', '.join(kept)} as in the file)" if kept else ""


def find_clips(flags: argparse.Namespace, settings: Settings, dataset: Dataset) -> list[tuple[Clip, int]]:
    """Return the checked clips to evaluate on; a split that is named twice counts once.

    Raises:
        ValueError, OSError: images are missing or unusable, or predictions of two of them would have the same name.
    """
    root = data_folder(flags, settings)
    found = [dataset.find_pairs(root, split, not flags.unlabelled) for split in dict.fromkeys(settings.val_split)]
    pairs = [pair for split in found for pair in split]
    names = Counter(pair.name for pair in pairs)
    if flags.save_predictions is not None and len(names) < len(pairs):
        raise ValueError(
            f"--save-predictions must come with images of different names, got {names.most_common(1)[0][0]!r} more "
            f"than once in {' '.join(settings.val_split)}; evaluate one split at a time."
        )
    clips = [clip for split in found for clip in evaluation_clips(split, settings.clip, dataset.frame_of)]
    if settings.check:
        frames = [clip for clip, _ in clips]
        check_data(root, [], pairs, dataset.labels, reading_of(settings, dataset), flags.workers > 0, frames)
    else:
        say(UNCHECKED)
    return clips


def check_places(flags: argparse.Namespace, pairs: Sequence[Pair]) -> None:
    """Raise ValueError if a result has no place, or would replace or lie beside an image or label file.

    Without --overwrite an earlier result is not replaced either.
    """
    inputs = {flags.checkpoint: None}
    inputs |= {path: None for pair in pairs for path in (pair.image, pair.label) if path is not None}
    if flags.save_predictions is not None:
        files = {flags.save_predictions / f"{pair.name}.png": None for pair in pairs}
        check_output_folder("--save-predictions", flags.save_predictions)
        check_outputs("--save-predictions", files, inputs, overwrite=flags.overwrite)
        check_outside(
            "--save-predictions", flags.save_predictions, [path for path in inputs if path != flags.checkpoint]
        )
    if flags.record is not None:  # scores are appended to it
        if flags.record.is_dir():
            raise ValueError(f"--record must be a file, got the folder {flags.record}; add a name.")
        if not (flags.record.exists() or flags.record.is_symlink()):
            check_output_folder("--record", flags.record)
        check_outputs("--record", [flags.record], inputs, overwrite=True)


def make_places(flags: argparse.Namespace) -> None:
    """Make the folder and the file of the results before the evaluation, which may take hours.

    Raises:
        ValueError: one of them cannot be written.
    """
    flag = "--save-predictions"
    try:
        if flags.save_predictions is not None:
            flags.save_predictions.mkdir(parents=True, exist_ok=True)
        flag = "--record"
        if flags.record is not None:
            flags.record.parent.mkdir(parents=True, exist_ok=True)
            flags.record.open("a").close()
    except OSError as error:
        raise ValueError(f"{flag} must be a path that can be written, got {error}; name another.") from error


def score(flags: argparse.Namespace, evaluation: Evaluation) -> int:
    """Predict the images, save the predictions, print and record the scores; return the exit status."""
    settings, labels = evaluation.settings, evaluation.dataset.labels
    bar = tqdm(
        evaluation.loader,
        unit="image" if settings.clip == 1 else "clip",
        disable=not distributed.is_main(),
        mininterval=distributed.bar_interval(),
    )

    def save(name: str, classes: torch.Tensor) -> None:
        if flags.save_predictions is not None:
            save_prediction(flags.save_predictions, name, classes.cpu().numpy(), labels)

    confusion = None
    with DeferredInterrupts() as interrupts, bar:
        try:
            confusion = engine.evaluate(
                evaluation.net,
                bar,
                num_classes=labels.num_classes,
                precision=evaluation.precision,
                predict=evaluation.predict,
                interrupted=interrupts,
                seen=save,
            )
        except engine.Interrupted:
            pass
        except RuntimeError as error:  # a scheduler's SIGTERM reaches the loaders' processes too, and ends them
            if not (interrupts() and is_lost_loader(error)):
                raise
    if confusion is None:
        return fail("evaluate", "stopped", interrupts.exit_status)
    if not distributed.is_main():
        return 0
    if not flags.unlabelled:
        say(f"\n{results_table(confusion, labels.names)}\n\n{scores_line(confusion, evaluation.dataset.scores)}")
    if flags.record is not None:
        record = records.evaluation_record(evaluation.iteration, confusion, labels.names)
        what = {"dataset": evaluation.dataset.name, "checkpoint": str(flags.checkpoint)}
        how = {"split": list(settings.val_split), **dataclasses.asdict(evaluation.predict)}
        records.append_record(flags.record, {**record, **what, **how, "commit": records.commit()})
    if flags.save_predictions is not None:
        say(f"predictions: {flags.save_predictions}")
    return 0


def evaluation_settings(saved: dict[str, Any], flags: argparse.Namespace, kind: type[Settings] = Settings) -> Settings:
    """Return the run's settings, which are of this kind, changed by the flags.

    Raises:
        ValueError: the settings are of another version, or a flag is out of its range or without effect.
    """
    values = saved_values(kind, saved, "--checkpoint")
    changes: dict[str, Any] = {
        "val_split": None if flags.split is None else tuple(flags.split),
        "mode": flags.mode,
        "window": None if flags.window is None else height_width("--window", flags.window),
        "stride": None if flags.stride is None else height_width("--stride", flags.stride),
        "scales": chosen_scales(flags.scales),
        "flip": flags.flip,
        "average": flags.average,
        **chosen_sizes(flags),
        "amp": flags.amp,
        "channels_last": flags.channels_last,
        "compile": flags.compile,
        "exif": flags.exif,
        "value_range": chosen_range(flags.value_range, None),
        "max_pixels": flags.max_pixels,
        "check": flags.check,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    settings = kind(**without_excluded(kind, {**values, **given}, given))
    if settings.max_pixels < 1:
        raise ValueError(f"--max-pixels must be 1 or more, got {settings.max_pixels}")
    if settings.mode != "sliding" and (flags.window is not None or flags.stride is not None):
        raise ValueError(
            f"--window and --stride must come with sliding windows, got mode {settings.mode}; add --mode sliding."
        )
    if settings.mode == "sliding" and max(settings.window) > LARGEST_SIDE:
        raise ValueError(f"--window must be at most {LARGEST_SIDE}, got {max(settings.window)}")
    if problems := EvaluationSettings.problems(settings):
        raise ValueError("; ".join(problems))
    return settings


def data_folder(flags: argparse.Namespace, settings: Settings) -> Path:
    """Return --data, else the folder that the run was trained on: its --data, or its synthetic images.

    Raises:
        ValueError: --data is left out, and the run's folder does not exist.
    """
    if flags.data is not None:
        return flags.data
    folder = flags.checkpoint.parent / "scenes" if settings.data is None else Path(settings.data)
    if not folder.is_dir():
        raise ValueError(f"--data must name the dataset's folder, got nothing, and {folder} is not there")
    return folder


def describe(predict: Prediction) -> str:
    """Return a text that describes how images are predicted."""
    scales = f"scales {', '.join(map(str, predict.scales))}"
    base = f"short side {predict.short_side}, " if predict.short_side is not None else ""
    base += f"long side {predict.long_side} at most, " if predict.long_side is not None else ""
    base += f"largest size in {predict.fit}, " if predict.fit is not None else ""
    window = ""
    if predict.mode == "sliding" and predict.window is not None and predict.stride is not None:
        window = " windows of {}x{} every {}x{} pixels".format(*predict.window, *predict.stride)
    return f"{predict.mode}{window}, {base}{scales}{', flipped too' if predict.flip else ''}, mean of {predict.average}"


if __name__ == "__main__":
    sys.exit(main())
