"""The classes of a folder's masks: from the values that the masks hold, and a table of names, ids or colours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ccgpu.models.labels import IGNORE, Labels, rgb_of, shown_ids
from ccgpu.train.data.folder.class_table import ClassTable, Row
from ccgpu.train.data.masks import COLOURS, Counts

MOST_COLOURS, MOST_CLASSES = 64, 254
# Soft edges give masks many values of few pixels each: told where so many values are found without a table, and half of
# them or more hold less than such a share of the pixels.
_MANY, _RARE = 8, 0.02
_LISTED = 20  # most values that a message lists
_TEMPLATE = "write a table to fill in with: ccgpu inspect DIR --write-classes FILE.csv"
_SOFTENED = (
    "masks that were saved as JPEG, resized or drawn with soft edges hold such values; draw or export them without, or "
    f"name the classes' values in a table, whose other values are then refused one by one ({_TEMPLATE})"
)


@dataclass(frozen=True)
class Found:
    """What the masks of a folder hold.

    Attributes:
        coding: whether they are read as ids or as colours.
        pixels: value -> pixels, over all masks.
        examples: value -> a mask that holds it.
        palette: value -> its colour 0xRRGGBB in the masks' palettes.
        different: the most different values that one mask holds.
    """

    coding: str
    pixels: Mapping[int, int]
    examples: Mapping[int, Path]
    palette: Mapping[int, int] = field(default_factory=dict)
    different: int = 0

    def shares(self, values: Sequence[int]) -> str:
        """Return values with their shares of all pixels and a mask that holds each, in lines."""
        total = max(sum(self.pixels.values()), 1)
        lines = [
            f"  {shown_ids([value], self.coding)}: {100 * self.pixels[value] / total:.2f} % of the pixels, as in "
            f"{self.examples[value]}"
            for value in sorted(values, key=lambda value: -self.pixels[value])[:_LISTED]
        ]
        return "\n".join([*lines, *([f"  ... and {len(values) - _LISTED} more"] if len(values) > _LISTED else [])])


def read_values(masks: Mapping[Path, Counts], table: ClassTable | None) -> Found:
    """Return what the masks hold, read as ids or as colours as they and the table ask for.

    Masks are ids unless one of them can be read as colours alone, or the table has colours and no ids.

    Raises:
        ValueError: some masks are colours, others ids, and no table has colours for both.
    """
    coloured = [path for path, counts in masks.items() if counts.read_as("ids") is None]
    of_ids = [path for path, counts in masks.items() if counts.kind != COLOURS]
    has_colours = table is not None and table.has_colours
    if coloured and of_ids and not has_colours:
        raise ValueError(
            f"find_classes: masks must be all of ids or all of colours, got {len(coloured)} of colours, such as "
            f"{coloured[0]}, and {len(of_ids)} of grey or with a palette, such as {of_ids[0]}; convert one kind, or "
            f"give each class its colour in a table (--classes FILE.csv; {_TEMPLATE})."
        )
    coding = "colours" if coloured or (table is not None and has_colours and not table.has_ids) else "ids"
    return _read(masks, coding)


def _read(masks: Mapping[Path, Counts], coding: str) -> Found:
    pixels: Counter[int] = Counter()
    examples: dict[int, Path] = {}
    palette: dict[int, int] = {}
    unread = []
    for path, counts in masks.items():
        values = counts.read_as(coding)
        if values is None:
            unread.append(path)
            continue
        pixels.update(values)
        for value in values:
            examples.setdefault(value, path)
        for value, colour in counts.palette.items():
            palette.setdefault(value, colour)
    if unread:
        raise ValueError(
            f"find_classes: masks must be {coding}, as the others are, got {len(unread)} of 16-bit grey, such as "
            f"{unread[0]}; convert them."
        )
    different = max((counts.different for counts in masks.values()), default=0)
    return Found(coding, pixels, examples, palette, different)


def find_classes(masks: Mapping[Path, Counts], table: ClassTable | None) -> tuple[Labels, tuple[str, ...]]:
    """Return the classes of a folder's masks, and in lines what was taken for what.

    Without ids in the table, or without a table:

        ids        values that are all below the number of names are places in the list of names; else the values that
                   occur take the names in ascending order, if there are as many. Without names: "class 0", ...
        255        is void, unless the values are evenly spaced from 0 to 255, as drawings of black and white are
        colours    take names by the colours of the table; without a table "class 0", ... in ascending order

    Args:
        masks: mask -> the values that it holds.
        table: the classes that were written down; None: none were.

    Raises:
        ValueError: the values cannot be classes, or do not fit the table; the message has both lists.
    """
    if not masks:
        raise ValueError("find_classes: masks must hold the classes, got none that can be read; add or mend them.")
    found = read_values(masks, table)
    values = sorted(found.pixels)
    if table is not None and (table.has_ids if found.coding == "ids" else table.has_colours):
        return _declared(found, table)
    if found.coding == "colours":
        if table is not None:
            raise ValueError(
                f"find_classes: the classes of {table.source} must have colours, because the masks are colours, got "
                f"names alone; give each its colour in a table ({_TEMPLATE}). The masks hold:\n{found.shares(values)}"
            )
        if len(values) > MOST_COLOURS or found.different > MOST_COLOURS:
            raise ValueError(
                f"find_classes: masks must hold at most {MOST_COLOURS} colours, got {max(len(values), found.different)}"
                f"; {_SOFTENED}. The most frequent:\n{found.shares(values)}"
            )
        return _labels(found, [Row(f"class {place}", value) for place, value in enumerate(values)]), _rare(
            found, values
        )
    _check_palettes(masks)
    _check_binary(masks)
    said, void = [], []
    if IGNORE in values:
        if _evenly_spaced(values):
            said.append(f"255 is a class, because the values {shown_ids(values, 'ids')} are evenly spaced up to it")
        else:
            _check_edges(found, values)
            said.append("255 is void: its pixels count neither in the loss nor in the scores")
            void = [Row("void", IGNORE, void=True)]
            values = [value for value in values if value != IGNORE]
            if not values:
                raise ValueError(
                    "find_classes: masks must hold the classes, got the value 255 alone, which is void; if it is a "
                    f"class, name what surrounds it too, and give both their ids in a table ({_TEMPLATE})."
                )
    number = max(len(values), found.different - len(void))
    if number > MOST_CLASSES:
        raise ValueError(
            f"find_classes: masks must hold at most {MOST_CLASSES} classes, got {number} values; "
            f"{_SOFTENED}. The most frequent:\n{found.shares(values)}"
        )
    if table is None:
        classes = [Row(f"class {place}", value) for place, value in enumerate(values)]
        return _labels(found, [*classes, *void]), (*said, *_rare(found, values))
    rows, names = table.rows, [row.name for row in table.rows]
    if all(value < len(rows) for value in values):
        ids = [*range(len(rows))]
    elif len(values) == len(rows):
        ids = values
        pairs = ", ".join(f"{value} is {name}" for value, name in zip(values, names, strict=True))
        said.append(f"names are given to the values in ascending order: {pairs}")
    else:
        raise ValueError(
            f"find_classes: the {len(rows)} names of {table.source} must be for the values 0..{len(rows) - 1}, or for "
            f"as many other values, got {', '.join(names)} for the values {shown_ids(values, 'ids')}"
            f"{', while 255 is taken for void' if void else ''}; give each class its id in a table ({_TEMPLATE}). The "
            f"masks hold:\n{found.shares([*found.pixels])}"
        )
    named = [Row(row.name, value, row.colour, row.void) for row, value in zip(rows, ids, strict=True)]
    return _labels(found, [*named, *void]), (*said,)


def _check_palettes(masks: Mapping[Path, Counts]) -> None:
    """Raise ValueError if a value has two colours in the masks' palettes: programs renumber values when they save."""
    seen: dict[int, tuple[int, Path]] = {}
    for path, counts in masks.items():
        for value, colour in counts.palette.items():
            first, where = seen.setdefault(value, (colour, path))
            if colour != first:
                one, other = shown_ids([first], "colours"), shown_ids([colour], "colours")
                raise ValueError(
                    f"find_classes: a value must have one colour in the palettes of all masks, got {value} as {one} in "
                    f"{where} and as {other} in {path}. If the colours are the classes, because a program renumbered "
                    f"the values, give a table with colours and no ids ({_TEMPLATE}); if the values are, one with ids."
                )


def _check_binary(masks: Mapping[Path, Counts]) -> None:
    """Raise ValueError if some masks are of 0 and 1, others of 0 and 255: there 255 is no void."""
    held = {path: {*(counts.read_as("ids") or ())} for path, counts in masks.items()}
    if not all(values <= {0, 1, IGNORE} and not values >= {1, IGNORE} for values in held.values()):
        return
    ones, full = ([path for path, values in held.items() if value in values] for value in (1, IGNORE))
    if ones and full:
        raise ValueError(
            f"find_classes: masks must be all of 0 and 1 or all of 0 and 255, got {len(ones)} of 0 and 1, such as "
            f"{ones[0]}, and {len(full)} of 0 and 255, such as {full[0]}; write all alike, or, if 255 is no class, "
            f"declare it as void in a table with ids ({_TEMPLATE})."
        )


def _check_edges(found: Found, values: Sequence[int]) -> None:
    """Raise ValueError if values look like those of soft edges between 0 and 255, where 255 is a class and not void."""
    between = [value for value in values if value not in (0, IGNORE)]
    if not between or max(between) < 128 or 2 * len(between) > max(between):
        return
    rare = [value for value in between if found.pixels[value] < _RARE * sum(found.pixels.values())]
    if len(between) > 1 and 2 * len(rare) >= len(between):
        raise ValueError(
            f"find_classes: masks must hold the values of classes, got {len(values)} values up to 255, "
            f"{len(rare)} of which hold less than {_RARE:.0%} of the pixels each; {_SOFTENED}. The most frequent:\n"
            f"{found.shares(values)}"
        )


def _rare(found: Found, values: Sequence[int]) -> tuple[str, ...]:
    """Return a line if many of the values that are taken for classes are rare, as those of soft edges are."""
    total = sum(found.pixels.values())
    rare = [value for value in values if found.pixels[value] < _RARE * total]
    if len(values) <= _MANY or 2 * len(rare) < len(values):
        return ()
    return (
        f"warning: {len(values)} values are taken for classes, {len(rare)} of which hold less than {_RARE:.0%} of the "
        f"pixels each; {_SOFTENED}",
    )


def _declared(found: Found, table: ClassTable) -> tuple[Labels, tuple[str, ...]]:
    """Return the classes whose values the table declares."""
    rows = [*table.rows]
    if found.coding == "colours":
        rows = [Row(row.name, row.colour, row.colour, row.void) for row in rows]
    known = {row.id for row in rows}
    said: list[str] = []
    if found.coding == "ids" and IGNORE in found.pixels and IGNORE not in known:
        said.append(f"255, which is not in {table.source}, is void: its pixels count neither in the loss nor in scores")
        rows.append(Row("void", IGNORE, void=True))
        known.add(IGNORE)
    unknown = [value for value in found.pixels if value not in known]
    if unknown:
        declared = shown_ids([value for value in known if value is not None], found.coding)
        raise ValueError(
            f"find_classes: masks must hold the {found.coding} of {table.source}, which are {declared}, got "
            f"{len(unknown)} others; add them to the table, with void yes where they are no class, or correct the "
            f"masks:\n{found.shares(unknown)}"
        )
    return _labels(found, rows), (*said,)


def _labels(found: Found, rows: Sequence[Row]) -> Labels:
    """Return labels of rows whose ids are the values in the masks."""
    classes = [row for row in rows if not row.void]
    ids = tuple(row.id for row in classes if row.id is not None)
    void = tuple(row.id for row in rows if row.void and row.id is not None)
    colours: list[int | None] = [row.colour for row in classes]
    if found.coding == "colours":
        colours = [*ids]
    elif not any(colour is not None for colour in colours):
        own = [found.palette.get(value) for value in ids]
        colours = own if len({*own} - {None}) == len(own) else colours
    try:
        table = Labels.numbered(len(classes)).colours.copy() if classes else np.zeros((0, 3), np.uint8)
    except ValueError as error:
        raise ValueError(f"find_classes: {error}") from None
    for place, colour in enumerate(colours):
        if colour is not None:
            table[place] = rgb_of(np.array(colour))
    names = tuple(row.name for row in classes)
    hint = f"the classes are those of the first run; {_TEMPLATE}"
    return Labels(names, table, ids, void, hint, found.coding)


def _evenly_spaced(values: Sequence[int]) -> bool:
    """Return whether values are 0, 255 and equal steps between, as drawings in shades of grey are, within 1."""
    steps = len(values) - 1
    return (
        1 <= steps < IGNORE // 4
        and (values[0], values[-1]) == (0, IGNORE)
        and all(abs(value - IGNORE * place / steps) <= 1 for place, value in enumerate(values))
    )


def template(masks: Mapping[Path, Counts], table: ClassTable | None) -> tuple[Row, ...]:
    """Return rows to fill in: those of the classes that were found, else one for each value of the masks.

    Raises:
        ValueError: the masks are of several kinds.
    """
    try:
        labels, _ = find_classes(masks, table)
    except ValueError:
        found = read_values(masks, table)
        try:
            _check_palettes(masks)
        except ValueError:
            found = _read(masks, "colours")
        most = sorted(sorted(found.pixels, key=lambda value: -found.pixels[value])[:MOST_CLASSES])
        is_id = found.coding == "ids"
        return tuple(
            Row(f"class {place}", value if is_id else None, found.palette.get(value) if is_id else value)
            for place, value in enumerate(most)
        )
    named = [*zip(labels.names, labels.ids, labels.colours.tolist(), strict=True)]
    rows = [
        Row(name, value if labels.coding == "ids" else None, red << 16 | green << 8 | blue)
        for name, value, (red, green, blue) in named
    ]
    is_id = labels.coding == "ids"
    rows += [Row("void", value if is_id else None, None if is_id else value, void=True) for value in labels.void]
    return tuple(rows)
