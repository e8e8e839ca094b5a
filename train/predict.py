"""Predict images and videos: `ccgpu predict --checkpoint X INPUT... --out DIR`.

INPUT is an image, a folder, a pattern ("photos/*.jpg") or a video. X is a run's `last.pt`, a file of `ccgpu convert`,
or a published checkpoint; normalisation, image size and classes come from it. For each image, DIR gets masks/NAME.png
in the classes' colours, overlays/NAME.jpg, ids/NAME.png with label ids, and a line in predictions.jsonl; sheet.jpg
shows the first images. A video becomes a folder of frames in each of masks, overlays and ids, and overlays/NAME.mp4.
"""

from __future__ import annotations

import argparse
import errno
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ccgpu.models import checkpoint
from ccgpu.models.image_files import BadImage
from ccgpu.models.image_format import Pixels
from ccgpu.models.labels import Labels
from ccgpu.models.network_input import PixelInput
from ccgpu.models.normalisation import Normalise
from ccgpu.models.precision import AMP_DTYPES, Precision, amp_problems
from ccgpu.models.prediction import LARGEST_SIDE, NonFiniteScores, Prediction
from ccgpu.models.tiles import TILE, Tile, predict_classes
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
    add_scales,
    add_value_range,
    chosen_range,
    chosen_scales,
    flag,
)
from ccgpu.train.runs.interrupts import DeferredInterrupts
from ccgpu.train.runs.outputs import add_overwrite, check_output_folder, check_outputs
from ccgpu.train.runs.parser import command_parser
from ccgpu.train.runs.setup import dataset_of_network, read_network

SMALLEST_TILE = 32  # pixels; a few positions of a feature map, and still fewer than 2000 tiles a million pixels
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
    parser = command_parser("predict", __doc__, "INPUT... --checkpoint FILE --out DIR [flags]")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="images, folders, patterns, videos")
    group = parser.add_argument_group("network")
    add = group.add_argument
    add_checkpoint(group)
    add("--dataset", metavar="MODULE", help="dataset that defines the network's classes (default: the checkpoint's)")
    group = parser.add_argument_group("prediction")
    add = group.add_argument
    add_scales(group, "1")
    add("--flip", action=argparse.BooleanOptionalAction, default=False, help="average with the flipped image")
    add(
        "--short-side",
        type=int,
        metavar="N",
        help="resize images to this short side for the network, in pixels (default: the network's)",
    )
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
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    add("--write", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of files to write (default: all)")
    add("--opacity", type=float, default=0.55, metavar="SHARE", help="opacity of overlays, 0 to 1 (default: 0.55)")
    add_overwrite(group, "results that exist in DIR")
    group = parser.add_argument_group("run")
    group.add_argument("--amp", choices=tuple(AMP_DTYPES), default="off", help="autocast (default: off)")
    add_device(group)
    flags = parser.parse_args(argv)
    flags.write = [kind for kind in KINDS if kind in flags.write]
    return flags


def prepare(flags: argparse.Namespace) -> tuple[Predictor, list[Input]]:
    """Return the network and the inputs, and create the folders for the results.

    Raises:
        ValueError, OSError, ImportError, TypeError: flags, inputs or a checkpoint that cannot be used.
    """
    if problems := amp_problems(flags.amp, distributed.choose_device(flags.device)):
        raise ValueError(problems[0])
    for folder in (flags.out, *(flags.out / kind for kind in flags.write)):
        check_output_folder("--out", folder)
    inputs, left_out = find_inputs(flags.inputs, flags.out)
    if not inputs:
        raise ValueError(f"INPUT must name other files than the results in --out, got {len(left_out)} of these alone.")
    files = result_paths(flags.out, flags.write, inputs)
    check_outputs("--out", files, [entry.path for entry in inputs] + [flags.checkpoint], overwrite=flags.overwrite)
    predictor = Predictor(flags)
    if left_out:
        say(f"note: the files below --out are results, not inputs: {len(left_out)} are left out")
    for kind in flags.write:
        (flags.out / kind).mkdir(parents=True, exist_ok=True)
    return predictor, inputs


class Predictor:
    """A network as a function of images of any size that returns their classes.

    A network for clips gets each image, or each frame, as a clip of one.

    Raises:
        ValueError, OSError, ImportError: a checkpoint or flags that cannot be used.
    """

    def __init__(self, flags: argparse.Namespace) -> None:
        if flags.tile != 0 and flags.tile < SMALLEST_TILE:
            raise ValueError(f"--tile must be 0, or {SMALLEST_TILE} or more, got {flags.tile}")
        for name, least in (("every", 1), ("max_pixels", 1)):
            if getattr(flags, name) < least:
                raise ValueError(f"{flag(name)} must be {least} or more, got {getattr(flags, name)}")
        if not 0 <= flags.opacity <= 1:
            raise ValueError(f"--opacity must be from 0 to 1, got {flags.opacity}")
        if flags.short_side is not None and not 1 <= flags.short_side <= LARGEST_SIDE:
            raise ValueError(f"--short-side must be from 1 to {LARGEST_SIDE} pixels, got {flags.short_side}")
        device = distributed.choose_device(flags.device)
        found = read_network(flags.checkpoint)
        self.images = found.images
        self.value_range = chosen_range(flags.value_range, found.value_range)
        self.facts: dict[Path, Facts] = {}
        self.labels = labels_of(found, flags.dataset)
        size = {} if flags.short_side is None else {"short_side": flags.short_side, "fit": None}
        self.prediction = Prediction(
            scales=chosen_scales(flags.scales) or (1.0,),
            flip=flags.flip,
            **{**found.prediction, **size},
        )
        self.net = checkpoint.build(found).to(device)
        self.normalise = Normalise(self.net.backbone.mean, self.net.backbone.std)
        self.precision = Precision(device, flags.amp)
        self.tile = flags.tile

    def __call__(self, image: Pixels, progress: Callable[[Sequence[Tile]], Iterator[Tile]] = iter) -> np.ndarray:
        """Return the classes, uint8 (H, W), of a decoded image; `progress` is that of `predict_classes`.

        Raises:
            NonFiniteScores: the network returns NaN or infinity.
        """
        source = PixelInput(image, lambda pixels: self.precision.images(self.normalise(pixels)[None]))
        with self.precision.autocast():
            classes = predict_classes(
                self._logits, source, self.prediction, tile=self.tile, overlap=self.tile // 4, progress=progress
            )
        return classes.numpy()

    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images[:, :, None])[:, :, 0] if self.net.dims == 3 else self.net(images)


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


def predict_all(flags: argparse.Namespace, predictor: Predictor, inputs: Sequence[Input]) -> int:
    """Predict all inputs and return the exit status; an input that fails is reported and does not stop the others."""
    files = PredictionFiles(flags.out, flags.write, predictor.labels, flags.opacity)
    failed = 0
    bar = tqdm(inputs, unit="input", mininterval=distributed.bar_interval())
    with DeferredInterrupts() as interrupts, bar:
        for entry in bar:
            bar.set_postfix_str(entry.name, refresh=False)
            try:
                predict_one = predict_video if entry.is_video else predict_image
                predict_one(flags, predictor, files, entry, interrupts)
            except engine.Interrupted:
                break
            except Exception as error:
                failed += 1
                bar.write(f"predict: {why_failed(error, entry.path)}", file=sys.stderr)
            if interrupts():
                break
    files.finish()
    for line in notes(predictor.facts, predictor.value_range, raw=predictor.images.raw):
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


def predict_image(
    flags: argparse.Namespace,
    predictor: Predictor,
    files: PredictionFiles,
    entry: Input,
    interrupts: DeferredInterrupts,
) -> None:
    """Predict an image and write its files.

    Raises:
        BadImage, FileNotFoundError: the image cannot be read, or its file is damaged.
    """
    image, found = open_with_facts(
        entry.path, predictor.images, value_range=predictor.value_range, max_pixels=flags.max_pixels
    )
    predictor.facts[entry.path] = found
    classes = predictor(image, lambda tiles: follow(tiles, interrupts))
    shown = image if isinstance(image, Image.Image) else Image.fromarray(predictor.images.display(image))
    files.write(entry.name, str(entry.path), shown, classes)


def predict_video(
    flags: argparse.Namespace,
    predictor: Predictor,
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
                image = Image.fromarray(frame)
                classes = predictor(predictor.images.convert(image), lambda tiles: follow(tiles, interrupts))
                files.write(f"{entry.name}/{number:06d}", f"{entry.path}#{number}", image, classes)
                written += 1
                if writer is not None:
                    writer.add(np.asarray(image))  # the overlay
        if writer is not None:
            files.add(writer.path)
    except BadImage as error:
        if not written:
            raise
        raise BadImage(f"{error} The files of {written} frames are in {flags.out}.") from error


if __name__ == "__main__":
    sys.exit(main())
