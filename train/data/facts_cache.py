"""The cache of what the files of datasets are: two lines of JSON for each dataset, in the user's cache folder.

An entry holds while size and times of its file stay the same. Files with a problem, and those whose values cannot be
read, are not cached, because the reason may be the machine's, such as a missing library.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ccgpu.models.weights import rename_partial, write_partial
from ccgpu.train.data.checking import File
from ccgpu.train.data.facts import Facts

FOLDER = "CCGPU_CACHE_DIR"
"""Environment variable that names the folder of the caches."""

_VERSION = 8  # of the facts; increase it when a file would give others

Stamp = tuple[int, int, int]


def cache_path(root: Path) -> Path:
    """Return the cache file of the dataset in `root`: in $CCGPU_CACHE_DIR, or in ccgpu/ of the user's cache folder.

    Raises:
        OSError: the user has no home folder, as in a container with a user of its own.
    """
    folder, user = os.environ.get(FOLDER), os.environ.get("XDG_CACHE_HOME")
    if folder is None:
        user = user if user else os.path.expanduser("~/.cache")
        if not os.path.isabs(user):
            raise OSError("there is no home folder")
        folder = os.path.join(user, "ccgpu")
    digest = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()
    return Path(folder) / "datasets" / f"{digest[:32]}.json"


def stamp_of(path: Path) -> Stamp | None:
    """Return size, time of the last change and time of the last change of the entry, in ns; None without the file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def read_cache(path: Path, stamps: Mapping[File, Stamp | None]) -> dict[File, Facts]:
    """Return the facts of those files that have not changed since they were cached; none if there is no cache.

    Raises:
        OSError, ValueError: the cache cannot be read, or is damaged.
    """
    try:
        entries = _load(path)
    except FileNotFoundError:
        return {}
    return {
        file: Facts.from_plain(entry["facts"])
        for file, stamp in stamps.items()
        if stamp is not None and (entry := entries.get(_key(file))) is not None and entry["stamp"] == [*stamp]
    }


def write_cache(path: Path, facts: Mapping[File, Facts], stamps: Mapping[File, Stamp | None]) -> None:
    """Add facts to a cache, atomically; entries of other files stay. A damaged cache is replaced.

    Args:
        path: from `cache_path`.
        facts: facts to store; those of files with a problem are left out.
        stamps: from `stamp_of`, before the files were read.

    Raises:
        OSError: the cache cannot be written; the former one stays.
    """
    try:
        entries = _load(path)
    except (OSError, ValueError):
        entries = {}
    entries.update(_entries(facts, stamps))
    path.parent.mkdir(parents=True, exist_ok=True)
    body = json.dumps(entries, separators=(",", ":")).encode()
    # Another name for each process: two that check one dataset at once write two files.
    partial = write_partial(path.with_name(f"{path.name}.{os.getpid()}"), _head(body) + b"\n" + body)
    rename_partial(partial, path)


def _load(path: Path) -> dict[str, Any]:
    """Return the entries of a cache: its second line, if the first one is its `_head`."""
    head, _, body = path.read_bytes().partition(b"\n")
    if head != _head(body):
        raise ValueError("damaged, or of another version")
    entries: dict[str, Any] = json.loads(body)
    return entries


def _head(body: bytes) -> bytes:
    """Return the first line of a cache. Its digest finds damage that would still read as facts."""
    return json.dumps({"version": _VERSION, "sha256": hashlib.sha256(body).hexdigest()}).encode()


def _entries(facts: Mapping[File, Facts], stamps: Mapping[File, Stamp | None]) -> Iterable[tuple[str, dict[str, Any]]]:
    for file, found in facts.items():
        stamp = stamps[file]
        if stamp is not None and found.decoded and found.problem is None and found.unreadable is None:
            yield _key(file), {"stamp": [*stamp], "facts": found.as_plain()}


def _key(file: File) -> str:
    path, is_label = file
    return f"{'label' if is_label else 'image'}:{path.absolute()}"
