"""The census of a dataset: how many pixels and files of each class the label files hold, and what that forbids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ccgpu.models.labels import IGNORE, Labels
from ccgpu.train.data.facts import Facts

_LISTED = 10  # most names that a message lists


@dataclass(frozen=True)
class Census:
    """What the label files of a set of images hold.

    Attributes:
        purpose: "training" or "evaluation".
        pixels: pixels of each value of the label files.
        files: number of files that hold each value.
        around: pixels of the files that hold each value, those of all values.
    """

    purpose: str
    pixels: Mapping[int, int]
    files: Mapping[int, int]
    around: Mapping[int, int]

    @classmethod
    def of(cls, purpose: str, facts: Iterable[Facts], coding: str) -> Census:
        """Return the census of label files whose values are of a coding."""
        pixels: Counter[int] = Counter()
        files: Counter[int] = Counter()
        around: Counter[int] = Counter()
        for found in facts:
            counts = {} if found.mask is None else found.mask.read_as(coding) or {}
            pixels.update(counts)
            files.update(counts.keys())
            around.update(dict.fromkeys(counts, sum(counts.values())))
        return cls(purpose, pixels, files, around)

    def by_class(self, labels: Labels) -> np.ndarray:
        """Return the pixels of each class, int64 (K,)."""
        return np.array([self.pixels.get(value, 0) for value in labels.ids], dtype=np.int64)


def census_table(censuses: Sequence[Census], labels: Labels) -> str:
    """Return the share of pixels and the number of files of each class, in two columns for each census.

    Shares are of all pixels; the last line is that of the void pixels.
    """
    names = [*labels.names, "void"]
    width = max(len("class"), *map(len, names))
    head = "".join(f"{census.purpose + ' %':>14}{'files':>9}" for census in censuses)
    lines = [f"{'class':<{width}}{head}"]
    # A file may hold several void values, so their number of files is not known.
    for name, value in zip(names, [*labels.ids, None], strict=True):
        columns = ""
        for census in censuses:
            valid, total = census.by_class(labels).sum(), max(sum(census.pixels.values()), 1)
            number = total - valid if value is None else census.pixels.get(value, 0)
            files = "" if value is None else census.files.get(value, 0)
            columns += f"{100 * number / total:>14.2f}{files:>9}"
        lines.append(f"{name:<{width}}{columns}".rstrip())
    return "\n".join(lines)


def census_warnings(census: Census, labels: Labels) -> list[str]:
    """Return what is odd about a set of label files: classes that no file holds, and one class alone."""
    present = census.by_class(labels) > 0
    if not present.any():
        return []
    lines = []
    absent = [name for name, there in zip(labels.names, present, strict=True) if not there]
    if absent:
        more = f" and {len(absent) - _LISTED} more" if len(absent) > _LISTED else ""
        lines.append(
            f"warning: no label file for {census.purpose} holds {', '.join(absent[:_LISTED])}{more} "
            f"({len(absent)} of {labels.num_classes} classes)"
        )
    if present.sum() == 1 and census.purpose != "training":
        lines.append(
            f"warning: all labelled pixels for {census.purpose} are {labels.names[int(present.argmax())]}; "
            f"{_explanation(census, labels)}"
        )
    return lines


def check_census(census: Census, labels: Labels) -> None:
    """Raise if nothing can be learned from the label files, or nothing evaluated on them.

    Raises:
        ValueError: no pixel has a class; or, for training, all labelled pixels are of one class, for which a network
            reaches loss 0 without seeing anything.
    """
    present = census.by_class(labels) > 0
    if not present.any():
        unlabelled = "" if census.purpose == "training" else "; ccgpu evaluate predicts such images with --unlabelled"
        raise ValueError(
            f"check_census: label files for {census.purpose} must hold pixels of the classes, got none; "
            f"{_explanation(census, labels)}{unlabelled}."
        )
    if present.sum() == 1 and census.purpose == "training":
        raise ValueError(
            "check_census: label files for training must hold 2 classes or more, got pixels of "
            f"{labels.names[int(present.argmax())]!r} alone; {_explanation(census, labels)}."
        )


def check_number(labels: Labels) -> None:
    """Raise ValueError if there is a single class: every network predicts it everywhere, with loss 0."""
    if labels.num_classes == 1:
        raise ValueError(
            f"check_number: labels must have 2 classes or more, got {labels.names[0]!r} alone; name what surrounds it "
            'as a class too, such as "background".'
        )


def _explanation(census: Census, labels: Labels) -> str:
    """Return the values found beside the ids declared, and what to do about 0/255 masks."""
    void = f", {labels.show(labels.void)} as void" if labels.void else ""
    text = (
        f"the files hold the values {labels.show(census.pixels)}, declared are the {labels.coding} "
        f"{labels.show(labels.ids)}{void}"
    )
    is_binary = labels.coding == "ids" and {*census.pixels} <= {0, IGNORE}
    if is_binary and IGNORE in labels.void and census.pixels.get(IGNORE):
        text += "; in masks of 0 and 255 the 255 is a class: declare it as the id of one, and not as void"
    return text
