"""The files of predicted images: masks, overlays, label ids, their records and the contact sheet.

Large images are written strip by strip, and an overlay is blended into the image's own memory: beside the image and
its classes, memory does not grow with the image. An overlay with a legend is another image of 4 bytes a pixel.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from ccgpu.models.colouring import blend, pixel_strips
from ccgpu.models.labels import Labels
from ccgpu.models.legend import draw_legend, entries, occurring, text_size, with_legend
from ccgpu.models.png_files import write_png
from ccgpu.models.segmentation import Segmentation
from ccgpu.models.weights import write_atomically
from ccgpu.train.data.inputs import Input
from ccgpu.train.data.submission import save_prediction
from ccgpu.train.distributed import say
from ccgpu.train.visualise import contact_sheet, thumbnail

KINDS = ("masks", "overlays", "ids")
RECORDS, SHEET = "predictions.jsonl", "sheet.jpg"
CELLS, COLUMNS, CELL_SIDE = 24, 4, 240  # cells and columns of the contact sheet, pixels of a cell's longer side
JPEG_QUALITY = 92
JPEG_SIDE = 65500  # pixels; libjpeg's limit


def result_paths(out: Path, kinds: Sequence[str], inputs: Sequence[Input]) -> list[Path]:
    """Return the files that predicting the inputs may write; a folder stands for the frames of a video."""
    endings = {"masks": (".png",), "overlays": (".jpg", ".png"), "ids": (".png",)}
    paths = [out / RECORDS, out / SHEET]
    for entry in inputs:
        for kind in kinds:
            target = out / kind / entry.name
            if entry.is_video:
                paths.append(target)
            names = (".mp4",) * (kind == "overlays") if entry.is_video else endings[kind]
            paths += [_with_ending(target, ending) for ending in names]
    return paths


class PredictionFiles:
    """Writes the files of predicted images, a line of predictions.jsonl for each, and the contact sheet at the end.

    A new object removes the predictions.jsonl and the sheet of an earlier run; where no image is written there is
    neither, so that the folder stays new.

    Args:
        out: the folder; it exists.
        kinds: which of `KINDS` to write.
        labels: the classes.
        opacity: of overlays, 0 to 1.
        legend: whether overlays have a legend below them: of the classes that occur; in videos, whose frames have one
            size, of all classes.
    """

    def __init__(
        self, out: Path, kinds: Sequence[str], labels: Labels, opacity: float, *, legend: bool = False
    ) -> None:
        self.out = out
        self.kinds = kinds
        self.labels = labels
        self.opacity = opacity
        self.legend = legend
        self._cells: list[tuple[str, Image.Image]] = []
        self._seen = np.zeros(labels.num_classes, dtype=np.int64)
        self._written: set[Path] = set()
        self._legends: dict[tuple[int, int], Image.Image] = {}
        for name in (RECORDS, SHEET):
            (out / name).unlink(missing_ok=True)

    def write(self, name: str, source: str, found: Segmentation, *, is_frame: bool = False) -> Image.Image:
        """Write the files of one image, each atomically, and return its overlay, where one is written.

        Args:
            name: the results' path without ending, relative to the folder of their kind.
            source: the input, for the record.
            found: the image and its classes; where an overlay is asked for or shown on the sheet, its image becomes the
                overlay.
            is_frame: whether it is a frame of a video.

        Raises:
            OSError: a file cannot be written.
        """
        for kind in self.kinds:
            (self.out / kind / name).parent.mkdir(parents=True, exist_ok=True)
        if "ids" in self.kinds:
            target = self.out / "ids" / name
            self._written.add(save_prediction(target.parent, target.name, found.classes, self.labels))
        if "masks" in self.kinds:
            self._written.add(found.save(_with_ending(self.out / "masks" / name, ".png")))
        image, counts = found.image, found.counts()
        if "overlays" in self.kinds or len(self._cells) < CELLS:
            blend(image, found.classes, self.labels.colours, self.opacity)
        overlay = image
        if "overlays" in self.kinds:
            overlay = (
                with_legend(image, self._legend(image.size, None if is_frame else counts)) if self.legend else image
            )
            self._write_overlay(self.out / "overlays" / name, overlay)
        self._record(name, source, found)
        if len(self._cells) < CELLS:
            self._cells.append((name, thumbnail(image, CELL_SIDE)))
            self._seen += counts
        return overlay

    def add(self, path: Path) -> None:
        """Note another file of this run, written by the caller."""
        self._written.add(path)

    def finish(self) -> None:
        """Write the contact sheet, and print where the files are and how many others lie beside them."""
        if self._cells:
            shown = occurring(self.labels, self._seen)
            _save_jpeg(self.out / SHEET, contact_sheet(self._cells, shown, COLUMNS))
            say(f"{', '.join(str(self.out / kind) for kind in self.kinds)}; the first: {self.out / SHEET}")
        others = [path for kind in KINDS for path in sorted((self.out / kind).rglob("*")) if path.is_file()]
        others = [path for path in others if path not in self._written]
        if others:
            say(
                f"note: {self.out} also holds {len(others)} files that this run did not write, such as {others[0]}; "
                f"{self.out / RECORDS} lists this run's images alone"
            )

    def _write_overlay(self, target: Path, image: Image.Image) -> None:
        if max(image.size) <= JPEG_SIDE:
            path = _with_ending(target, ".jpg")
            _save_jpeg(path, image)
            self._written.add(path)
            return
        say(f"{_with_ending(target, '.png')}: a PNG, because JPEG ends at {JPEG_SIDE} pixels a side")
        path = _with_ending(target, ".png")
        write_atomically(path, lambda file: write_png(file, image.height, image.width, pixel_strips(image)))
        self._written.add(path)

    def _legend(self, size: tuple[int, int], counts: np.ndarray | None) -> Image.Image:
        """Return the legend of an image of this (width, height): of the classes with pixels; None: of all classes."""
        if counts is not None:
            return draw_legend(occurring(self.labels, counts), size[0], text_size(size[1], size[0]))
        if size not in self._legends:
            self._legends[size] = draw_legend(entries(self.labels), size[0], text_size(size[1], size[0]))
        return self._legends[size]

    def _record(self, name: str, source: str, found: Segmentation) -> None:
        height, width = found.classes.shape
        shares = sorted(found.shares().items(), key=lambda item: -item[1])
        shown = {class_name: round(share, 6) for class_name, share in shares if share}
        record = {"input": source, "name": name, "height": height, "width": width, "shares": shown}
        with (self.out / RECORDS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _with_ending(target: Path, ending: str) -> Path:
    return target.with_name(target.name + ending)  # not with_suffix: a name may hold dots


def _save_jpeg(path: Path, image: Image.Image) -> None:
    def save(file: BinaryIO) -> None:
        image.save(file, format="JPEG", quality=JPEG_QUALITY)

    write_atomically(path, save)
