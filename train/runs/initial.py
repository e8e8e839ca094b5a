"""The trained network that a run starts from (--init): what its file decides, and its weights for the run's classes."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ccgpu.models import checkpoint
from ccgpu.models.backbones import RESNETS
from ccgpu.models.ccnet import CCNet
from ccgpu.models.checkpoint import Checkpoint
from ccgpu.models.checkpoint_keys import LAST
from ccgpu.models.classifier import CLASSIFIERS
from ccgpu.models.labels import Labels
from ccgpu.models.published import AUTHORS_MEAN, RESNET
from ccgpu.models.weights import differences, for_channels, for_context, for_dims
from ccgpu.train.dataset import Dataset
from ccgpu.train.runs.checkpoints import BEST, PREVIOUS
from ccgpu.train.runs.flags import flag

_ATTENTIONS = {"rcca": "criss-cross", "nonlocal": "non-local"}  # context modules with the same parameters
_SHOWN = 12  # names of classes in a message
# Parts that a network of --init may lack, or have more than the run's: prefix of their entries -> name in messages.
_PARTS = {"head.embedding.": "the embedding of --ccl", "auxiliary_head.": "the auxiliary head"}
# Arguments of the network that a published file may lack -> a word of the note that tells what was assumed.
_ASSUMED = {"align_corners": "align_corners=", "recurrence": "loops"}


@dataclass(frozen=True)
class Initial:
    """A network that a run starts from.

    Attributes:
        path: its file.
        found: the network.
        settings: the settings that it decides, by name.
    """

    path: Path
    found: Checkpoint
    settings: Mapping[str, Any]


def read_initial(path: str, flags: Mapping[str, Any]) -> Initial:
    """Return the network of the file that --init names.

    Args:
        path: a file of any layout that `CCNet.from_checkpoint` reads, or a run's folder.
        flags: the settings that the command line gives, by name.

    Raises:
        ValueError, OSError, ImportError: the file cannot be used or holds a backbone alone, or flags contradict its
            network.
    """
    try:
        found = checkpoint.read(path)
    except TypeError as error:  # a foreign file may describe its network by values of a wrong type
        raise ValueError(f"--init must hold a network, got {path}: {error}") from error
    if found.source == RESNET:
        raise ValueError(f"--init must hold a whole network, got {path} with a backbone alone; use --imagenet.")
    settings = network_settings(found)
    notes = {name: note for name, word in _ASSUMED.items() for note in found.notes if word in note}
    free = {"dropout", *notes}
    if "head.cca.gamma" in found.weights and flags.get("recurrence", 0) > 0:
        free.add("recurrence")  # each loop has the same weights
    if {settings["context"], flags.get("context")} == {*_ATTENTIONS}:  # of which one alone has loops
        settings |= {"context": flags["context"], "recurrence": None}
        free.add("recurrence")
    wrong = [
        f"{_as_flag(name, flags[name])} ({_as_flag(name, value)} there)"
        for name, value in settings.items()
        if name in flags and name not in free and flags[name] != value
    ]
    if wrong:
        raise ValueError(
            f"flags must describe the network of --init {path}, got {', '.join(wrong)}; leave these flags out, or "
            "train another network from --imagenet."
        )
    kept = tuple(note for name, note in notes.items() if name not in flags)
    return Initial(Path(path), dataclasses.replace(found, notes=kept), settings)


def name_of_network(path: Path) -> str:
    """Return a name for the network of a path: that of the run's folder, or of the file."""
    return path.parent.name if path.name in (LAST, PREVIOUS, BEST) else path.stem


def holds_network(path: str) -> bool:
    """Return whether a file holds a whole network, as --init takes it."""
    try:
        return checkpoint.read(path).source != RESNET
    except (ImportError, OSError, TypeError, ValueError):
        return False


def network_settings(found: Checkpoint) -> dict[str, Any]:
    """Return the settings that the network of a file decides, by name.

    Recomputation and the form of non-local attention are not among them, as they change no result; nor is the loss.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(CCNet).parameters.items()}
    network = {**defaults, **found.network}
    is_resnet, context = network["backbone"] in RESNETS, network["context"]
    loops = network["dims"] if network["recurrence"] is None else network["recurrence"]  # by default 2 for 2, 3 for 3
    gammas = [found.weights[name] for name in ("head.cca.gamma", "head.context.gamma") if name in found.weights]
    authors = [*(network["mean"] or ())] == [*AUTHORS_MEAN] and [*(network["std"] or ())] == [1.0] * 3
    settings = {
        "backbone": network["backbone"],
        "stem": network["stem"] or "deep" if is_resnet else None,
        "halved_dilation": bool(network["halved_dilation"]),
        "ceil_mode": network["ceil_mode"] is not False,
        "normalisation": "authors" if authors else "imagenet",
        "context": context,
        "recurrence": loops if context == "rcca" else None,
        "gamma": float(gammas[0]) if gammas else 0.0,
        "head_channels": network["head_channels"],
        "activation": network["activation"],
        "align_corners": network["align_corners"],
    }
    if network["auxiliary"]:
        settings["auxiliary_channels"] = network["auxiliary_channels"] or network["head_channels"]
    if "dropout" in found.network:  # published files do not hold it
        settings["dropout"] = network["dropout"]
    return settings


def normalised_as(dataset: Dataset, initial: Initial) -> Dataset:
    """Return a dataset of 8-bit RGB images with the mean and std of the network; another one has its own."""
    if dataset.images.raw or initial.found.images.raw:
        return dataset
    mean, std = (initial.found.network.get(name) for name in ("mean", "std"))
    return dataclasses.replace(dataset, mean=mean and tuple(mean), std=std and tuple(std))


def start_from(net: CCNet, initial: Initial, labels: Labels) -> list[str]:
    """Load the weights of an initial network, and return what became of them, a line for each fact.

    Rows of the classifiers are those of the classes of the same names; what the file does not hold keeps the values
    that `net` was built with. The first convolution is adapted where the file's network takes RGB and `net` other
    channels.

    Args:
        net: the network of the run, on the CPU, changed in place; nothing is changed after an error.
        initial: from `read_initial`.
        labels: the classes of the run.

    Raises:
        ValueError: the weights do not fit; the message lists what does not.
    """
    path, found = initial.path, initial.found
    channels = found.network.get("in_channels", 3)
    if channels not in (3, net.in_channels):
        raise ValueError(
            f"--init must hold a network for images of {net.in_channels} channels or for RGB, got {path} for "
            f"{channels} channels; name another."
        )
    changed, kept, drawn = checkpoint.with_classes(found, labels.names, labels.num_classes)
    own = net.state_dict()
    weights = for_dims(for_channels(for_context(changed.weights, own), own, net.in_channels), own)
    said = [f"starting from {path}: {found.source}", *_classes_said(found, labels, kept, drawn)]
    for name in (f"{classifier}.{entry}" for classifier in CLASSIFIERS for entry in ("weight", "bias")):
        if name in weights and name in own and weights[name].shape == own[name].shape:
            weights[name] = _with_own_rows(weights[name], own[name], [labels.names.index(name) for name in drawn])
    for prefix, part in _PARTS.items():
        theirs, ours = ({k: v.shape for k, v in state.items() if k.startswith(prefix)} for state in (weights, own))
        if theirs and (not ours or (prefix == "head.embedding." and theirs != ours)):
            weights = {name: value for name, value in weights.items() if not name.startswith(prefix)}
            said.append(f"left out: {part}")
        if ours and not any(name.startswith(prefix) for name in weights):
            said.append(f"new: {part}")
            weights |= {name: own[name] for name in ours}
    before, now = (str(network.get("context", "rcca")) for network in (found.network, net.config))
    if {before, now} == {*_ATTENTIONS}:
        said.append(
            f"note: {_ATTENTIONS[now]} attention begins with the weights of the file's {_ATTENTIONS[before]} one"
        )
    problems = differences(weights, own)
    if problems:
        raise ValueError(
            f"--init must hold the network that the flags describe, got {path} with {len(problems)} entries that do "
            "not fit (nothing was loaded):\n  " + "\n  ".join(problems) + "\nleave out flags of the network."
        )
    if channels != net.in_channels:
        said.append(
            f"note: the network was trained on RGB; each of the {net.in_channels} channels begins with the sum of red, "
            f"green and blue, divided by {net.in_channels}"
        )
    net.load_state_dict({**own, **weights})
    return [*said, *(f"note: {note}" for note in found.notes)]


def _with_own_rows(values: Tensor, own: Tensor, rows: Sequence[int]) -> Tensor:
    """Return the values with the rows of classes that are drawn anew as the run draws its heads (--head-init)."""
    changed = values.to(own.dtype).clone()
    changed[[*rows]] = own[[*rows]]
    return changed


def _classes_said(found: Checkpoint, labels: Labels, kept: Sequence[str], drawn: Sequence[str]) -> list[str]:
    """Return lines that say which rows of the classifiers are the file's."""
    number = found.num_classes
    if found.class_names is not None:
        return [f"{word} classes: {_listed(names)}" for word, names in (("kept", kept), ("new", drawn)) if names]
    if kept:
        return [f"note: the file does not name its {number} classes, as many as here: all are kept, in this order"]
    return [
        f"note: the file does not name its {number} classes, and here are {labels.num_classes}: all are new "
        "(ccgpu convert --dataset NAME names those of a file)"
    ]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _as_flag(name: str, value: Any) -> str:
    """Return a setting as one writes its flag."""
    if isinstance(value, bool):
        return flag(name) if value else f"--no-{flag(name)[2:]}"
    return f"{flag(name)} {f'{value:g}' if isinstance(value, float) else 'none' if value is None else value}"
