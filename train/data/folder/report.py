"""The report of a folder that was taken for a dataset: layout, images, split, masks, and the table of its classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from ccgpu.models.labels import Labels, shown_ids
from ccgpu.train.data.census import Census
from ccgpu.train.data.facts import Facts
from ccgpu.train.data.folder.layout import Layout
from ccgpu.train.data.folder.split import Split
from ccgpu.train.data.masks import NAMES, Counts
from ccgpu.train.data.reading import times


def images_line(images: Mapping[Path, Facts], kind: str) -> str:
    """Return number, sizes and kind of the images in one line."""
    sizes = sorted((found.size for found in images.values()), key=lambda size: (size[0] * size[1], size))
    if not sizes:
        return "images: none"
    smallest, median, largest = sizes[0], sizes[len(sizes) // 2], sizes[-1]
    all_equal = smallest == largest
    shown = times(median) if all_equal else f"{times(smallest)} to {times(largest)}, median {times(median)}"
    return f"images: {len(sizes)} of {shown} pixels, {kind}"


def masks_line(masks: Mapping[Path, Counts], coding: str) -> str:
    """Return what the masks are in one line, with an example of each kind where there are several."""
    if not masks:
        return "masks: none that can be read"
    kinds = Counter(counts.kind for counts in masks.values())
    first = {counts.kind: path for path, counts in reversed([*masks.items()])}
    shown = [
        f"{number} {NAMES[kind].removeprefix('a mask ')}{f' ({first[kind].name})' if len(kinds) > 1 else ''}"
        for kind, number in kinds.most_common()
    ]
    return f"masks: read as {coding}; {', '.join(shown)}"


def class_table(labels: Labels, censuses: Sequence[Census]) -> str:
    """Return the classes with their value in the masks, colour, share of the pixels and number of files."""
    names = ["class", *labels.names, *("void" for _ in labels.void)]
    values = ["id" if labels.coding == "ids" else "", *(shown_ids([value], labels.coding) for value in labels.ids)]
    values += [shown_ids([value], labels.coding) for value in labels.void]
    colours = ["colour", *("#" + bytes(colour).hex() for colour in labels.colours.tolist()), *("" for _ in labels.void)]
    columns = [(names, False), (values, True), (colours, False)]
    if labels.coding == "colours":
        columns = [(names, False), (["colour", *values[1:]], False)]
    for census in censuses:
        total = max(sum(census.pixels.values()), 1)
        ids = (*labels.ids, *labels.void)
        shares = [f"{100 * census.pixels.get(value, 0) / total:.2f}" for value in ids]
        columns.append(([f"{census.purpose} %", *shares], True))
        columns.append((["files", *(str(census.files.get(value, 0)) for value in ids)], True))
    padded = []
    for cells, is_number in columns:
        width = max(map(len, cells))
        padded.append([cell.rjust(width) if is_number else cell.ljust(width) for cell in cells])
    return "\n".join("  ".join(row).rstrip() for row in zip(*padded, strict=True))


def report_text(
    layout: Layout,
    split: Split,
    images: str,
    masks: str,
    labels: Labels,
    censuses: Sequence[Census],
    said: Sequence[str],
    recipe: Sequence[str] = (),
) -> str:
    """Return the report.

    Args:
        layout: where the files lie.
        split: which images are for what; its names are fixed.
        images: from `images_line`.
        masks: from `masks_line`.
        labels: the classes.
        censuses: of training and evaluation.
        said: what was taken for what, and what is odd, in lines.
        recipe: the settings that follow from the data, in lines; empty: none are told.
    """
    assert split.names is not None
    numbers = f"{len(split.names['train'])} to train on, {len(split.names['val'])} to evaluate on"
    lines = [
        f"{layout.root}: {layout}",
        images,
        f"split: {numbers}; {split.said}",
        masks,
        *said,
        *layout.left_out,
        "",
        class_table(labels, censuses),
    ]
    if recipe:
        lines += [
            "",
            "settings that follow from the data; each flag changes its own:",
            *(f"  {line}" for line in recipe),
        ]
    return "\n".join(lines)
