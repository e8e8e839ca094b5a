"""What a command is to look at: files, folders, patterns and videos, each under a name of its own."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ccgpu.models.image_files import SUFFIXES

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".3gp")


@dataclass(frozen=True)
class Input:
    """An image or video.

    Attributes:
        path: the file.
        name: path of its results without ending, relative to their folder, with / between folders; different for
            each input of a command.
    """

    path: Path
    name: str

    @property
    def is_video(self) -> bool:
        """Whether the file's ending is that of a video."""
        return self.path.suffix.lower() in VIDEO_SUFFIXES


def find_inputs(given: Sequence[str]) -> list[Input]:
    """Return the files that arguments of a command line stand for, in their order; those of a folder sorted.

    An argument is a file (taken whatever its ending), a folder (all images and videos in it and below, hidden ones
    left out; results keep the subfolders), or a pattern with *, ? or [ ] as a shell's, ** for any folders. A file that
    several arguments stand for is taken once. Two files of one name, such as a/1.jpg and b/1.jpg, get the names "1" and
    "1-2".

    Raises:
        FileNotFoundError: an argument that stands for nothing.
        OSError: a folder that cannot be read.
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
        while name.lower() in names:  # as some file systems take A for a
            number += 1
            name = f"{wanted}-{number}"
        names.add(name.lower())
        inputs.append(Input(path, name))
    return inputs


def _expand(argument: str) -> Iterable[tuple[Path, str]]:
    """The files of one argument with the names they would like."""
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
