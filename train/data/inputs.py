"""Resolving INPUT arguments (files, folders, patterns) to paths of images and videos with unique output names."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ccgpu.models.image_files import SUFFIXES

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".flv"),
    *(".ogv", ".3gp"),
)
# Phones write them beside JPEG files. They cannot be read, but are inputs, so that they are named as such.
UNREADABLE_SUFFIXES = (".heic", ".heif")
_SEARCHED = (*SUFFIXES, *VIDEO_SUFFIXES, *UNREADABLE_SUFFIXES)


@dataclass(frozen=True)
class Input:
    """An image or video that a command reads.

    Attributes:
        path: the file.
        name: path of its results, without ending, relative to the output folder, with / between folders; unique among
            the inputs of a command.
    """

    path: Path
    name: str

    @property
    def is_video(self) -> bool:
        """Whether the file has the ending of a video."""
        return self.path.suffix.lower() in VIDEO_SUFFIXES


def find_inputs(given: Sequence[str], out: Path | None = None) -> tuple[list[Input], list[Path]]:
    """Return the files of a command line's INPUT arguments, in the order of the arguments; a folder's files are sorted.

    An argument is a file (with any ending), a folder (all images and videos in it and in its subfolders, except hidden
    ones; links to folders are not followed; results keep the subfolders), or a pattern with *, ? or [ ] as in a shell,
    and ** for any folders. A file that several arguments give is returned once. Links that lead nowhere and named pipes
    are returned too, for the command to name them. Two files of the same name, such as a/1.jpg and b/1.jpg, get the
    names "1" and "1-2"; so does a video whose frames' folder has the name of a folder of other results.

    Args:
        given: the arguments.
        out: the folder for the results. Where it lies inside of a folder or pattern, the files below it are no inputs:
            they are the results of an earlier run.

    Returns:
        The inputs, and the files below `out` that were left out.

    Raises:
        FileNotFoundError: an argument gives no file.
        ValueError: `out` is a folder of inputs itself.
        OSError: a folder cannot be read.
    """
    found: dict[Path, tuple[Path, str]] = {}  # by what the path leads to
    left_out: dict[Path, Path] = {}
    for argument in given:
        files = list(_expand(argument)) if argument else []  # Path("") would be the current folder
        if not files:
            raise FileNotFoundError(
                f"find_inputs: INPUT must be a file, a folder with images or videos, or a pattern of such, got "
                f"{argument!r}, where there is none; correct it."
            )
        results = None if out is None else _results_inside(argument, out)
        for path, name in files:
            resolved = Path(os.path.realpath(path))  # Path.resolve raises for a link to itself
            if results is not None and results in resolved.parents:
                left_out[resolved] = path
            else:
                found.setdefault(resolved, (path, name))
    return _with_names(list(found.values())), list(left_out.values())


def _results_inside(argument: str, out: Path) -> Path | None:
    """Return the folder of results, resolved, if it lies inside of the folder or pattern that an argument names."""
    path, results = Path(argument), out.resolve()
    if path.exists() and not path.is_dir():
        return None
    if not path.exists():  # a pattern: the folder in front of its first wildcard
        fixed = itertools.takewhile(lambda part: not glob.has_magic(part), path.parts)
        path = Path(*fixed)
    elif path.resolve() == results:
        raise ValueError(f"--out must be another folder than the inputs', got {out} for both; name another.")
    return results if path.resolve() in results.parents else None


def _with_names(found: Sequence[tuple[Path, str]]) -> list[Input]:
    """Return inputs with names that differ from each other in more than upper and lower case."""
    # Some file systems do not distinguish A from a. The frames of a video a.mp4 lie in a folder a, where the results of
    # other images in a folder a would lie too.
    folders = {parent.as_posix().lower() for _, name in found for parent in PurePosixPath(name).parents}
    taken: set[str] = set()
    inputs = []
    for path, wanted in found:
        is_video = Input(path, wanted).is_video
        name, number = wanted, 1
        while name.lower() in taken or (is_video and name.lower() in folders):
            number += 1
            name = f"{wanted}-{number}"
        taken.add(name.lower())
        inputs.append(Input(path, name))
    return inputs


def _expand(argument: str) -> Iterable[tuple[Path, str]]:
    """Yield the files of one argument, with the names of their results before these are made unique."""
    path = Path(argument)
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            below = file.relative_to(path)
            hidden = any(part.startswith(".") for part in below.parts)
            if file.suffix.lower() in _SEARCHED and not hidden and not file.is_dir():
                yield file, below.with_suffix("").as_posix()
    elif os.path.lexists(path):
        yield path, path.stem
    else:
        for name in sorted(glob.glob(argument, recursive=True)):
            if not Path(name).is_dir():
                yield Path(name), Path(name).stem
