"""Resolving INPUT arguments (files, folders, patterns) to paths of images and videos with unique output names."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ccgpu.models.image_files import SUFFIXES

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".3gp")


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


def find_inputs(given: Sequence[str]) -> list[Input]:
    """Return the files of a command line's INPUT arguments, in the order of the arguments; a folder's files are sorted.

    An argument is a file (with any ending), a folder (all images and videos in it and in its subfolders, except hidden
    ones; results keep the subfolders), or a pattern with *, ? or [ ] as in a shell, and ** for any folders. A file that
    several arguments give is returned once. Two files of the same name, such as a/1.jpg and b/1.jpg, get the names "1"
    and "1-2".

    Raises:
        FileNotFoundError: an argument gives no file.
        OSError: a folder cannot be read.
    """
    found: dict[Path, str] = {}
    for argument in given:
        files = list(_expand(argument))
        if not files:
            raise FileNotFoundError(
                f"find_inputs: INPUT must be a file, a folder with images or videos, or a pattern of such, got "
                f"{argument!r}, where there is none; correct it."
            )
        for path, name in files:
            if path.resolve() not in {known.resolve() for known in found}:
                found[path] = name
    names: set[str] = set()
    inputs = []
    for path, wanted in found.items():
        name, number = wanted, 1
        while name.lower() in names:  # some file systems do not distinguish A from a
            number += 1
            name = f"{wanted}-{number}"
        names.add(name.lower())
        inputs.append(Input(path, name))
    return inputs


def _expand(argument: str) -> Iterable[tuple[Path, str]]:
    """Yield the files of one argument, with the names of their results before these are made unique."""
    path = Path(argument)
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            below = file.relative_to(path)
            hidden = any(part.startswith(".") for part in below.parts)
            if file.suffix.lower() in (*SUFFIXES, *VIDEO_SUFFIXES) and not hidden and file.is_file():
                yield file, below.with_suffix("").as_posix()
    elif path.exists():
        yield path, path.stem
    else:
        for name in sorted(glob.glob(argument, recursive=True)):
            if Path(name).is_file():
                yield Path(name), Path(name).stem
