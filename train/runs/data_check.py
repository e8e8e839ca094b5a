"""Checking a dataset before a command computes anything: decode each file once, or take from the cache what it is."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from ccgpu.models.labels import Labels
from ccgpu.train.data.census import Census, census_table, census_warnings, check_census
from ccgpu.train.data.checking import File, check_pairs, copies, files_of, notes, palette_warnings
from ccgpu.train.data.clips import Clip
from ccgpu.train.data.facts import Facts, facts_of
from ccgpu.train.data.facts_cache import FOLDER, Stamp, cache_path, read_cache, stamp_of, write_cache
from ccgpu.train.data.pairs import Pair
from ccgpu.train.data.reading import Reading
from ccgpu.train.distributed import bar_interval, let_first_process, say
from ccgpu.train.loaders import available_cores, load_batches

# Seconds after which processes help to decode, because they take some to start, and what they must be able to save.
_ALONE, _WORTH_PROCESSES = 3.0, 10.0
_WORTH_CACHING = 1.0  # seconds of decoding; a smaller set is decoded anew each time
_SHARE = 16  # files that a process decodes at once
_MOST_PROCESSES = 16  # each holds torch, which it does not use, in some 300 MB


def check_data(
    root: Path,
    training: Sequence[Pair],
    evaluation: Sequence[Pair],
    labels: Labels,
    reading: Reading,
    in_processes: bool,
    clips: Sequence[Clip] = (),
    known: Mapping[File, Facts] | None = None,
) -> None:
    """Check all files of a dataset, say what is odd about it, and, for training, print the census of its classes.

    The first of several processes works, the others wait.

    Args:
        root: the dataset's folder, which its cache belongs to.
        training: the images to train on; none for an evaluation alone.
        evaluation: the images to evaluate on.
        labels: the classes, and the ids that the label files may contain.
        reading: how the files are read.
        in_processes: whether other processes may help with a large dataset.
        clips: the clips that are made of the images.
        known: what files are that were decoded already, by a command that has printed their census.

    Raises:
        ValueError: files cannot be used, or their labels teach or score nothing; see `check_pairs`, `check_census`.
    """
    let_first_process(lambda: _check(root, training, evaluation, labels, reading, in_processes, clips, known or {}))


def _check(
    root: Path,
    training: Sequence[Pair],
    evaluation: Sequence[Pair],
    labels: Labels,
    reading: Reading,
    in_processes: bool,
    clips: Sequence[Clip],
    known: Mapping[File, Facts],
) -> Generator[None, None, None]:
    pairs = [*dict.fromkeys([*training, *evaluation])]
    missing = [file for file in files_of(pairs) if file not in known]
    facts = {**known, **(yield from find_facts(root, missing, reading, in_processes))}
    check_pairs(pairs, facts, labels, reading, clips)
    images = {pair.image: facts[pair.image, False] for pair in pairs}
    for line in notes(images, reading.value_range, raw=reading.images.raw):
        say(line)
    for line in [*palette_warnings(pairs, facts), *copies(training, evaluation, facts)]:
        say(line)
    _take_census(training, evaluation, facts, labels, printed=bool(known))


def find_facts(
    root: Path, files: Sequence[File], reading: Reading, in_processes: bool
) -> Generator[None, None, dict[File, Facts]]:
    """Return what each file is, from the cache or by decoding it, which is then cached; yield now and then.

    Arguments are those of `check_data`.
    """
    stamps = {file: stamp_of(file[0]) for file in files}
    yield
    facts = _cached(root, stamps, reading)
    missing = [file for file in files if file not in facts]
    begun, decoded = time.monotonic(), {}
    for file, found in _decode(missing, reading.max_pixels, in_processes):
        decoded[file] = found
        yield
    if time.monotonic() - begun > _WORTH_CACHING:
        _store(root, decoded, stamps)
    return {**facts, **decoded}


def _take_census(
    training: Sequence[Pair],
    evaluation: Sequence[Pair],
    facts: Mapping[File, Facts],
    labels: Labels,
    *,
    printed: bool,
) -> None:
    censuses = [
        Census.of(purpose, (facts[pair.label, True] for pair in pairs if pair.label is not None), labels.coding)
        for purpose, pairs in (("training", training), ("evaluation", evaluation))
        if any(pair.label is not None for pair in pairs)
    ]
    if training and not printed:
        say(census_table(censuses, labels))
    for census in censuses:
        for line in census_warnings(census, labels):
            say(line)
    for census in censuses:
        check_census(census, labels)


def _cached(root: Path, stamps: Mapping[File, Stamp | None], reading: Reading) -> dict[File, Facts]:
    """Return the facts that are cached; those of images that are too large now are left out."""
    try:
        facts = read_cache(cache_path(root), stamps)
    except (OSError, ValueError) as error:
        say(f"note: the cache of {root} cannot be read ({error}); all files are decoded")
        return {}
    return {file: found for file, found in facts.items() if found.size[0] * found.size[1] <= reading.max_pixels}


def _store(root: Path, facts: Mapping[File, Facts], stamps: Mapping[File, Stamp | None]) -> None:
    try:
        write_cache(cache_path(root), facts, stamps)
    except OSError as error:
        say(
            f"note: the cache of {root} cannot be written ({error}), and the next check decodes all files again; name "
            f"another folder in {FOLDER}"
        )


def _decode(files: Sequence[File], max_pixels: int, in_processes: bool) -> Iterator[tuple[File, Facts]]:
    """Yield what each file is, in order: in this process, and with others from when they save time."""
    bar = tqdm(
        total=len(files),
        desc="checking files",
        unit="file",
        delay=1.0,  # seconds
        mininterval=bar_interval(),
    )
    begun = time.monotonic()
    with bar:
        for number, file in enumerate(files):
            passed = time.monotonic() - begun
            left = passed / max(number, 1) * (len(files) - number)  # seconds in this process alone
            if in_processes and passed > _ALONE and left > _WORTH_PROCESSES:
                rest = _FileSet(files[number:], max_pixels)
                for index, found in enumerate(_decode_in_processes(rest)):
                    bar.update()
                    yield rest.files[index], found
                return
            found = facts_of(file[0], is_label=file[1], max_pixels=max_pixels)
            bar.update()
            yield file, found


class _FileSet(Dataset[dict[str, Any]]):
    """Files for torch's DataLoader; a sample holds the facts as text, because batches are made of tensors or texts."""

    def __init__(self, files: Sequence[File], max_pixels: int) -> None:
        self.files = files
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, is_label = self.files[index]
        found = facts_of(path, is_label=is_label, max_pixels=self.max_pixels)
        return {"facts": json.dumps(found.as_plain())}


def _decode_in_processes(files: _FileSet) -> Iterator[Facts]:
    shares = [[*range(begin, min(begin + _SHARE, len(files)))] for begin in range(0, len(files), _SHARE)]
    workers = min(available_cores(), len(shares), _MOST_PROCESSES)
    loader = load_batches(files, batches=shares, workers=workers, device=torch.device("cpu"))
    for batch in loader:
        for text in batch["facts"]:
            yield Facts.from_plain(json.loads(text))
