"""Look at a folder of images and masks before training on it: `ccgpu inspect DIR`.

Prints what `ccgpu train DIR` would take it for (layout, images, split, classes and their shares) and every problem of
its files, and draws a contact sheet of masks over images with a legend. `--write-classes FILE.csv` writes the classes
as a table to fill in.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image

from ccgpu.models.colouring import class_overlay, ignore_colour
from ccgpu.models.image_files import EXIF, MAX_PIXELS, BadImage
from ccgpu.models.image_format import ImageFormat
from ccgpu.models.labels import Labels
from ccgpu.models.legend import Entry, entries
from ccgpu.models.weights import write_atomically
from ccgpu.train.data.census import census_warnings, check_census, check_number
from ccgpu.train.data.channels import channels_of
from ccgpu.train.data.checking import File, copies, file_problems, files_of, notes, palette_warnings
from ccgpu.train.data.facts import Facts
from ccgpu.train.data.folder.class_table import ClassTable, find_table, table_text
from ccgpu.train.data.folder.classes import find_classes, template
from ccgpu.train.data.folder.layout import ALL, Layout, find_layout
from ccgpu.train.data.folder.report import images_line, masks_line, report_text
from ccgpu.train.data.folder.split import Split, split_of
from ccgpu.train.data.pairs import Pair
from ccgpu.train.data.reading import Reading, read_label
from ccgpu.train.distributed import let_first_process, say
from ccgpu.train.runs.data_check import find_facts
from ccgpu.train.runs.errors import run_command
from ccgpu.train.runs.flags import add_max_pixels, add_value_range, chosen_range
from ccgpu.train.runs.folder import mask_counts, take_censuses
from ccgpu.train.runs.outputs import add_overwrite, check_output_file
from ccgpu.train.runs.parser import DATASETS, command_parser
from ccgpu.train.visualise import contact_sheet, thumbnail

CELLS, COLUMNS, CELL_SIDE = 12, 4, 300  # cells and columns of the contact sheet, pixels of a cell's longer side
VAL_SHARE = 0.2  # as in training
OPACITY = 0.55  # of the masks
JPEG_QUALITY = 92


@dataclass
class Inspection:
    """What was found in a folder.

    Attributes:
        pairs: the pairs of each part of the layout, those without a partner left out.
        facts: what their files are.
        labels: the classes; None where they cannot be told.
        split: which images are for what; None where there are too few.
        images: how the images are read; None where they differ.
        problems: what forbids to train on the folder, a text each.
    """

    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    facts: dict[File, Facts] = field(default_factory=dict)
    labels: Labels | None = None
    split: Split | None = None
    images: ImageFormat | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def every(self) -> list[Pair]:
        """The pairs of all parts."""
        return [pair for part in self.pairs.values() for pair in part]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    0: the folder can be trained on. 1: it has problems, which are printed. 2: it is no such folder, or bad flags.
    """
    flags = read_flags(argv)
    return run_command(
        "inspect",
        lambda: prepare(flags),
        lambda prepared: inspect(flags, *prepared),
        again="run the command again",
        smaller="close other programs",
    )


def read_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags."""
    parser = command_parser("inspect", __doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="the folder of images and masks")
    add("--out", type=Path, metavar="FILE.jpg", help="the contact sheet (default: inspect-NAME.jpg in this folder)")
    add("--write-classes", type=Path, metavar="FILE.csv", help="write the classes as a table to fill in")
    add("--classes", nargs="+", metavar="NAME", help="names of the classes, or a file with them, as in training")
    add(
        "--val-share",
        type=float,
        default=VAL_SHARE,
        metavar="SHARE",
        help=f"share to evaluate on (default: {VAL_SHARE})",
    )
    add("--images", metavar="NAME", help="name of the folders of images")
    add("--masks", metavar="NAME", help="name of the folders of masks")
    add("--exif", choices=EXIF, help="leave pixels as stored, or turn images upright")
    add_value_range(parser, "all values as stored")
    add_max_pixels(parser)
    add_overwrite(parser, "the files that --out and --write-classes name")
    return parser.parse_args(argv)


def prepare(flags: argparse.Namespace) -> tuple[Layout, ClassTable | None, Reading, Path]:
    """Return the folder's layout and table of classes, how its files are read, and where the contact sheet goes.

    Raises:
        ValueError, OSError: the folder, its table or the flags cannot be used.
    """
    if not 0 < flags.val_share < 1:
        raise ValueError(f"--val-share must be between 0 and 1, got {flags.val_share:g}")
    layout = find_layout(flags.folder, flags.images, flags.masks)
    table = find_table(flags.folder, flags.classes)
    inputs = [
        path
        for part in layout.parts.values()
        for folder in (part.images, part.masks)
        if folder is not None
        for path in folder.rglob("*")
        if path.is_file()
    ]
    inputs += [Path(table.source)] if table is not None and Path(table.source).is_file() else []
    sheet = free_name(Path(f"inspect-{flags.folder.resolve().name}.jpg")) if flags.out is None else flags.out
    if sheet.suffix.lower() not in (".jpg", ".jpeg"):
        raise ValueError(f"--out must end in .jpg, got {sheet}; rename it.")
    check_output_file("--out", sheet, inputs, overwrite=flags.overwrite)
    if flags.write_classes is not None:
        if flags.write_classes.suffix.lower() != ".csv":
            raise ValueError(f"--write-classes must end in .csv, got {flags.write_classes}; rename it.")
        check_output_file("--write-classes", flags.write_classes, inputs, overwrite=flags.overwrite)
    reading = Reading(flags.exif, chosen_range(flags.value_range, None), flags.max_pixels)
    return layout, table, reading, sheet


def free_name(path: Path) -> Path:
    """Return a path that does not exist: the given one, or one with a number."""
    found, number = path, 1
    while found.exists():
        number += 1
        found = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return found


def inspect(flags: argparse.Namespace, layout: Layout, table: ClassTable | None, reading: Reading, sheet: Path) -> int:
    """Print what a folder is and what is wrong with it, and write what was asked for; return the exit status."""
    found = look(layout, table, reading, flags.folder, flags.val_share)
    if flags.write_classes is not None:
        write_classes(flags.write_classes, found, table)
    if found.labels is not None:
        draw(found, found.labels, reading, sheet)
    if not found.problems:
        say(f"no problems; train on it with: {training_command(flags)}")
        return 0
    number = "one kind of problem" if len(found.problems) == 1 else f"{len(found.problems)} kinds of problems"
    say(f"\n{number} to solve before training:")
    for problem in found.problems:
        say(problem)
    return 1


def training_command(flags: argparse.Namespace) -> str:
    """Return the command that trains on what was inspected: with those flags that decide what the folder is."""
    folder = str(flags.folder)
    words = ["ccgpu", "train", f"./{folder}" if folder in DATASETS else folder]
    defaults = {"val_share": VAL_SHARE, "max_pixels": MAX_PIXELS}
    for name in ("classes", "val_share", "images", "masks", "exif", "value_range", "max_pixels"):
        value = getattr(flags, name)
        if value is not None and value != defaults.get(name):
            values = value if isinstance(value, (list, tuple)) else [value]
            words += [f"--{name.replace('_', '-')}", *(f"{v:g}" if isinstance(v, float) else str(v) for v in values)]
    return shlex.join(words)


def write_classes(path: Path, found: Inspection, table: ClassTable | None) -> None:
    """Write a table of the classes that were found, where the masks are of one kind."""
    try:
        rows = template(mask_counts(found.every, found.facts), table)
    except ValueError as error:
        found.problems.append(f"--write-classes: no table was written ({error})")
        return
    write_atomically(path, table_text(rows))
    say(f"classes: {path}; correct the names, then train with --classes {path}")


def look(layout: Layout, table: ClassTable | None, reading: Reading, root: Path, share: float) -> Inspection:
    """Return what a folder holds, after printing its report as far as it can be told."""
    found = Inspection()
    for part in (part for part in (ALL, "train", "val") if part in layout.parts):
        try:
            found.pairs[part], problems = layout.match(part, whole=True)
            found.problems += problems
        except FileNotFoundError as error:
            found.pairs[part] = []
            found.problems.append(str(error))
    found.facts = let_first_process(lambda: find_facts(root, files_of(found.every), reading, True))
    problems, advice = file_problems(found.every, found.facts, None, reading)
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        number = f"{len(problems)} problem{'s'[: len(problems) > 1]} of files"
        found.problems.append("\n".join([f"{number}, which cannot be used:\n{lines}", *advice]))
    images = {pair.image: found.facts[pair.image, False] for pair in found.every}
    whole = {path: facts for path, facts in images.items() if facts.problem is None and facts.decoded}
    kind = "kinds that differ"
    said: tuple[str, ...] = ()
    try:
        channels = channels_of(whole, reading.value_range)
        kind, found.images = channels.text, channels.images
    except ValueError as error:
        found.problems.append(str(error))
    try:
        found.split = split_of(layout, found.pairs, share)
    except ValueError as error:
        found.problems.append(str(error))
    counts = mask_counts(found.every, found.facts)
    try:
        found.labels, said = find_classes(counts, table)
        check_number(found.labels)
    except ValueError as error:
        found.problems.append(str(error))
    coding = "ids or colours" if found.labels is None else found.labels.coding
    texts = images_line(whole, kind), masks_line(counts, coding)
    if found.labels is None or found.split is None:
        say("\n".join([f"{root}: {layout}", *texts, *layout.left_out]))
        return found
    usable = {part: [pair for pair in pairs if _is_usable(pair, found.facts)] for part, pairs in found.pairs.items()}
    censuses = take_censuses(usable, found.split, found.facts, found.labels)
    say(report_text(layout, found.split, *texts, found.labels, censuses, said))
    for census in censuses:
        for line in census_warnings(census, found.labels):
            say(line)
        try:
            check_census(census, found.labels)
        except ValueError as error:
            found.problems.append(str(error))
    for line in odd_lines(found, whole, reading):
        say(line)
    return found


def odd_lines(found: Inspection, images: Mapping[Path, Facts], reading: Reading) -> list[str]:
    """Return what is allowed but odd about a folder, in lines."""
    assert found.split is not None
    assert found.split.names is not None
    chosen = {
        name: [pair for pair in found.pairs[part] if pair.name in {*found.split.names[name]}]
        for name, part in found.split.parts.items()
    }
    raw = found.images is not None and found.images.raw
    lines = [*notes(images, reading.value_range, raw=raw), *palette_warnings(found.every, found.facts)]
    return [*lines, *copies(chosen["train"], chosen["val"], found.facts)]


def _is_usable(pair: Pair, facts: Mapping[File, Facts]) -> bool:
    return all(facts[file].problem is None and facts[file].decoded for file in files_of([pair]))


def draw(found: Inspection, labels: Labels, reading: Reading, sheet: Path) -> None:
    """Write the contact sheet: masks over images, spread over the whole folder, with a legend of classes and void."""
    usable = [pair for pair in found.every if _is_usable(pair, found.facts)]
    shown = usable[:: max(1, -(-len(usable) // CELLS))]
    images = ImageFormat() if found.images is None else found.images
    cells, left_out = [], 0
    for pair in shown:
        try:
            cells.append((pair.name, overlay(pair, labels, images, reading)))
        except (BadImage, ValueError):  # what is wrong with it has been told
            left_out += 1
    if not cells:
        return
    legend: list[Entry] = entries(labels)
    if labels.void:
        legend.append(("void", ignore_colour(labels.colours)))
    picture = contact_sheet(cells, legend, COLUMNS)

    def save(file: BinaryIO) -> None:
        picture.save(file, format="JPEG", quality=JPEG_QUALITY)

    write_atomically(sheet, save)
    more = f", {left_out} with problems left out" if left_out else ""
    say(f"masks over {len(cells)} of {len(found.every)} images{more}: {sheet}")


def overlay(pair: Pair, labels: Labels, images: ImageFormat, reading: Reading) -> Image.Image:
    """Return an image with the colours of its mask's classes over it, as a small picture.

    Raises:
        BadImage, ValueError: a file cannot be read, or the sizes of image and mask differ.
    """
    assert pair.label is not None
    exif = "stored" if reading.exif == "stored" else "upright"
    pixels = images.open(pair.image, exif=exif, value_range=reading.value_range, max_pixels=reading.max_pixels)
    classes = torch.from_numpy(read_label(pair.label, labels, reading))
    return thumbnail(
        Image.fromarray(class_overlay(images.display(pixels), classes, labels.colours, OPACITY)), CELL_SIDE
    )


if __name__ == "__main__":
    sys.exit(main())
