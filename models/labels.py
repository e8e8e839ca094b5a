"""The classes of a dataset (`Labels`): names, colours, and the conversion between label ids and train ids.

Label files contain *label ids*, which each dataset defines. Networks predict *train ids*: 0..K-1 in the order of the
class names. A pixel without a class has the train id 255 and counts neither in the loss nor in the evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

IGNORE = 255
"""Train id of every pixel without a class."""


@dataclass(frozen=True, eq=False)
class Labels:
    """The classes of a dataset; all arrays are read-only.

    Args:
        names: K different names, 1..255 of them; the index is the train id.
        colours: RGB of each class, uint8 (K, 3).
        ids: the label id of each class, K different values in 0..255.
        void: label ids of pixels without a class, in 0..255.
        hint: what to do about a label file with other values, for messages.

    Attributes:
        to_train: uint8 (256,), label id -> train id; 255 for `void` and for unknown values.
        to_file: uint8 (256,), train id -> label id; for values that are no class, the first of `void`, or 0 if `void`
            is empty.
        known: uint8, every label id that a file may contain, ascending.

    Raises:
        ValueError: an argument is out of its range, or its length does not fit the others.
    """

    names: tuple[str, ...]
    colours: np.ndarray
    ids: tuple[int, ...]
    void: tuple[int, ...] = ()
    hint: str = "use the label files of this dataset"
    to_train: np.ndarray = field(init=False, repr=False)
    to_file: np.ndarray = field(init=False, repr=False)
    known: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= len(set(self.names)) == len(self.names) <= IGNORE:
            raise ValueError(
                f"Labels: names must be 1..{IGNORE} different names, got {self.names}; rename or drop some."
            )
        all_ids = (*self.ids, *self.void)
        if len(self.ids) != self.num_classes or len(set(all_ids)) != len(all_ids) or not set(all_ids) <= {*range(256)}:
            raise ValueError(
                f"Labels: ids and void must be different values in 0..255, {self.num_classes} of them ids, "
                f"got {self.ids} and {self.void}; give each class its id in the label files."
            )
        colours = np.array(self.colours)
        if colours.dtype != np.uint8 or colours.shape != (self.num_classes, 3):
            raise ValueError(
                f"Labels: colours must be uint8 ({self.num_classes}, 3), got {colours.dtype} {colours.shape}; "
                "give an RGB colour for each class."
            )
        to_train = np.full(256, IGNORE, dtype=np.uint8)
        to_train[list(self.ids)] = np.arange(self.num_classes)
        to_file = np.full(256, self.void[0] if self.void else 0, dtype=np.uint8)
        to_file[: self.num_classes] = self.ids
        tables = {
            "colours": colours,
            "to_train": to_train,
            "to_file": to_file,
            "known": np.array(sorted(all_ids), dtype=np.uint8),
        }
        for name, table in tables.items():
            table.flags.writeable = False  # shared by every reader in the process
            object.__setattr__(self, name, table)

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Labels:
        """Return the labels with these plain values: the inverse of `as_plain`.

        Without "ids" the label ids are 0 .. K - 1, without "void" there are no void ids.

        Raises:
            ValueError: the values are no labels.
        """
        try:
            names = tuple(str(name) for name in values["names"])
            colours = np.array(values["colours"], dtype=np.uint8)
            ids = tuple(int(value) for value in values.get("ids", range(len(names))))
            void = tuple(int(value) for value in values.get("void", ()))
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"Labels: values must have names and colours, got {dict(values)} ({error!r}).") from error
        return cls(names, colours, ids, void)

    @classmethod
    def numbered(cls, num_classes: int) -> Labels:
        """Return labels for classes without names: "class 0", ..., in the colours 1, 2, ... of Pascal VOC's table."""
        indices = np.arange(1, num_classes + 1)  # the table's first colour, black, means no class
        colours = np.zeros((num_classes, 3), dtype=np.uint8)
        # Bits 3 i, 3 i + 1 and 3 i + 2 of the index are bit 7 - i of red, green and blue.
        for bit in range(8):
            for channel in range(3):
                colours[:, channel] |= ((indices >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
        return cls(tuple(f"class {index}" for index in range(num_classes)), colours, tuple(range(num_classes)))

    def as_plain(self) -> dict[str, Any]:
        """Return names, colours, ids and void as lists of plain values, to be stored in a file."""
        return {
            "names": list(self.names),
            "colours": self.colours.tolist(),
            "ids": list(self.ids),
            "void": list(self.void),
        }

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return len(self.names)


def class_differences(saved: Mapping[str, Any], labels: Labels, *, exact: bool) -> str:
    """Return how the classes that a network was trained on differ from a dataset's: both lists where they differ.

    Two spellings of a class can differ without being two classes: mmsegmentation writes "bed " and "television
    receiver" for ADE20K's "bed" and "television". So unless `exact`, a pair of names is taken for one class if they
    are equal up to case and punctuation, or if one has all words of the other and neither names another class of the
    other list ("screen" and "screen door" are two classes of ADE20K, which must not be swapped).

    Args:
        saved: plain values of `Labels`; "ids" and "void" are compared only where they are given.
        labels: the dataset's classes.
        exact: whether names, ids and void ids must be equal; otherwise names alone are compared, as told above.

    Returns:
        One line; empty where the classes agree.
    """
    theirs, ours = [*map(str, saved["names"])], [*labels.names]
    ids = [int(value) for value in saved["ids"]] if exact and "ids" in saved else None
    places = range(max(len(theirs), len(ours)))
    renamed = [i for i in places if theirs[i : i + 1] != ours[i : i + 1]]
    if not exact:
        renamed = [i for i in renamed if i >= len(theirs) or i >= len(ours) or not _one_class(theirs, ours, i)]
    moved = [] if ids is None else [i for i in places if ids[i : i + 1] != [*labels.ids[i : i + 1]]]
    void = sorted(int(value) for value in saved["void"]) if exact and "void" in saved else sorted(labels.void)
    if not (renamed or moved or void != sorted(labels.void)):
        return ""
    if len(theirs) != len(ours):
        kind = f"{len(ours)} classes instead of {len(theirs)}"
    elif renamed:
        once, now = [*map(_words, theirs)], [*map(_words, ours)]
        kind = "another spelling" if once == now else "other names"
        kind = "the same names in another order" if once != now and sorted(once) == sorted(now) else kind
    else:
        kind = "other label ids" if moved else f"the void ids {sorted(labels.void)} instead of {void}"
    shown = sorted({*renamed, *moved})
    rows = [
        f"class {i}: {_shown(theirs, ids, i)} -> {_shown(ours, None if ids is None else [*labels.ids], i)}"
        for i in shown[:10]
    ]
    more = [f"and {len(shown) - 10} more"] if len(shown) > 10 else []
    return f"{kind} ({'; '.join([*rows, *more])})" if shown else kind


def _one_class(theirs: list[str], ours: list[str], place: int) -> bool:
    """Return whether the two names at a place may be two spellings of one class."""
    one, other = _words(theirs[place]), _words(ours[place])
    if one == other:
        return True
    elsewhere = [*map(_words, theirs)].count(other) + [*map(_words, ours)].count(one)
    return not elsewhere and (set(one) <= set(other) or set(other) <= set(one))


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W_]+", name.casefold()) or [name]


def _shown(names: list[str], ids: list[int] | None, place: int) -> str:
    if place >= len(names):
        return "none"
    return repr(names[place]) if ids is None or place >= len(ids) else f"{names[place]!r} (id {ids[place]})"
