"""Checking the files of a dataset before anything is computed with them: every problem in one error, and what is odd.

The files are decoded by `facts.facts_of`; here their facts are judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ccgpu.models.image_format import ImageFormat
from ccgpu.models.labels import Labels, shown_ids
from ccgpu.train.data.facts import Facts
from ccgpu.train.data.masks import DESCRIPTION, NAMES
from ccgpu.train.data.pairs import Pair, listing
from ccgpu.train.data.reading import EXIF_ADVICE, Reading, conflict, times

File = tuple[Path, bool]
"""A file, and whether it is a label file."""

_LISTED = 10  # most values that a message lists
# Highest values of cameras and sensors of 8, 10, 12 and 14 bits.
_RANGES = (255, 1023, 4095, 16383)
_SENSOR = 4095  # of 12 bits, the most common of those that store their values in 16


def files_of(pairs: Sequence[Pair]) -> list[File]:
    """Return each file of the pairs once."""
    found = {(pair.image, False): None for pair in pairs}
    found |= {(pair.label, True): None for pair in pairs if pair.label is not None}
    return list(found)


def check_pairs(
    pairs: Sequence[Pair],
    facts: Mapping[File, Facts],
    labels: Labels | None,
    reading: Reading,
    clips: Sequence[Sequence[Pair]] = (),
) -> None:
    """Raise unless all files of a dataset can be used.

    A file must be whole, an image of a known range of values and of a size that is read; a label file a mask (see
    `masks`), of the size and EXIF orientation of its image, without values that are no ids. The frames of a clip must
    have one size.

    Args:
        pairs: from `pairs.find_by_name`.
        facts: what the files are; of all `files_of(pairs)`.
        labels: the classes, and the ids that the label files may contain; None: neither they nor, without a range of
            values, the format of the images are known yet.
        reading: how the files are read.
        clips: the clips that are made of the pairs.

    Raises:
        ValueError: files cannot be used. One error lists the first ten problems and counts the rest.
    """
    problems, more = file_problems(pairs, facts, labels, reading, clips)
    if problems:
        raise ValueError(
            f"check_pairs: images and label files must be usable, got {len(problems)} problem"
            f"{'s'[: len(problems) > 1]} in {len(pairs)} pairs; mend, replace or remove these files:\n"
            + "\n".join([listing(problems), *more])
        )


def file_problems(
    pairs: Sequence[Pair],
    facts: Mapping[File, Facts],
    labels: Labels | None,
    reading: Reading,
    clips: Sequence[Sequence[Pair]] = (),
) -> tuple[list[str], list[str]]:
    """Return a line for each problem of a dataset's files, and lines of advice; arguments are `check_pairs`'s."""
    problems = [problem for pair in pairs for problem in _pair_problems(pair, facts, labels, reading)]
    problems += _clip_problems(clips, facts, reading)
    conflicts = [pair for pair in pairs if reading.exif is None and _differ(pair, facts)]
    about_labels = any(pair.label is not None and _label_problems(pair.label, facts, labels) for pair in pairs)
    problems += [conflict(pair, *_orientations(pair, facts)) for pair in conflicts]
    more = [f"label files: {labels.hint}."] if about_labels and labels is not None else []
    more += [f"EXIF orientation: {EXIF_ADVICE}{_fitting(conflicts, facts)}."] if conflicts else []
    return problems, more


def check_labels(files: Sequence[Path], facts: Mapping[File, Facts], labels: Labels, reading: Reading) -> None:
    """Raise unless label files can be used, whatever their images are; arguments are those of `check_pairs`.

    Raises:
        ValueError: files cannot be used. One error lists the first ten problems and counts the rest.
    """
    problems = [
        problem
        for path in files
        for problem in [*_undecoded(path, facts[path, True], reading), *_label_problems(path, facts, labels)]
    ]
    if problems:
        raise ValueError(
            f"check_labels: label files must be usable, got {len(problems)} problem{'s'[: len(problems) > 1]} in "
            f"{len(files)} files; mend, replace or remove these files:\n{listing(problems)}\nlabel files: "
            f"{labels.hint}."
        )


def _undecoded(path: Path, found: Facts, reading: Reading) -> list[str]:
    """Return a line if a file was not decoded, because it cannot be or because it is too large."""
    if found.problem is not None:
        return [f"{path}: {found.problem}"]
    if not found.decoded:
        return [f"{path}: {times(found.size)} pixels, more than {reading.max_pixels}; allow more with --max-pixels"]
    return []


def _pair_problems(pair: Pair, facts: Mapping[File, Facts], labels: Labels | None, reading: Reading) -> Iterator[str]:
    files = files_of([pair])
    undecoded = [line for file in files for line in _undecoded(file[0], facts[file], reading)]
    yield from undecoded
    image = facts[pair.image, False]
    if image.problem is None and image.decoded:
        is_known = labels is not None or reading.value_range is not None
        problem = _values_problem(image, reading) if is_known else _broken(image)
        if problem is not None:
            yield f"{pair.image}: {problem}"
    if pair.label is None:
        return
    yield from _label_problems(pair.label, facts, labels)
    if not undecoded and not (reading.exif is None and _differ(pair, facts)):
        sizes = [_turned(facts[file], reading) for file in files]
        if sizes[0] != sizes[1]:
            pages = f", the first of {image.frames} images in its file" if image.frames > 1 else ""
            yield f"{pair.label}: {times(sizes[1])} pixels, but the image has {times(sizes[0])}{pages}"


def _values_problem(image: Facts, reading: Reading) -> str | None:
    """Return why an image cannot be read in the format of the dataset's images; None if it can."""
    wanted, values = reading.images, image.values
    if not wanted.raw:
        if image.no_rgb is not None:
            return image.no_rgb
        if image.bits == 32 and reading.value_range is None:
            return "values of 32 bits, whose range is unknown; name it with --value-range LOW HIGH"
        if not image.scalable and reading.value_range is not None:
            return "16 bits of each colour, read as 8; convert it to 8 bits, or to PNG for --value-range"
        return None
    if values is None:
        return f"{image.unreadable}; its values cannot be read as they are stored"
    if values.broken:
        return _broken(image)
    # Grey that was saved as RGB is found when the image is read.
    is_grey = wanted.channels == 1 and values.channels == 3 and len({*values.sums}) == 1
    if values.dtype != wanted.dtype or (values.channels != wanted.channels and not is_grey):
        return f"{ImageFormat(values.channels, raw=True, dtype=values.dtype)}, not {wanted}"
    return None


def _broken(image: Facts) -> str | None:
    """Return how many values of an image are NaN or infinite; None if there are none."""
    broken = 0 if image.values is None else image.values.broken
    return f"{broken} values are NaN or infinite; replace them" if broken else None


def _clip_problems(clips: Sequence[Sequence[Pair]], facts: Mapping[File, Facts], reading: Reading) -> list[str]:
    """Return a line for each frame of another size than the first of its clip."""
    lines: dict[str, None] = {}  # each line once: clips overlap
    for first, *others in clips:
        size = _turned(facts[first.image, False], reading)
        for pair in others:
            own = _turned(facts[pair.image, False], reading)
            if own != size and (0, 0) not in (own, size):  # no size: the file has another problem
                lines[f"{pair.image}: {times(own)} pixels, but {first.image}, of the same clip, has {times(size)}"] = (
                    None
                )
    return list(lines)


def _label_problems(label: Path, facts: Mapping[File, Facts], labels: Labels | None) -> list[str]:
    """Return a line if a label file is of another kind, or holds values that are no ids."""
    found = facts[label, True]
    if found.problem is not None or not found.decoded:
        return []
    if found.wrong_kind is not None or found.mask is None:
        return [f"{label}: {found.wrong_kind}; a mask is {DESCRIPTION}"]
    if labels is None:
        return []
    counts = found.mask.read_as(labels.coding)
    if counts is None:
        return [f"{label}: {NAMES[found.mask.kind]}, not one of {labels.coding}, which are {labels.show(labels.known)}"]
    known = {*labels.ids, *labels.void}
    unknown = sorted(value for value in counts if value not in known)
    if unknown:
        more = len(unknown) > _LISTED or found.mask.different > len(found.mask.pixels)
        shown = ", ".join(shown_ids([value], labels.coding) for value in unknown[:_LISTED]) + (", ..." * more)
        return [f"{label}: holds the {_what(labels)} {shown}, but the {labels.coding} are {labels.show(labels.known)}"]
    return []


def _what(labels: Labels) -> str:
    return "values" if labels.coding == "ids" else "colours"


def _orientations(pair: Pair, facts: Mapping[File, Facts]) -> tuple[int, int]:
    """Return the EXIF orientations of image and label file; equal where they do not matter or are not known."""
    image = facts[pair.image, False]
    label = image if pair.label is None else facts[pair.label, True]
    known = all(found.problem is None and found.decoded for found in (image, label))
    return (image.orientation, label.orientation) if known else (1, 1)


def _differ(pair: Pair, facts: Mapping[File, Facts]) -> bool:
    image, label = _orientations(pair, facts)
    return image != label


def _turned(found: Facts, reading: Reading) -> tuple[int, int]:
    """Return a file's size as it is read."""
    return found.size[::-1] if reading.exif != "stored" and found.orientation >= 5 else found.size


def _fitting(conflicts: Sequence[Pair], facts: Mapping[File, Facts]) -> str:
    """Return which of the two choices the sizes of images and label files speak for."""
    fits = {"stored": 0, "upright": 0}
    for pair in conflicts:
        if pair.label is None:
            continue
        image, label = facts[pair.image, False], facts[pair.label, True]
        sizes = {exif: _turned(image, Reading(exif)) == _turned(label, Reading(exif)) for exif in fits}
        for exif, equal in sizes.items():
            fits[exif] += equal and not all(sizes.values())
    said = [f"{number} label files have the size for {exif}" for exif, number in fits.items() if number]
    return f" ({', '.join(said)})" if said else ""


def notes(images: Mapping[Path, Facts], value_range: tuple[float, float] | None, *, raw: bool = False) -> list[str]:
    """Return a line for each thing that is allowed but may surprise.

    These are transparent pixels, files of several images, and 16 bits of which not all are used.

    Args:
        images: what the image files are.
        value_range: the values that become 0 and 255; None: 0 and 65535.
        raw: whether the images are read with all channels and values as stored.
    """
    lines = []
    for these, what in (
        (
            [path for path, found in images.items() if found.transparent],
            "have transparent pixels, " + ("whose transparency is not read" if raw else "read as white"),
        ),
        (
            [path for path, found in images.items() if found.frames > 1],
            "hold several images, of which the first is read",
        ),
        (
            [path for path, found in images.items() if found.unread and not raw],
            "have further channels, such as near infrared, which are not read",
        ),
    ):
        if these:
            lines.append(f"note: {len(these)} images {what}, such as {these[0]}")
    deep = [path for path, found in images.items() if found.bits == 16 and not raw]
    highest = max((images[path].highest for path in deep), default=0)
    limit = next((limit for limit in _RANGES if highest <= limit), None)
    scalable = all(images[path].scalable for path in deep)
    advice = f"name their range with --value-range 0 {limit}" if scalable else "convert them to 8 bits"
    if deep and value_range is None and limit is not None:
        lines.append(
            f"warning: the {len(deep)} images of 16 bits, such as {deep[0]}, have no value above {limit}, so that "
            f"they are read as 0..{limit >> 8} of 255; {advice}"
        )
    dark = [path for path in deep if images[path].highest <= _SENSOR]
    if dark and value_range is None and limit is None:
        lines.append(
            f"note: {len(dark)} of the {len(deep)} images of 16 bits, such as {dark[0]}, have no value above "
            f"{_SENSOR}; if they are those of another sensor than the rest, they need a --value-range of their own"
        )
    return lines


def palette_warnings(pairs: Sequence[Pair], facts: Mapping[File, Facts]) -> list[str]:
    """Return a line if one value of the label files has different colours in their palettes.

    Image editors renumber the values of a file when they save its palette, which no other check can see.
    """
    seen: dict[int, tuple[str, Path]] = {}
    odd: dict[int, str] = {}
    for label in dict.fromkeys(pair.label for pair in pairs if pair.label is not None):
        mask = facts[label, True].mask
        for value, code in () if mask is None else mask.palette.items():
            colour = shown_ids([code], "colours")
            first, where = seen.setdefault(value, (colour, label))
            if colour != first:
                odd.setdefault(value, f"{value} is {first} in {where} and {colour} in {label}")
    if not odd:
        return []
    return [
        f"warning: {len(odd)} values have different colours in the palettes of label files, such as {odd[min(odd)]}; "
        "values that a program renumbered are no ids"
    ]


def copies(training: Sequence[Pair], evaluation: Sequence[Pair], facts: Mapping[File, Facts]) -> list[str]:
    """Return a line if images for evaluation have the same bytes as training images, and one for copies among these.

    An image that is itself used for both is not such a copy.
    """
    first: dict[str, Path] = {}
    repeated = []
    for path in dict.fromkeys(pair.image for pair in training):
        original = first.setdefault(facts[path, False].digest, path)
        if original != path:
            repeated.append((path, original))
    trained = {pair.image for pair in training}
    evaluated = [*dict.fromkeys(pair.image for pair in evaluation)]
    digests = ((path, facts[path, False].digest) for path in evaluated if path not in trained)
    leaked = [(path, first[digest]) for path, digest in digests if digest in first]
    lines = []
    if repeated:
        lines.append(f"note: {len(repeated)} images for training are copies of others, such as {_two(*repeated[0])}")
    if leaked:
        lines.append(
            f"warning: {len(leaked)} of {len(evaluated)} images for evaluation are copies of training images, such as "
            f"{_two(*leaked[0])}: the scores do not tell how well other images are predicted"
        )
    return lines


def _two(path: Path, original: Path) -> str:
    return f"{path} of {original}"
