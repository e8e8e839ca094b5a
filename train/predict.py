"""Predict images and videos: `python -m train.predict --checkpoint X INPUT... --out DIR`.

INPUT is a file, a folder, a pattern ("photos/*.jpg") or a video. X is a run's `last.pt`, a file of `train.convert`, or
a published checkpoint as it is; everything that the network needs to know about images comes with it. For each
image DIR holds masks/NAME.png in the classes' colours, overlays/NAME.jpg, ids/NAME.png with label ids, and a line in
predictions.jsonl; sheet.jpg shows the first ones. A video becomes a folder of each, and overlays/NAME.mp4.
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
from ccgpu.models.prediction import MULTI_SCALE, Prediction, predict_classes
from ccgpu.models.weights import write_atomically
from ccgpu.train import distributed, engine
from ccgpu.train.data.inputs import Input, find_inputs
from ccgpu.train.data.submission import save_prediction
from ccgpu.train.data.video import Video, VideoWriter
from ccgpu.train.dataset import find_dataset
from ccgpu.train.distributed import say
from ccgpu.train.runs.errors import BAD_INPUT, FAILURES, fail, failure
from ccgpu.train.runs.interrupts import DeferredInterrupts
from ccgpu.train.runs.setup import read_network
from ccgpu.train.visualise import contact_sheet, thumbnail

KINDS = ("masks", "overlays", "ids")
WINDOW = 1024  # pixels: two of them side by side are an image of Cityscapes
SHEET, SHEET_COLUMNS, SHEET_SIDE = 24, 4, 240  # cells, and the pixels of a cell's longer side
RECORDS = "predictions.jsonl"
JPEG_QUALITY = 92


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    0: all images were predicted. 1: some were not, each named on stderr. 2: bad flags, checkpoint or inputs.
    130, 143: stopped by Ctrl-C, SIGTERM.
    """
    flags = read_flags(argv)
    try:
        predictor = Predictor(flags)
        inputs = find_inputs(flags.inputs)
        for kind in flags.write:
            (flags.out / kind).mkdir(parents=True, exist_ok=True)
    except (*BAD_INPUT, TypeError) as error:
        return fail("predict", str(error), 2)
    try:
        with DeferredInterrupts() as interrupts:
            return run(flags, predictor, inputs, interrupts)
    except FAILURES as error:
        return fail("predict", failure(error, again="run the command again", smaller="use a smaller --window"), 1)


def read_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog="predict", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="images, folders, patterns, videos")
    add("--checkpoint", type=Path, required=True, metavar="FILE", help="a run's last.pt, or a published checkpoint")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    add("--write", nargs="+", choices=KINDS, default=list(KINDS), help="what to write (default: all)")
    add("--opacity", type=float, default=0.55, metavar="SHARE", help="of the colours in overlays (default: 0.55)")
    add(
        "--ms",
        type=float,
        nargs="*",
        metavar="S",
        help=f"average over these scales, {' '.join(map(str, MULTI_SCALE))} where none are given",
    )
    add("--flip", action="store_true", help="average with the flipped image")
    add("--short-side", type=int, metavar="N", help="let the network see images of this short side, in pixels")
    add(
        "--window",
        type=int,
        default=WINDOW,
        metavar="N",
        help=f"cut images of more than 2 N x N pixels into windows of this side; 0: never (default: {WINDOW})",
    )
    add("--every", type=int, default=1, metavar="N", help="of a video, each N-th frame (default: 1)")
    add("--dataset", metavar="MODULE", help="dataset whose classes these are (default: the checkpoint's)")
    add("--amp", choices=tuple(engine.AMP_DTYPES), default="off", help="autocast (default: off)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default: auto)")
    return parser.parse_args(argv)


class Predictor:
    """A network that takes images as they are, uint8 RGB, and returns their classes.

    A network for clips sees each image, or each frame, as a clip of one.

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
            scales=(1.0,) if flags.ms is None else tuple(flags.ms) or MULTI_SCALE,
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
    """Return the classes that a checkpoint's network has, or those of a dataset.

    Raises:
        ValueError: a dataset that cannot be had, or another number of classes than the network's.
    """
    number = found.network["num_classes"]
    if dataset is not None:
        labels = find_dataset(dataset).labels
    elif found.labels is not None:
        labels = Labels.from_plain(found.labels)
    else:
        labels = Labels.numbered(number)
    if labels.num_classes != number:
        raise ValueError(
            f"--dataset must have the network's {number} classes, got {labels.num_classes}; name another dataset."
        )
    return labels


def run(
    flags: argparse.Namespace, predictor: Predictor, inputs: Sequence[Input], interrupts: DeferredInterrupts
) -> int:
    """Predict all inputs, each by itself: one that fails is named, and the others go on."""
    results = Results(flags, predictor.labels)
    failed = 0
    bar = tqdm(inputs, unit="input", mininterval=0.2 if sys.stderr.isatty() else 10.0)  # seconds
    for entry in bar:
        bar.set_postfix_str(entry.name, refresh=False)
        try:
            if entry.is_video:
                predict_video(flags, predictor, results, entry, interrupts)
            else:
                image = read_image(entry.path)
                results.write(entry.name, str(entry.path), image, predictor(image))
        except (BadImage, FileNotFoundError, PermissionError, IsADirectoryError, ModuleNotFoundError) as error:
            failed += 1
            bar.write(f"predict: {error}", file=sys.stderr)
        if interrupts():
            bar.close()
            results.finish()
            return fail("predict", "stopped", interrupts.exit_status)
    bar.close()
    results.finish()
    if failed:
        return fail("predict", f"{failed} of {len(inputs)} inputs failed, see above; the others are in {flags.out}", 1)
    return 0


def predict_video(
    flags: argparse.Namespace,
    predictor: Predictor,
    results: Results,
    entry: Input,
    interrupts: DeferredInterrupts,
) -> None:
    """Predict the frames of a video: files NAME/000000 ..., counted from 0, and a video of the overlays.

    Raises:
        BadImage, ModuleNotFoundError: a video that cannot be read to its end; what was predicted stays.
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
            results.write(f"{entry.name}/{number:06d}", f"{entry.path}#{number}", frame, classes)
            if writer is not None:
                writer.add(class_overlay(frame, classes, predictor.labels.colours, flags.opacity))
            if interrupts():
                return


class Results:
    """The files of predicted images, one line of predictions.jsonl for each, and the contact sheet at the end."""

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
        """Write the contact sheet and say where everything lies; nothing where nothing was predicted."""
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
