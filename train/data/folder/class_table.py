"""Tables of classes that people write: names, ids and colours from a .txt, .csv or .json file."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ccgpu.models.labels import Labels, shown_ids
from ccgpu.train.data.folder.layout import SPLITS
from ccgpu.train.data.pairs import listing

FILES = ("classes.txt", "classes.csv", "classes.json", "labelmap.txt", "_classes.csv")
"""Names of tables in a dataset's folder; the last are CVAT's, and Roboflow's, which lies in the folder of the split."""
# Names of columns, in lower case and without spaces and punctuation.
_COLUMNS = {
    "name": ("name", "class", "classname", "label", "labelname"),
    "id": ("id", "value", "index", "idx", "labelid", "classid", "pixel", "pixelvalue"),
    "colour": ("colour", "color", "rgb", "colorrgb", "hex", "palette"),
    "void": ("void", "ignore", "ignored"),
    "r": ("r", "red"),
    "g": ("g", "green"),
    "b": ("b", "blue"),
}
# Lines of .txt files that are more than names: CVAT's "name:r,g,b:parts:actions", "0: name" and "name,0".
_CVAT = re.compile(r"(?P<name>[^:]+):(?P<colour>\d+,\d+,\d+):[^:]*:[^:]*")
_NUMBERED = re.compile(r"(?P<id>\d+)\s*[\s:,;.]\s*(?P<name>\D.*)"), re.compile(r"(?P<name>.*\D)[,;:\t]\s*(?P<id>\d+)")
_LABELME_VOID = "__ignore__"  # LabelMe's first line: its pixels are 255 in the masks
_YES, _NO = ("yes", "y", "true", "1"), ("no", "n", "false", "0", "")


@dataclass(frozen=True)
class Row:
    """A class of a table: name, label id and colour 0xRRGGBB, as far as they are given, and whether it is void."""

    name: str
    id: int | None = None
    colour: int | None = None
    void: bool = False


@dataclass(frozen=True)
class ClassTable:
    """The rows of a table of classes, and where they come from.

    Attributes:
        rows: one for each class, in their order.
        source: the file, or --classes.
    """

    rows: tuple[Row, ...]
    source: str

    @property
    def has_ids(self) -> bool:
        """Whether the rows have label ids; all have, or none."""
        return self.rows[0].id is not None

    @property
    def has_colours(self) -> bool:
        """Whether all rows have colours."""
        return all(row.colour is not None for row in self.rows)


def find_table(root: Path, given: Sequence[str] | None) -> ClassTable | None:
    """Return the table of classes of --classes, else of a file in the dataset's folder; None without one.

    Args:
        root: the dataset's folder.
        given: the value of --classes: names, or a file.

    Raises:
        ValueError: the table cannot be used, or there are several.
        OSError: the file cannot be read.
    """
    if given:
        if len(given) == 1 and (Path(given[0]).suffix.lower() in (".txt", ".csv", ".json") or Path(given[0]).is_file()):
            return read_table(Path(given[0]))
        return _checked(tuple(Row(name) for name in given), "--classes", [])
    places = [root, *(path for path in root.iterdir() if path.name.lower() in SPLITS["train"] and path.is_dir())]
    found = [path for place in places for path in sorted(place.iterdir()) if path.name.lower() in FILES]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise ValueError(f"find_table: {root} must hold one table of classes, got {names}; name one with --classes.")
    return read_table(found[0]) if found else None


def read_table(path: Path) -> ClassTable:
    """Return the table in a file.

    .txt: a name in each line, or "0: name", or CVAT's "name:r,g,b::"; lines that begin with # are comments. .csv: a
    head with the columns name, and as far as they are known id, colour (#rrggbb, or "r,g,b") or r, g and b, void
    (yes or no). .json: a list of names, or of objects with these keys, or one object of ids and names.

    Raises:
        ValueError: the file is of another kind, or damaged; one error lists all problems.
        OSError: the file cannot be read.
    """
    if path.suffix.lower() not in (".txt", ".csv", ".json"):
        raise ValueError(f"read_table: --classes must be a .txt, .csv or .json file, got {path}; convert it.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if path.suffix.lower() == ".txt":
            entries = _text_entries(text)
        elif path.suffix.lower() == ".json":
            entries = _json_entries(json.loads(text))
        else:
            entries = _csv_entries(text)
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, _BadTable) as error:
        raise ValueError(f"read_table: {path} must be a table of classes in UTF-8, got {error}; correct it.") from None
    rows, problems = [], []
    for where, entry in entries:
        try:
            rows.append(Row(entry) if isinstance(entry, str) else _row(entry))
        except _BadTable as error:
            problems.append(f"{where}: {error}")
    return _checked(tuple(rows), str(path), problems)


class _BadTable(ValueError):
    """What is wrong with a part of a table."""


def _text_entries(text: str) -> list[tuple[str, Any]]:
    lines = [(f"line {number}", line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    names = [(where, line) for where, line in lines if not line.startswith("#") and line != _LABELME_VOID]
    head = [_column(name) for name in re.split("[,;\t]", names[0][1])] if names else []
    if "name" in head and len(head) > 1:
        raise _BadTable(f"{names[0][1]!r}, the first line of a .csv file; give the file that ending")
    for pattern in (_CVAT, *_NUMBERED):
        found = [(where, pattern.fullmatch(line)) for where, line in names]
        if all(match is not None for _, match in found):
            return [(where, match.groupdict()) for where, match in found if match is not None]
    return [*names]


def _check_columns(columns: Sequence[str | None], names: Sequence[str]) -> None:
    """Raise if a column that is not known may hold the ids: without them, names belong to the values 0, 1, 2, ..."""
    unknown = [repr(name.strip()) for column, name in zip(columns, names, strict=True) if column is None]
    if unknown and not {"id", "colour", "r"} & {*columns}:
        raise _BadTable(
            f"{', '.join(unknown)}, which {'is no column that is' if len(unknown) == 1 else 'are no columns that are'} "
            "known; name the ids id, or leave only the names"
        )


def _csv_entries(text: str) -> list[tuple[str, Any]]:
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)
    rows = [*csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)]
    if not rows:
        return []
    columns = [_column(name) for name in rows[0]]
    if "name" not in columns:
        raise _BadTable(
            f"a first line without a column name: {', '.join(rows[0])} (the first line names the columns, as name,id)"
        )
    twice = sorted({name for name in columns if name is not None and columns.count(name) > 1})
    if twice:
        raise _BadTable(f"two columns for {twice[0]}: {', '.join(rows[0])}")
    _check_columns(columns, rows[0])
    entries: list[tuple[str, Any]] = []
    for number, row in enumerate(rows[1:], 2):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) > len(columns):
            raise _BadTable(f"{len(row)} columns in line {number}, but {len(columns)} in the first")
        cells = zip(columns, row, strict=False)
        entries.append((f"line {number}", {name: cell.strip() for name, cell in cells if name is not None}))
    return entries


def _json_entries(content: Any) -> list[tuple[str, Any]]:
    content = content.get("classes") if isinstance(content, Mapping) and "classes" in content else content
    if isinstance(content, Mapping) and all(name.isdecimal() and isinstance(content[name], str) for name in content):
        content = [{"id": id_, "name": name} for id_, name in content.items()]
    elif isinstance(content, Mapping) and all(type(id_) is int for id_ in content.values()):
        content = [{"id": id_, "name": name} for name, id_ in content.items()]
    if not isinstance(content, list):
        raise _BadTable("no list of classes")
    entries: list[tuple[str, Any]] = []
    for number, entry in enumerate(content, 1):
        if isinstance(entry, Mapping):
            names = [*map(str, entry)]
            columns = [*map(_column, names)]
            _check_columns(columns, names)
            entry = {column: value for column, value in zip(columns, entry.values(), strict=True) if column is not None}
        elif not isinstance(entry, str):
            raise _BadTable(f"class {number}, {entry!r}, which is no name and no object")
        entries.append((f"class {number}", entry))
    return entries


def _column(name: str) -> str | None:
    found = re.sub(r"[\W_]", "", name.lower())
    return next((column for column, names in _COLUMNS.items() if found in names), None)


def _row(entry: Mapping[str, Any]) -> Row:
    name = str(entry.get("name", "")).strip()
    if not name:
        raise _BadTable("no name")
    id_, void = entry.get("id"), str(entry.get("void", "")).strip().lower()
    if id_ in ("", None):
        id_ = None
    elif isinstance(id_, bool) or not re.fullmatch(r"\d{1,5}", str(id_).strip()) or int(id_) > 0xFFFF:
        raise _BadTable(f"the id {id_!r} of {name}, which is no number from 0 to 65535")
    if void not in (*_YES, *_NO):
        raise _BadTable(f"void {void!r} of {name}, which is neither yes nor no")
    colour = entry.get("colour")
    if colour in ("", None) and any(entry.get(part) not in ("", None) for part in "rgb"):
        colour = [entry.get(part) for part in "rgb"]
    return Row(name, None if id_ is None else int(id_), _colour(colour, name), void in _YES)


def _colour(given: Any, name: str) -> int | None:
    if given in ("", None):
        return None
    found = re.fullmatch(r"#?([0-9a-fA-F]{6})", given.strip()) if isinstance(given, str) else None
    if found:
        return int(found[1], 16)
    numbers = re.findall(r"[^\s,;()\[\]]+", given) if isinstance(given, str) else given
    is_rgb = isinstance(numbers, (list, tuple)) and len(numbers) == 3
    if not is_rgb or not all(re.fullmatch(r"\d{1,3}", str(part)) and int(part) <= 255 for part in numbers):
        raise _BadTable(f"the colour {given!r} of {name}, which is neither #rrggbb nor three numbers up to 255")
    red, green, blue = (int(part) for part in numbers)
    return red << 16 | green << 8 | blue


def _checked(rows: tuple[Row, ...], source: str, problems: list[str]) -> ClassTable:
    problems = [*problems]
    names = [row.name for row in rows if not row.void]
    problems += [f"the name {name!r} twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    for what, values in (("id", [row.id for row in rows]), ("colour", [row.colour for row in rows])):
        given = [value for value in values if value is not None]
        coding = "ids" if what == "id" else "colours"
        # Two classes may be drawn in one colour where their ids tell them apart.
        if what == "id" or any(row.id is None for row in rows):
            twice = [value for value in dict.fromkeys(given) if given.count(value) > 1]
            problems += [f"the {what} {shown_ids([value], coding)} twice" for value in twice]
        if what == "id" and 0 < len(given) < len(rows):
            problems.append(f"{len(given)} ids for {len(rows)} classes")
    if not names and not problems:
        problems.append("no classes")
    if problems:
        raise ValueError(
            f"read_table: {source} must be a table of different classes, got {len(problems)} "
            f"problem{'s'[: len(problems) > 1]}; correct it:\n{listing(problems)}"
        )
    return ClassTable(rows, source)


def table_text(rows: Iterable[Row]) -> str:
    """Return a table as the text of a .csv file, which `read_table` reads again."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["name", "id", "colour", "void"])
    for row in rows:
        colour = "" if row.colour is None else f"#{row.colour:06x}"
        writer.writerow([row.name, "" if row.id is None else row.id, colour, "yes" if row.void else "no"])
    return file.getvalue()


def table_difference(table: ClassTable, labels: Labels) -> str:
    """Return how a table differs from the classes that a network was trained on, with both lists; empty if it agrees.

    Ids are compared where the table has them and the masks are ids, colours where the masks are colours.
    """
    rows = [row for row in table.rows if not row.void]
    theirs: list[tuple[str, int | None]] = [(row.name, None) for row in rows]
    ours: list[tuple[str, int | None]] = [(name, None) for name in labels.names]
    if labels.coding == "ids" and table.has_ids:
        theirs = [(row.name, row.id) for row in rows]
        ours = [*zip(labels.names, labels.ids, strict=True)]
    elif labels.coding == "colours":
        theirs = [(row.name, row.colour) for row in rows]
        ours = [*zip(labels.names, labels.ids, strict=True)]
    if theirs == ours:
        return ""
    return f"{_shown(theirs, labels.coding)} instead of {_shown(ours, labels.coding)}"


def _shown(classes: Sequence[tuple[str, int | None]], coding: str) -> str:
    shown = [name if value is None else f"{name} {shown_ids([value], coding)}" for name, value in classes]
    return f"{len(classes)} classes ({', '.join(shown)})"
