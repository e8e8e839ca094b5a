"""Predict images and videos: `ccgpu predict --checkpoint X INPUT... --out DIR`.

INPUT is an image, a folder, a pattern ("photos/*.jpg") or a video. X is a run's `last.pt`, a file of `ccgpu convert`,
or a published checkpoint; normalisation, image size and classes come from it. For each image, DIR gets masks/NAME.png
with a palette of the classes' colours, overlays/NAME.jpg, ids/NAME.png with label ids, and a line in predictions.jsonl;
sheet.jpg shows the first images. A video becomes a folder of frames in each of masks, overlays and ids, and
overlays/NAME.mp4. In Python: `ccgpu.models.segmenter`.
"""

from __future__ import annotations

import argparse
import errno
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ccgpu.models import checkpoint
from ccgpu.models.image_files import BadImage
from ccgpu.models.image_format import Pixels
from ccgpu.models.labels import Labels
from ccgpu.models.precision import AMP_DTYPES, amp_problems
from ccgpu.models.prediction import NonFiniteScores, Prediction
from ccgpu.models.segmentation import OPACITY, Segmentation
from ccgpu.models.segmenter import SMALLEST_TILE, Segmenter
from ccgpu.models.tiles import TILE, Tile
from ccgpu.train import distributed, engine
from ccgpu.train.data.checking import notes
from ccgpu.train.data.facts import Facts, open_with_facts
from ccgpu.train.data.inputs import Input, find_inputs
from ccgpu.train.data.video import Video, VideoWriter
from ccgpu.train.dataset import check_classes
from ccgpu.train.distributed import say
from ccgpu.train.prediction_files import KINDS, PredictionFiles, result_paths
from ccgpu.train.runs.errors import BAD_FILE, fail, is_out_of_memory, run_command
from ccgpu.train.runs.flags import (
    add_checkpoint,
    add_device,
    add_max_pixels,
    add_value_range,
    chosen_range,
    flag,
)
from ccgpu.train.runs.interrupts import DeferredInterrupts
from ccgpu.train.runs.outputs import add_overwrite, check_output_folder, check_outputs
from ccgpu.train.runs.parser import command_parser
from ccgpu.train.runs.prediction_flags import add_scales, add_sizes, chosen_scales, chosen_sizes
from ccgpu.train.runs.setup import dataset_of_network, read_network

Predict: TypeAlias = Callable[[Pixels], Segmentation]
SHOWN_CLASSES = 20  # names that are printed
MANY_TILES = 8  # from so many tiles an image is worth a progress bar
# What stops writing for all inputs: a disk that is full, over its quota, or read-only.
NO_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    0: all inputs were predicted. 1: some were not, each named on stderr. 2: bad flags, checkpoint or inputs.
    130, 143: stopped by Ctrl-C, SIGTERM.
    """
    flags = read_flags(argv)
    return run_command(
        "predict",
        lambda: prepare(flags),
        lambda prepared: predict_all(flags, *prepared),
        again="run the command again",
        smaller="use a smaller --tile",
        refused=BAD_FILE,
    )


def read_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags."""
    parser = command_parser("predict", __doc__, "INPUT... --checkpoint FILE [flags]")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="images, folders, patterns, videos")
    group = parser.add_argument_group("network")
    add = group.add_argument
    add_checkpoint(group)
    add("--dataset", metavar="MODULE", help="dataset that defines the network's classes (default: the checkpoint's)")
    group = parser.add_argument_group("prediction")
    add = group.add_argument
    add_scales(group, "1")
    add(
        "--flip",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="average with the flipped image (default: no)",
    )
    add_sizes(group, "the network's")
    add(
        "--tile",
        type=int,
        default=TILE,
        metavar="N",
        help=f"cut images of more than 2 N x N pixels into tiles of this side; 0: never (default: {TILE})",
    )
    add("--every", type=int, default=1, metavar="N", help="predict every N-th frame of a video (default: 1)")
    add_value_range(group, "the network's")
    add_max_pixels(group)
    group = parser.add_argument_group("results")
    add = group.add_argument
    add(
        "--out",
        type=Path,
        default=Path("predicted"),
        metavar="DIR",
        help="folder for the results (default: predicted, here)",
    )
    add("--write", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of files to write (default: all)")
    add("--opacity", type=float, default=OPACITY, metavar="SHARE", help=f"of overlays, 0 to 1 (default: {OPACITY})")
    add("--legend", action="store_true", help="show the classes' names and colours below overlays")
    add_overwrite(group, "results that exist in DIR")
    group = parser.add_argument_group("run")
    group.add_argument("--amp", choices=tuple(AMP_DTYPES), default="off", help="autocast (default: off)")
    add_device(group)
    flags = parser.parse_args(argv)
    flags.write = [kind for kind in KINDS if kind in flags.write]
    return flags


def prepare(flags: argparse.Namespace) -> tuple[Segmenter, Prediction, list[Input]]:
    """Return the network, how it predicts, and the inputs, and create the folders for the results.

    Raises:
        ValueError, OSError, ImportError, TypeError: flags, inputs or a checkpoint that cannot be used.
    """
    check_flags(flags)
    sizes = chosen_sizes(flags)
    device = distributed.choose_device(flags.device)
    if problems := amp_problems(flags.amp, device):
        raise ValueError(problems[0])
    for folder in (flags.out, *(flags.out / kind for kind in flags.write)):
        check_output_folder("--out", folder)
    inputs, left_out = find_inputs(flags.inputs, flags.out)
    if not inputs:
        raise ValueError(f"INPUT must name other files than the results in --out, got {len(left_out)} of these alone.")
    files = result_paths(flags.out, flags.write, inputs)
    check_outputs("--out", files, [entry.path for entry in inputs] + [flags.checkpoint], overwrite=flags.overwrite)
    found = read_network(flags.checkpoint)
    segmenter = Segmenter.of_checkpoint(
        found,
        labels=labels_of(found, flags.dataset),
        value_range=chosen_range(flags.value_range, found.value_range),
        device=device,
        amp=flags.amp,
        max_pixels=flags.max_pixels,
    )
    how = segmenter.settings(chosen_scales(flags.scales) or (1.0,), flags.flip, **sizes)
    if left_out:
        say(f"note: the files below --out are results, not inputs: {len(left_out)} are left out")
    say(told_size(how, flags.tile, [flag(name) for name in sizes]))
    say(told_classes(segmenter.labels))
    for kind in flags.write:
        (flags.out / kind).mkdir(parents=True, exist_ok=True)
    return segmenter, how, inputs


def check_flags(flags: argparse.Namespace) -> None:
    """Raise ValueError if a number is out of its range."""
    if flags.tile != 0 and flags.tile < SMALLEST_TILE:
        raise ValueError(f"--tile must be 0, or {SMALLEST_TILE} or more, got {flags.tile}")
    for name, least in (("every", 1), ("max_pixels", 1)):
        if getattr(flags, name) < least:
            raise ValueError(f"{flag(name)} must be {least} or more, got {getattr(flags, name)}")
    if not 0 <= flags.opacity <= 1:
        raise ValueError(f"--opacity must be from 0 to 1, got {flags.opacity}")


def told_size(how: Prediction, tile: int, given: Sequence[str]) -> str:
    """Return at which size images are predicted, and why; `given` names the flags that ask for it."""
    why = ", ".join(given) or "as in the network's training; --short-side changes it"
    large = f"those of more than 2 x {tile} x {tile} pixels"
    if how.short_side is not None:
        most = "" if how.long_side is None else f", to a long side of {how.long_side} at most"
        size = f"resized to a short side of {how.short_side} pixels{most} ({why})"
    elif how.fit is not None:
        size = f"resized to fit into {how.fit[0]} x {how.fit[1]} pixels ({why})"
    else:
        size = "at their own size (--short-side resizes them)"
    if tile == 0:
        cut = "none is cut (--tile 0)"
    elif how.short_side is None and how.fit is None:
        cut = f"{large} in tiles of {tile} x {tile} (--tile)"
    else:
        cut = f"{large} are shrunk to so many first (--tile)"
    scales = "" if how.scales == (1.0,) else f", at the scales {' '.join(f'{scale:g}' for scale in how.scales)}"
    return f"images: {size}{scales}{', also flipped' if how.flip else ''}; {cut}"


def told_classes(labels: Labels) -> str:
    """Return the number of the classes and the names of the first."""
    more = f" and {labels.num_classes - SHOWN_CLASSES} more" if labels.num_classes > SHOWN_CLASSES else ""
    return f"classes: {labels.num_classes}: {', '.join(labels.names[:SHOWN_CLASSES])}{more}"


def labels_of(found: checkpoint.Checkpoint, dataset: str | None) -> Labels:
    """Return the classes of a checkpoint's network: from --dataset, else from the file, else numbered ones.

    Raises:
        ValueError: there is no such dataset, or the network was trained on other classes.
    """
    number = found.network["num_classes"]
    if dataset is not None:
        return dataset_of_network(found, dataset).labels
    if found.labels is None:
        return Labels.numbered(number)
    labels = Labels.from_plain(found.labels)
    check_classes(labels, number, "the file's classes")
    return labels


def predict_all(flags: argparse.Namespace, segmenter: Segmenter, how: Prediction, inputs: Sequence[Input]) -> int:
    """Predict all inputs and return the exit status; an input that fails is reported and does not stop the others."""
    files = PredictionFiles(flags.out, flags.write, segmenter.labels, flags.opacity, legend=flags.legend)
    facts: dict[Path, Facts] = {}
    failed = 0
    bar = tqdm(inputs, unit="input", mininterval=distributed.bar_interval())
    with DeferredInterrupts() as interrupts, bar:
        for entry in bar:
            bar.set_postfix_str(entry.name, refresh=False)
            try:
                progress = partial(follow, interrupts=interrupts)
                predict = partial(segmenter.predict_decoded, how=how, tile=flags.tile, progress=progress)
                if entry.is_video:
                    predict_video(flags, segmenter, predict, files, entry, interrupts)
                else:
                    facts[entry.path] = predict_image(segmenter, predict, files, entry)
            except engine.Interrupted:
                break
            except Exception as error:
                failed += 1
                bar.write(f"predict: {why_failed(error, entry.path)}", file=sys.stderr)
            if interrupts():
                break
    files.finish()
    for line in notes(facts, segmenter.value_range, raw=segmenter.images.raw):
        say(line)
    if interrupts():
        return fail("predict", "stopped", interrupts.exit_status)
    if failed == len(inputs):
        return fail("predict", f"{'the input' if failed == 1 else f'all {failed} inputs'} failed, see above", 1)
    if failed:
        return fail("predict", f"{failed} of {len(inputs)} inputs failed, see above; the others are in {flags.out}", 1)
    return 0


def follow(tiles: Sequence[Tile], interrupts: DeferredInterrupts) -> Iterator[Tile]:
    """Yield the tiles of an image, with a progress bar where there are many.

    Raises:
        engine.Interrupted: the command was asked to stop; the image is left without results.
    """
    few = len(tiles) < MANY_TILES
    for tile in tqdm(tiles, unit="tile", leave=False, disable=few, mininterval=distributed.bar_interval()):
        if interrupts():
            raise engine.Interrupted("predict: stopped between two tiles")
        yield tile


def why_failed(error: Exception, path: Path) -> str:
    """Return why an input failed: in one line, or with the traceback where it may be a mistake of this program.

    Raises:
        OSError, RuntimeError: `error` itself, if every other input would fail by it: the disk takes no more files, or
            the device is lost.
    """
    if (isinstance(error, OSError) and error.errno in NO_DISK) or str(error).startswith("CUDA error"):
        raise error
    if is_out_of_memory(error):
        # The traceback's frames hold the tensors of the image that failed.
        traceback.clear_frames(error.__traceback__)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        first = str(error).partition("\n")[0] or type(error).__name__
        return f"{path}: out of memory ({first}); use a smaller --tile or --short-side"
    if isinstance(error, (BadImage, FileNotFoundError, ModuleNotFoundError)):
        return str(error)
    if isinstance(error, (NonFiniteScores, OSError)):
        return f"{path}: {error}"
    lines = "".join(traceback.format_exception(error)).rstrip()
    return f"{path}: unexpected {type(error).__name__}: {error}; please report it with what follows\n{lines}"


def predict_image(segmenter: Segmenter, predict: Predict, files: PredictionFiles, entry: Input) -> Facts:
    """Predict an image, write its files, and return what its file is.

    Raises:
        BadImage, FileNotFoundError: the image cannot be read, or its file is damaged.
    """
    pixels, found = open_with_facts(
        entry.path, segmenter.images, value_range=segmenter.value_range, max_pixels=segmenter.max_pixels
    )
    files.write(entry.name, str(entry.path), predict(pixels))
    return found


def predict_video(
    flags: argparse.Namespace,
    segmenter: Segmenter,
    predict: Predict,
    files: PredictionFiles,
    entry: Input,
    interrupts: DeferredInterrupts,
) -> None:
    """Predict the frames of a video: write files NAME/000000 ..., counted from 0, and a video of the overlays.

    Raises:
        BadImage: the video cannot be read to its end; the files of earlier frames stay.
        engine.Interrupted: the command was asked to stop; they stay too.
        ModuleNotFoundError: the package that reads videos is not installed.
    """
    written = 0
    writer: VideoWriter | None = None
    try:
        with ExitStack() as stack:
            video = stack.enter_context(Video(entry.path))
            if "overlays" in flags.write:
                path = flags.out / "overlays" / f"{entry.name}.mp4"
                writer = stack.enter_context(VideoWriter(path, video.rate / flags.every))
            bar = tqdm(video, total=video.frames, unit="frame", desc=entry.path.name, leave=False, mininterval=1.0)
            for number, frame in enumerate(stack.enter_context(bar)):
                if interrupts():  # an exception, so that no part of the overlay video stays
                    raise engine.Interrupted("predict: stopped between two frames")
                if number % flags.every:
                    continue
                found = predict(segmenter.images.convert(Image.fromarray(frame)))
                overlay = files.write(f"{entry.name}/{number:06d}", f"{entry.path}#{number}", found, is_frame=True)
                written += 1
                if writer is not None:
                    writer.add(np.asarray(overlay))
        if writer is not None:
            files.add(writer.path)
    except BadImage as error:
        if not written:
            raise
        raise BadImage(f"{error} The files of {written} frames are in {flags.out}.") from error


if __name__ == "__main__":
    sys.exit(main())
