"""Predict images and videos: `python -m train.predict --checkpoint X INPUT... --out DIR`.

INPUT is an image, a folder, a pattern ("photos/*.jpg") or a video. X is a run's `last.pt`, a file of `train.convert`,
or a published checkpoint; normalisation, image size and classes come from it. For each image, DIR gets masks/NAME.png
in the classes' colours, overlays/NAME.jpg, ids/NAME.png with label ids, and a line in predictions.jsonl; sheet.jpg
shows the first images. A video becomes a folder of frames in each of masks, overlays and ids, and overlays/NAME.mp4.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ccgpu.models import checkpoint
from ccgpu.models.colouring import class_overlay, colour_mask
from ccgpu.models.image_files import BadImage, read_image
from ccgpu.models.labels import Labels
from ccgpu.models.normalisation import Normalise
from ccgpu.models.prediction import Prediction, predict_classes
from ccgpu.models.weights import write_atomically
from ccgpu.train import distributed, engine
from ccgpu.train.data.inputs import Input, find_inputs
from ccgpu.train.data.submission import save_prediction
from ccgpu.train.data.video import Video, VideoWriter
from ccgpu.train.dataset import check_classes
from ccgpu.train.distributed import say
from ccgpu.train.runs.errors import BAD_FILE, fail, run_command
from ccgpu.train.runs.flags import add_checkpoint, add_device, add_scales, chosen_scales, command_parser
from ccgpu.train.runs.interrupts import DeferredInterrupts
from ccgpu.train.runs.setup import dataset_of_network, read_network
from ccgpu.train.visualise import contact_sheet, thumbnail

KINDS = ("masks", "overlays", "ids")
WINDOW = 1024  # pixels: two windows side by side are an image of Cityscapes
SHEET, SHEET_COLUMNS, SHEET_SIDE = 24, 4, 240  # cells and columns of the contact sheet, pixels of a cell's longer side
RECORDS = "predictions.jsonl"
JPEG_QUALITY = 92


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    0: all images were predicted. 1: some were not, each named on stderr. 2: bad flags, checkpoint or inputs.
    130, 143: stopped by Ctrl-C, SIGTERM.
    """
    flags = read_flags(argv)
    return run_command(
        "predict",
        lambda: prepare(flags),
        lambda prepared: predict_all(flags, *prepared),
        again="run the command again",
        smaller="use a smaller --window",
        refused=BAD_FILE,
    )


def read_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags."""
    parser = command_parser("predict", __doc__)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="images, folders, patterns, videos")
    add_checkpoint(parser)
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    add("--write", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of files to write (default: all)")
    add("--opacity", type=float, default=0.55, metavar="SHARE", help="opacity of overlays, 0 to 1 (default: 0.55)")
    add_scales(parser, default="")
    add("--flip", action="store_true", help="average with the flipped image")
    add("--short-side", type=int, metavar="N", help="resize images to this short side for the network, in pixels")
    add(
        "--window",
        type=int,
        default=WINDOW,
        metavar="N",
        help=f"cut images of more than 2 N x N pixels into windows of this side; 0: never (default: {WINDOW})",
    )
    add("--every", type=int, default=1, metavar="N", help="predict every N-th frame of a video (default: 1)")
    add("--dataset", metavar="MODULE", help="dataset that defines the network's classes (default: the checkpoint's)")
    add("--amp", choices=tuple(engine.AMP_DTYPES), default="off", help="autocast (default: off)")
    add_device(parser)
    return parser.parse_args(argv)


def prepare(flags: argparse.Namespace) -> tuple[Predictor, list[Input]]:
    """Return the network and the inputs, and create the folders for the results.

    Raises:
        ValueError, OSError, ImportError, TypeError: flags, inputs or a checkpoint that cannot be used.
    """
    predictor = Predictor(flags)
    inputs = find_inputs(flags.inputs)
    for kind in flags.write:
        (flags.out / kind).mkdir(parents=True, exist_ok=True)
    return predictor, inputs


class Predictor:
    """A network as a function of images, uint8 RGB of any size, that returns their classes.

    A network for clips gets each image, or each frame, as a clip of one.

    Raises:
        ValueError, OSError, ImportError: a checkpoint or flags that cannot be used.
    """

    def __init__(self, flags: argparse.Namespace) -> None:
        for name, least in (("window", 0), ("every", 1)):
            if getattr(flags, name) < least:
                raise ValueError(f"--{name} must be {least} or more, got {getattr(flags, name)}")
        if not 0 <= flags.opacity <= 1:
            raise ValueError(f"--opacity must be from 0 to 1, got {flags.opacity}")
        device = distributed.choose_device(flags.device)
        found = read_network(flags.checkpoint)
        self.labels = labels_of(found, flags.dataset)
        size = {} if flags.short_side is None else {"short_side": flags.short_side, "fit": None}
        self.prediction = Prediction(
            scales=chosen_scales(flags.ms) or (1.0,),
            flip=flags.flip,
            **{**found.prediction, **size},
        )
        self.net = checkpoint.build(found).to(device)
        self.normalise = Normalise(self.net.backbone.mean, self.net.backbone.std)
        self.precision = engine.Precision(device, flags.amp)
        self.window = flags.window

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Return the classes, uint8 (H, W), of an image, uint8 (H, W, 3)."""
        pixels = self.precision.images(self.normalise(image)[None])
        with self.precision.autocast():
            classes = predict_classes(
                self._logits, pixels, self.prediction, window=self.window, overlap=self.window // 4
            )
        return classes.numpy().astype(np.uint8)

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
    files = PredictionFiles(flags, predictor.labels)
    failed = 0
    bar = tqdm(inputs, unit="input", mininterval=0.2 if sys.stderr.isatty() else 10.0)  # seconds
    with DeferredInterrupts() as interrupts, bar:
        for entry in bar:
            bar.set_postfix_str(entry.name, refresh=False)
            try:
                if entry.is_video:
                    predict_video(flags, predictor, files, entry, interrupts)
                else:
                    image = read_image(entry.path)
                    files.write(entry.name, str(entry.path), image, predictor(image))
            except (BadImage, FileNotFoundError, PermissionError, IsADirectoryError, ModuleNotFoundError) as error:
                failed += 1
                bar.write(f"predict: {error}", file=sys.stderr)
            if interrupts():
                break
    files.finish()
    if interrupts():
        return fail("predict", "stopped", interrupts.exit_status)
    if failed:
        return fail("predict", f"{failed} of {len(inputs)} inputs failed, see above; the others are in {flags.out}", 1)
    return 0


def predict_video(
    flags: argparse.Namespace,
    predictor: Predictor,
    files: PredictionFiles,
    entry: Input,
    interrupts: DeferredInterrupts,
) -> None:
    """Predict the frames of a video: write files NAME/000000 ..., counted from 0, and a video of the overlays.

    Raises:
        BadImage, ModuleNotFoundError: the video cannot be read to its end; the files of earlier frames stay.
    """
    with ExitStack() as stack:
        video = stack.enter_context(Video(entry.path))
        writer: VideoWriter | None = None
        if "overlays" in flags.write:
            writer = stack.enter_context(
                VideoWriter(flags.out / "overlays" / f"{entry.name}.mp4", video.rate / flags.every)
            )
        bar = tqdm(video, total=video.frames, unit="frame", desc=entry.path.name, leave=False, mininterval=1.0)
        for number, frame in enumerate(stack.enter_context(bar)):
            if number % flags.every:
                continue
            classes = predictor(frame)
            files.write(f"{entry.name}/{number:06d}", f"{entry.path}#{number}", frame, classes)
            if writer is not None:
                writer.add(class_overlay(frame, classes, predictor.labels.colours, flags.opacity))
            if interrupts():
                return


class PredictionFiles:
    """Writes the files of predicted images, a line of predictions.jsonl for each, and the contact sheet at the end."""

    def __init__(self, flags: argparse.Namespace, labels: Labels) -> None:
        self.out: Path = flags.out
        self.kinds: list[str] = flags.write
        self.opacity: float = flags.opacity
        self.labels = labels
        self._cells: list[tuple[str, Image.Image]] = []
        self._seen = np.zeros(labels.num_classes, dtype=np.int64)
        write_atomically(self.out / RECORDS, "")

    def write(self, name: str, source: str, image: np.ndarray, classes: np.ndarray) -> None:
        """Write the files of one image, each atomically.

        Raises:
            OSError: a file cannot be written.
        """
        overlay = class_overlay(image, classes, self.labels.colours, self.opacity)
        for kind in self.kinds:
            target = self.out / kind / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if kind == "ids":
                save_prediction(target.parent, target.name, classes, self.labels)
            elif kind == "masks":
                _save(target.with_name(f"{target.name}.png"), colour_mask(classes, self.labels.colours))
            else:
                _save(target.with_name(f"{target.name}.jpg"), overlay)
        counts = np.bincount(classes.ravel(), minlength=self.labels.num_classes)
        shares = {
            self.labels.names[index]: round(counts[index] / classes.size, 6)
            for index in np.argsort(-counts, kind="stable")
            if counts[index]
        }
        record = {"input": source, "name": name, "height": image.shape[0], "width": image.shape[1], "shares": shares}
        with (self.out / RECORDS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if len(self._cells) < SHEET:
            self._cells.append((name, thumbnail(overlay, SHEET_SIDE)))
            self._seen += counts

    def finish(self) -> None:
        """Write the contact sheet and print where the files are; do nothing if no image was predicted."""
        if not self._cells:
            return
        shown = [
            (self.labels.names[index], self.labels.colours[index].tolist())
            for index in np.argsort(-self._seen, kind="stable")
            if self._seen[index]
        ]
        _save(self.out / "sheet.jpg", np.asarray(contact_sheet(self._cells, shown, SHEET_COLUMNS)))
        say(f"{', '.join(str(self.out / kind) for kind in self.kinds)}; the first: {self.out / 'sheet.jpg'}")


def _save(path: Path, image: np.ndarray) -> None:
    """Write uint8 (H, W, 3) as PNG or JPEG, atomically."""
    content = io.BytesIO()
    if path.suffix == ".png":
        Image.fromarray(image).save(content, format="PNG")
    else:
        Image.fromarray(image).save(content, format="JPEG", quality=JPEG_QUALITY)
    write_atomically(path, content.getvalue())


if __name__ == "__main__":
    sys.exit(main())
