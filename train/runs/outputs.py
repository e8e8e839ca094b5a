"""What a command may write: never onto one of its inputs, and onto existing results only with --overwrite.

Both are checked before the work begins, so that nothing is computed for results that have no place.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

from ccgpu.models.image_files import kind_of_file

SHOWN = 10  # paths that a message lists before it counts the others


def add_overwrite(parser: argparse._ActionsContainer, what: str) -> None:
    """Add --overwrite; its help says that it replaces `what`."""
    parser.add_argument("--overwrite", action="store_true", help=f"replace {what}")


def check_outputs(flag: str, outputs: Iterable[Path], inputs: Iterable[Path], *, overwrite: bool) -> None:
    """Raise ValueError if writing the outputs would replace an input, or existing files without --overwrite.

    Files are compared by what they are on the disk, so that links and, where the file system does not distinguish A
    from a, other spellings count as the input that they lead to.

    Args:
        flag: the argument that names the outputs, for messages.
        outputs: files, or folders whose content is written anew; none of them needs to exist.
        inputs: files that the command reads.
        overwrite: whether existing files may be replaced; inputs may never.
    """
    existing = [path for path in outputs if _holds_something(path)]
    if not existing:
        return
    read = {identity: path for path in inputs if (identity := _identity(path)) is not None}
    clashes = [
        f"{path}, which is {'an input' if read[found] == path else f'the input {read[found]}'}"
        for path in existing
        if (found := _identity(path)) in read
    ]
    clashes += [
        f"{source} in {folder}, which is an input"
        for folder in existing
        if folder.is_dir()
        for source in read.values()
        if folder.resolve() in source.resolve().parents
    ]
    if clashes:
        raise ValueError(f"{flag} must not replace what the command reads, got {_listed(clashes)}; name another place.")
    if not overwrite:
        files = _listed([str(path) for path in existing])
        raise ValueError(f"{flag} must be new, got existing results: {files}; name another place or add --overwrite.")


def check_output_file(flag: str, path: Path, inputs: Iterable[Path], *, overwrite: bool) -> None:
    """Raise ValueError unless one file can be written: as `check_outputs`, and its folder must be there.

    Args:
        flag: the argument that names the file, for messages.
        path: the file.
        inputs: files that the command reads.
        overwrite: whether an existing file may be replaced.
    """
    if path.is_dir():
        raise ValueError(f"{flag} must be a file, got the folder {path}; add a name.")
    if path.exists() and not path.is_file():  # a rename would put a file in the place of /dev/null
        raise ValueError(
            f"{flag} must be a regular file, got {kind_of_file(path.stat().st_mode)} {path}; name another."
        )
    if not path.parent.is_dir():
        raise ValueError(f"{flag} must lie in a folder that exists, got {path}; make {path.parent} first.")
    check_outputs(flag, [path], inputs, overwrite=overwrite)


def check_output_folder(flag: str, path: Path) -> None:
    """Raise ValueError if a folder cannot be made, because a file has its path or that of a folder above it.

    Args:
        flag: the argument that names the folder, for messages.
        path: the folder; it need not exist.
    """
    for folder in (path, *path.parents):
        if folder.is_dir():
            return
        if os.path.lexists(folder):
            if folder == path:
                raise ValueError(f"{flag} must be a folder, got the file {path}; name another.")
            raise ValueError(f"{flag} must lie in folders, got {path}, where {folder} is a file; name another place.")


def check_outside(flag: str, folder: Path, inputs: Iterable[Path]) -> None:
    """Raise ValueError if a folder for results holds inputs: the next command would take the results for such.

    Args:
        flag: the argument that names the folder, for messages.
        folder: it need not exist.
        inputs: files that the command reads, or the folders that it looks into.
    """
    results = folder.resolve()
    for path in dict.fromkeys(source.parent.resolve() for source in inputs):
        if results == path or results in path.parents:
            raise ValueError(
                f"{flag} must be another folder than the inputs', got {folder}, which holds {path}; name another."
            )


def _holds_something(path: Path) -> bool:
    """Return whether a path is a file, or a folder with a file in it."""
    return any(below.is_file() for below in path.rglob("*")) if path.is_dir() else os.path.lexists(path)


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what a path leads to, as device and file number; None where there is nothing."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _listed(entries: list[str]) -> str:
    more = len(entries) - SHOWN
    return ", ".join(entries[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def check_utf8(flag: str, path: Path, writer: str) -> None:
    """Raise ValueError if a path cannot be encoded in UTF-8, as `writer`, which writes files there, needs it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{flag} must be a path in UTF-8 for {writer}, got {path}; name another.") from None
