"""Convert a published checkpoint to our own format: `ccgpu convert IN OUT`.

IN is the authors' CCNet, mmsegmentation's CCNet R-50/101-D8, a run's `last.pt`, or a ResNet of torchvision, MIT scene
parsing or mmsegmentation. OUT, a safetensors file (or .pt), holds the weights, the settings that they need to give the
same outputs (stem, dilations, activation, normalisation, align_corners), and the classes, so that predicting with it
needs no flags. A ResNet becomes a file for `--imagenet`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ccgpu.models import checkpoint
from ccgpu.models.labels import Labels, class_differences
from ccgpu.models.published import RESNET
from ccgpu.train.dataset import check_classes, find_dataset
from ccgpu.train.distributed import say
from ccgpu.train.runs.errors import BAD_FILE, run_command
from ccgpu.train.runs.flags import checkpoint_file
from ccgpu.train.runs.outputs import add_overwrite, check_output_file
from ccgpu.train.runs.parser import command_parser
from ccgpu.train.runs.settings.limits import MOST_LOOPS
from ccgpu.train.runs.setup import dataset_of_network

# Number of classes -> the dataset that a published network with so many classes was trained on.
BY_CLASSES = {19: "cityscapes", 21: "voc", 150: "ade20k"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    0: converted. 1: OUT cannot be written. 2: bad input. 130: stopped by Ctrl-C.
    """
    flags = read_flags(argv)
    return run_command(
        "convert",
        lambda: prepare(flags),
        lambda prepared: write(flags, *prepared),
        again="run the command again",
        smaller="run it on a machine with more",
        refused=BAD_FILE,
    )


def read_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags; for those left out, the file's values hold."""
    parser = command_parser("convert", __doc__)
    add = parser.add_argument
    add(
        "source",
        type=checkpoint_file,
        metavar="IN",
        help="a published checkpoint, or a run folder, whose last.pt is read",
    )
    add(
        "target", type=Path, metavar="OUT", help="the file to write: .safetensors (added where there is no ending), .pt"
    )
    add("--recurrence", type=int, metavar="R", help="loops R, which the authors' files do not hold (default: 2)")
    add(
        "--align-corners",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="how logits are upsampled, for mmsegmentation's files without a config: aligned for crops of 769x769",
    )
    add(
        "--dataset",
        metavar="MODULE",
        help="dataset that defines the network's classes (default: the file's classes, or by their number: "
        f"{', '.join(f'{number} {name}' for number, name in BY_CLASSES.items())})",
    )
    add_overwrite(parser, "OUT where it exists")
    return parser.parse_args(argv)


def prepare(flags: argparse.Namespace) -> tuple[Path, checkpoint.Checkpoint]:
    """Return the file to write, and the network that it gets.

    Raises:
        ValueError, OSError, ImportError, TypeError: a file cannot be used, or the flags do not fit it.
    """
    target = flags.target if flags.target.suffix else flags.target.with_name(flags.target.name + ".safetensors")
    checkpoint.check_ending(target)
    check_output_file("OUT", target, [flags.source], overwrite=flags.overwrite)
    if flags.recurrence is not None and flags.recurrence > MOST_LOOPS:
        raise ValueError(f"--recurrence must be at most {MOST_LOOPS}, got {flags.recurrence}")
    given = {"recurrence": flags.recurrence, "align_corners": flags.align_corners}
    changes = {name: value for name, value in given.items() if value is not None}
    found = checkpoint.read(flags.source, **changes)
    if found.source == RESNET:
        if changes or flags.dataset is not None:
            raise ValueError(f"--recurrence, --align-corners and --dataset must be left out for {RESNET}'s file")
        return target, found
    labels, dataset, note = find_labels(found, flags.dataset)
    return target, dataclasses.replace(found, labels=labels, dataset=dataset, notes=(*found.notes, *note))


def write(flags: argparse.Namespace, target: Path, found: checkpoint.Checkpoint) -> int:
    """Write a network in our format, print a description of it, and return the exit status."""
    if found.source == RESNET:
        checkpoint.write_backbone(target, found)
        what = f"{found.network['backbone']} with a {found.network['stem']} stem"
        say(f"{flags.source}: {what}\n{target}: for --imagenet")
        return 0
    checkpoint.write(target, found)
    notes = (f"note: {line}" for line in found.notes)
    say("\n".join([f"{flags.source}: {describe(found)}", *notes, f"written: {target}"]))
    return 0


def find_labels(
    found: checkpoint.Checkpoint, dataset: str | None
) -> tuple[dict[str, Any] | None, str | None, tuple[str, ...]]:
    """Return the classes of a network: from --dataset, else from the file, else from a known dataset.

    Returns:
        The classes as in `checkpoint_keys.Description`, or None; the name of their dataset, or None; and notes on what
        was assumed about them.

    Raises:
        ValueError: there is no such dataset, or the network was trained on other classes.
    """
    number = found.network["num_classes"]
    if dataset is not None:
        return dataset_of_network(found, dataset).labels.as_plain(), dataset, ()
    if found.labels is not None and "ids" in found.labels:
        return found.labels, found.dataset, ()
    name = BY_CLASSES.get(number) if found.dataset is None else found.dataset
    known = None if name is None else find_dataset(name).labels
    if known is not None and known.num_classes != number:  # the network was trained on other classes of that dataset
        known = None
    if found.labels is None and known is None:
        note = f"the file does not name its {number} classes: they are numbered; --dataset gives them names"
        return None, None, (note,)
    if found.labels is None and known is not None:
        return known.as_plain(), name, (f"the file does not name its {number} classes: those of {name} were taken",)
    # The file has names and colours but no label ids: a known dataset with the same names adds them.
    if known is not None and found.labels is not None and not class_differences(found.labels, known, exact=False):
        return known.as_plain(), name, ()
    if found.labels is not None:  # a network that was trained on other classes may still have the names of the first
        check_classes(Labels.from_plain(found.labels), number, "the file's classes")
    return found.labels, None, ()


def describe(found: checkpoint.Checkpoint) -> str:
    """Return a line that describes the network of a file."""
    network = found.network
    loops = network.get("recurrence", 2)
    corners = "aligned" if network.get("align_corners", True) else "not aligned"
    return f"{found.source}, {network['backbone']}, {network['num_classes']} classes, R = {loops}, corners {corners}"


if __name__ == "__main__":
    sys.exit(main())
