"""Images of a dataset and their label files, found by name (`reading.py` reads a pair, `checking.py` checks all)."""

import unicodedata
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ccgpu.models.image_files import SUFFIXES

LISTED = 10
"""Most problems that a message lists."""
_NEAR = 3  # most near misses that are named for a file


@dataclass(frozen=True)
class Pair:
    """An image, its label file (None if it has none) and its name, which is unique in its folder."""

    image: Path
    label: Path | None
    name: str


def find_by_name(
    function: str,
    images: Path,
    labels: Path | None,
    image_suffixes: Sequence[str] = SUFFIXES,
    label_suffix: str | Sequence[str] = ".png",
    depth: int | None = 0,
    label_endings: Sequence[str] = (),
    left_out: Sequence[str] = (),
) -> list[Pair]:
    """Return the images of a folder with the label files of the same name in another, sorted by subfolder and name.

    The name of an image is its file name without the suffix, which may be upper or lower case (`a.JPG` is image `a`).
    By default an image may be of any format of `image_files.FORMATS`.
    Hidden files and files with other suffixes are ignored.

    Args:
        function: name of the caller, for messages.
        images: folder of the images.
        labels: folder of the label files; None: find images only.
        image_suffixes: endings of image files.
        label_suffix: ending of label files, or several.
        depth: number of subfolders above the files: 1 for `images/CITY/NAME.png`, with equal CITY for both; None: any
            number, and the subfolders are a part of the name.
        label_endings: what may follow the name in that of the label file, such as "_mask", where the image has no label
            file of its own name.
        left_out: names of images that are left out with their label files, whether they are there or not.

    Returns:
        At least one pair; the files exist, but have not been opened (see `checking.py`).

    Raises:
        FileNotFoundError: there is no such folder (the message names the existing ones), it holds no images, or an
            image or label file lacks its partner (the message names the file that was looked for, and what lies near).
        OSError: a folder cannot be read.
        ValueError: two files have the same name, such as a.jpg and a.png; the message lists those without partner too.
    """
    suffixes = (label_suffix,) if isinstance(label_suffix, str) else tuple(label_suffix)
    pairs, problems = match_by_name(
        function, images, labels, image_suffixes, suffixes, depth, label_endings, left_out=left_out
    )
    if problems:
        kind = ValueError if any("names twice" in problem for problem in problems) else FileNotFoundError
        raise kind(f"{function}: " + "\n".join(problems))
    return pairs


def match_by_name(
    function: str,
    images: Path,
    labels: Path | None,
    image_suffixes: Sequence[str],
    label_suffixes: Sequence[str],
    depth: int | None,
    label_endings: Sequence[str],
    most: int | None = LISTED,
    *,
    mixed: bool = False,
    left_out: Sequence[str] = (),
) -> tuple[list[Pair], list[str]]:
    """Return the pairs that `find_by_name` finds, and a text for each kind of problem.

    Arguments are those of `find_by_name`; a text lists `most` files, or all for None. `mixed`: the folder of the images
    holds label files too, which are the files whose names have one of the endings after the name of another file.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no images.
        OSError: a folder cannot be read.
    """
    image_files, twice = _files_by_name(function, "images", images, image_suffixes, depth, most)
    problems = [f"images must have different names, {twice}"] * bool(twice)
    label_files: dict[tuple[str, str], Path] = {}
    if mixed:
        marked = {key for key in image_files if _base(key, image_files, label_endings) is not None}
        if labels is not None:
            label_files = {key: image_files[key] for key in marked}
            alike = _match_endings(
                {key: path for key, path in image_files.items() if key not in marked}, label_files, label_endings, most
            )
            problems += [f"label files must have different names, {alike}"] * bool(alike)
        image_files = {key: path for key, path in image_files.items() if key not in marked}
    elif labels is not None:
        label_files, twice = _files_by_name(function, "label files", labels, label_suffixes, depth, most)
        twice = twice or _match_endings(image_files, label_files, label_endings, most)
        problems += [f"label files must have different names, {twice}"] * bool(twice)
    for files in (image_files, label_files):
        for key in [key for key in files if key[1] in left_out]:
            del files[key]
    if not image_files:
        place = images / "/".join("*" * (depth or 0))
        below = [f"{path.name}/" for path in _entries(images, depth) if path.is_dir()]
        raise FileNotFoundError(
            f"{function}: split must hold images, got none named *({'|'.join(image_suffixes)}) in {place}"
            f"{', but the folders ' + ' '.join(below[:_NEAR]) if below else ''}; unpack them there or choose another "
            "split."
        )
    if labels is not None:
        alone = _without_partner(images, labels, image_files, label_files, image_suffixes, label_suffixes, depth)
        if alone:
            problems.append(
                f"every image of {images} must have its label file in {labels}, got {len(alone)} of "
                f"{len(image_files | label_files)} without; complete, rename or remove them:\n{listing(alone, most)}"
            )
    pairs = [
        Pair(image_files[key], label_files.get(key), key[1] if depth is not None or key[0] == "." else "/".join(key))
        for key in sorted(image_files)
        if labels is None or key in label_files
    ]
    return pairs, problems


def _match_endings(
    image_files: dict[tuple[str, str], Path],
    label_files: dict[tuple[str, str], Path],
    endings: Sequence[str],
    most: int | None,
) -> str:
    """Give label files whose names have an ending the names of their images, in place; return those of one name."""
    twice = []
    for (place, name), path in sorted(label_files.items()):
        if (place, name) in image_files:
            continue
        key = _base((place, name), image_files, endings)
        if key is None or (key in label_files and label_files[key].stem == key[1]):
            continue
        if key in label_files:
            twice.append(f"{label_files[key]} and {path.name}")
        label_files[key] = label_files.pop((place, name))
    return _twice(twice, most) if twice else ""


def _base(key: tuple[str, str], files: Container[tuple[str, str]], endings: Sequence[str]) -> tuple[str, str] | None:
    """Return the name of a file that is left of another's name without one of the endings; None if there is none."""
    place, name = key
    bases = ((place, name[: -len(ending)]) for ending in endings if name.lower().endswith(ending))
    return next((base for base in bases if base in files), None)


def _without_partner(
    images: Path,
    labels: Path,
    image_files: dict[tuple[str, str], Path],
    label_files: dict[tuple[str, str], Path],
    image_suffixes: Sequence[str],
    label_suffixes: Sequence[str],
    depth: int | None,
) -> list[str]:
    """Return a line for each file without partner: the file that was looked for, and the near misses of the first."""
    lines: list[str] = []
    for own, others, folder, suffixes, what in (
        (image_files, label_files, labels, label_suffixes, "label file"),
        (label_files, image_files, images, image_suffixes, "image"),
    ):
        missing = sorted(own.keys() - others.keys())
        entries = [*_entries(folder, 0), *(() if depth == 0 else _entries(folder, depth))] if missing else []
        entries = [*dict.fromkeys(entries)]
        for place, name in missing:
            mark = (
                "_mask" if folder == images == labels and what == "label file" else ""
            )  # what tells it from its image
            wanted = folder / place / f"{name}{mark}{suffixes[0] if len(suffixes) == 1 else '.*'}"
            others_there = [entry for entry in entries if entry != own[place, name]]
            near = _near_misses(name, wanted.parent, others_there) if len(lines) < LISTED else ""
            lines.append(f"{own[place, name]} has no {what} {wanted}{near}")
    return lines


def _near_misses(name: str, folder: Path, entries: Sequence[Path]) -> str:
    """Return which entries are named like `name`, up to case, Unicode's form, an addition at the end and the folder."""
    start = _folded(name)
    found = []
    for path in entries:
        other = _folded(path.name)
        if other.startswith(start) and not other[len(start) :][:1].isalnum():
            shown = path.name if path.parent == folder else str(path)
            # Both look the same: é is one character of Unicode, or an e with an accent as a second one.
            alike = not path.name.lower().startswith(name.lower())
            found.append(f"{shown} (its accents are written as other characters of Unicode)" if alike else shown)
    more = f" and {len(found) - _NEAR} more" if len(found) > _NEAR else ""
    return f", but there is {', '.join(found[:_NEAR])}{more}" if found else ""


def _folded(name: str) -> str:
    """Return a name without the differences that a reader does not see: macOS may write an accent as a character."""
    return unicodedata.normalize("NFC", name).lower()


def _files_by_name(
    function: str, kind: str, folder: Path, suffixes: Sequence[str], depth: int | None, most: int | None
) -> tuple[dict[tuple[str, str], Path], str]:
    """Return (subfolder, name) -> file, and what to do about files of one name."""
    check_folder(function, kind, folder)
    found: dict[tuple[str, str], Path] = {}
    twice = []
    for path in _entries(folder, depth):
        suffix = next((suffix for suffix in suffixes if path.name.lower().endswith(suffix.lower())), None)
        if suffix is None:
            continue
        key = path.relative_to(folder).parent.as_posix(), path.name[: -len(suffix)]
        if key in found:
            twice.append(f"{found[key]} and {path.name}")
        found[key] = path
    return found, _twice(twice, most) if twice else ""


def check_folder(function: str, kind: str, folder: Path) -> None:
    """Check that a folder is there.

    Raises:
        FileNotFoundError: it is not; the message names the first folder above it that is, and what lies in that.
    """
    if folder.is_dir():
        return
    above = next(parent for parent in folder.parents if parent.is_dir())
    missing = folder.relative_to(above).parts[0]
    there = sorted(path.name for path in above.iterdir() if path.is_dir() and not path.name.startswith("."))
    raise FileNotFoundError(
        f"{function}: {kind} must lie in {folder}, got no folder {missing!r} in {above}; correct the dataset's "
        f"folder or the split. Folders there:\n{listing(there) or '  none'}"
    )


def _twice(files: Sequence[str], most: int | None) -> str:
    return f"got {len(files)} names twice; remove one file of each:\n{listing(files, most)}"


def _entries(folder: Path, depth: int | None) -> Iterator[Path]:
    """Yield the entries `depth` levels below, sorted, without hidden ones. (glob would skip unreadable folders.)

    None: the files of all levels, and none of the folders.
    """
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if depth == 0 or (depth is None and not path.is_dir()):
            yield path
        elif path.is_dir():
            yield from _entries(path, None if depth is None else depth - 1)


def listing(problems: Sequence[str], most: int | None = LISTED) -> str:
    """Return problems as indented lines: the first `most`, or all for None, then how many more there are."""
    lines = [f"  {problem}" for problem in problems[:most]]
    if most is not None and len(problems) > most:
        lines.append(f"  ... and {len(problems) - most} more")
    return "\n".join(lines)
