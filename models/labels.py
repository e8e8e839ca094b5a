"""The classes of a dataset (`Labels`): names, colours, and the conversion between label ids and train ids.

Label files (masks) contain *label ids*, which each dataset defines: numbers, or colours, which are the ids 0xRRGGBB.
Networks predict *train ids*: 0..K-1 in the order of the class names. A pixel without a class has the train id 255 and
counts neither in the loss nor in the evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

IGNORE = 255
"""Train id of every pixel without a class."""
CODINGS = ("ids", "colours")
"""What the pixels of label files are: numbers, or RGB colours."""
_SHOWN = 20  # names that a message lists
_MOST = {"ids": 0xFFFF, "colours": 0xFFFFFF}  # the highest id of each coding


@dataclass(frozen=True, eq=False)
class Labels:
    """The classes of a dataset; all arrays are read-only.

    Args:
        names: K different names, 1..255 of them; the index is the train id.
        colours: RGB of each class, uint8 (K, 3).
        ids: the label id of each class, K different values in 0..65535, or 0xRRGGBB for colours.
        void: label ids of pixels without a class, in the same range.
        hint: what to do about a label file with other values, for messages.
        coding: "ids" or "colours": what the pixels of the label files are.

    Attributes:
        to_train: uint8 (N,), label id -> train id; 255 for `void` and for unknown values. N is 256 where all ids are
            below, else 65536; for colours 2^24.
        to_file: train id (256 rows) -> pixel of a label file: uint8 (256,), uint16 (256,) where an id is above 255, or
            uint8 (256, 3) for colours. For values that are no class, the first of `void`, or 0 if `void` is empty.
        known: every label id that a file may contain, ascending; uint8, uint16, or uint32 for colours.

    Raises:
        ValueError: an argument is out of its range, or its length does not fit the others.
    """

    names: tuple[str, ...]
    colours: np.ndarray
    ids: tuple[int, ...]
    void: tuple[int, ...] = ()
    hint: str = "use the label files of this dataset"
    coding: str = "ids"
    to_train: np.ndarray = field(init=False, repr=False)
    to_file: np.ndarray = field(init=False, repr=False)
    known: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= len(set(self.names)) == len(self.names) <= IGNORE:
            shown = ", ".join(map(str, self.names[:_SHOWN])) + (", ..." if len(self.names) > _SHOWN else "")
            raise ValueError(
                f"Labels: names must be 1..{IGNORE} different names, got {len(self.names)}: {shown}; rename or drop "
                "some."
            )
        if self.coding not in CODINGS:
            raise ValueError(f"Labels: coding must be one of {CODINGS}, got {self.coding!r}; correct it.")
        all_ids, most = (*self.ids, *self.void), _MOST[self.coding]
        different = len(self.ids) == self.num_classes and len(set(all_ids)) == len(all_ids)
        if not different or not all(0 <= value <= most for value in all_ids):
            raise ValueError(
                f"Labels: ids and void must be different values in 0..{most}, {self.num_classes} of them ids, "
                f"got {self.ids} and {self.void}; give each class its id in the label files."
            )
        colours = np.array(self.colours)
        if colours.dtype != np.uint8 or colours.shape != (self.num_classes, 3):
            raise ValueError(
                f"Labels: colours must be uint8 ({self.num_classes}, 3), got {colours.dtype} {colours.shape}; "
                "give an RGB colour for each class."
            )
        highest = most if self.coding == "colours" else 0xFF if max(all_ids) <= 0xFF else most
        to_train = np.full(highest + 1, IGNORE, dtype=np.uint8)
        to_train[list(self.ids)] = np.arange(self.num_classes)
        stored = np.min_scalar_type(highest)
        to_file = np.full(256, self.void[0] if self.void else 0, dtype=stored)
        to_file[: self.num_classes] = self.ids
        tables = {
            "colours": colours,
            "to_train": to_train,
            "to_file": rgb_of(to_file) if self.coding == "colours" else to_file,
            "known": np.array(sorted(all_ids), dtype=stored),
        }
        for name, table in tables.items():
            table.flags.writeable = False  # shared by every reader in the process
            object.__setattr__(self, name, table)

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Labels:
        """Return the labels with these plain values: the inverse of `as_plain`.

        Without "ids" the label ids are 0 .. K - 1, without "void" there are no void ids, without "coding" it is "ids".

        Raises:
            ValueError: the values are no labels.
        """
        try:
            names = tuple(str(name) for name in values["names"])
            colours = np.array(values["colours"], dtype=np.uint8)
            ids = tuple(int(value) for value in values.get("ids", range(len(names))))
            void = tuple(int(value) for value in values.get("void", ()))
            coding = str(values.get("coding", "ids"))
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"Labels: values must have names and colours, got {values} ({error!r}).") from error
        return cls(names, colours, ids, void, coding=coding)

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
        """Return names, colours, ids, void and coding as plain values, to be stored in a file."""
        return {
            "names": list(self.names),
            "colours": self.colours.tolist(),
            "ids": list(self.ids),
            "void": list(self.void),
            "coding": self.coding,
        }

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return len(self.names)

    def show(self, values: Iterable[int]) -> str:
        """Return label ids as text, ascending: "0..2, 255", or for colours "#0000ff, #ff0000"."""
        return shown_ids(values, self.coding)


def rgb_of(codes: np.ndarray) -> np.ndarray:
    """Return colours 0xRRGGBB, integers (...), as RGB, uint8 (..., 3)."""
    return np.stack([codes >> 16 & 0xFF, codes >> 8 & 0xFF, codes & 0xFF], axis=-1).astype(np.uint8)


def codes_of(rgb: np.ndarray) -> np.ndarray:
    """Return RGB colours, uint8 (..., 3), as 0xRRGGBB, uint32 (...)."""
    red, green, blue = np.moveaxis(rgb.astype(np.uint32), -1, 0)
    codes: np.ndarray = red << 16 | green << 8 | blue
    return codes


def shown_ids(values: Iterable[int], coding: str) -> str:
    """Return label ids of a coding as text, ascending: "0..2, 255", or for colours "#0000ff, #ff0000"."""
    ids = np.array(sorted({*values}), dtype=np.int64)
    if coding == "colours":
        return ", ".join(f"#{value:06x}" for value in ids.tolist())
    runs = np.split(ids, np.flatnonzero(np.diff(ids) != 1) + 1) if ids.size else []
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)


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
    coding = str(saved.get("coding", "ids")) if ids is not None else labels.coding
    places = range(max(len(theirs), len(ours)))
    renamed = [i for i in places if theirs[i : i + 1] != ours[i : i + 1]]
    if not exact:
        renamed = [i for i in renamed if i >= len(theirs) or i >= len(ours) or not _one_class(theirs, ours, i)]
    moved = [] if ids is None else [i for i in places if ids[i : i + 1] != [*labels.ids[i : i + 1]]]
    void = sorted(int(value) for value in saved["void"]) if exact and "void" in saved else sorted(labels.void)
    if coding != labels.coding:
        were = shown_ids(ids or (), coding)
        return f"label files of {labels.coding} ({labels.show(labels.ids)}) instead of {coding} ({were})"
    if not (renamed or moved or void != sorted(labels.void)):
        return ""
    if len(theirs) != len(ours):
        kind = f"{len(ours)} classes instead of {len(theirs)}"
    elif renamed:
        once, now = [*map(_words, theirs)], [*map(_words, ours)]
        kind = "another spelling" if once == now else "other names"
        kind = "the same names in another order" if once != now and sorted(once) == sorted(now) else kind
    else:
        kind = (
            f"other label {coding}"
            if moved
            else (f"the void {coding} [{labels.show(labels.void)}] instead of [{labels.show(void)}]")
        )
    shown = sorted({*renamed, *moved})
    rows = [
        f"class {i}: {_shown(theirs, ids, i, coding)} -> "
        f"{_shown(ours, None if ids is None else [*labels.ids], i, coding)}"
        for i in shown[:10]
    ]
    more = [f"and {len(shown) - 10} more"] if len(shown) > 10 else []
    return f"{kind} ({'; '.join([*rows, *more])})" if shown else kind


def same_classes(theirs: Sequence[str], labels: Labels) -> list[int | None]:
    """Return for each class of `labels` the place of the same class in a list of names; None where it has none.

    Lists that agree by `class_differences` have the same classes at the same places. Otherwise two names are one class
    if they are equal, or the only ones of their lists with these words, up to case and punctuation. (That one name has
    all words of the other says nothing at another place: "light" is not "traffic light".)

    Args:
        theirs: names of classes, such as those of a file.
        labels: the classes that are looked for.
    """
    if not class_differences({"names": theirs}, labels, exact=False):
        return [*range(len(theirs))]
    words, ours = [tuple(_words(name)) for name in theirs], [tuple(_words(name)) for name in labels.names]
    found: list[int | None] = []
    for name, own in zip(labels.names, ours, strict=True):
        if name in theirs:
            found.append(theirs.index(name))
        else:
            alone = words.count(own) == ours.count(own) == 1
            found.append(words.index(own) if alone else None)
    return found


def _one_class(theirs: list[str], ours: list[str], place: int) -> bool:
    """Return whether the two names at a place may be two spellings of one class."""
    one, other = _words(theirs[place]), _words(ours[place])
    if one == other:
        return True
    elsewhere = [*map(_words, theirs)].count(other) + [*map(_words, ours)].count(one)
    return not elsewhere and (set(one) <= set(other) or set(other) <= set(one))


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W_]+", name.casefold()) or [name]


def _shown(names: list[str], ids: list[int] | None, place: int, coding: str) -> str:
    if place >= len(names):
        return "none"
    if ids is None or place >= len(ids):
        return repr(names[place])
    value = f"id {ids[place]}" if coding == "ids" else shown_ids([ids[place]], coding)
    return f"{names[place]!r} ({value})"
