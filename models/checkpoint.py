"""Files of whole networks: reading any known layout, and reading and writing our own format.

Our own files describe their network (`models.checkpoint_keys.Description`), so that reading one needs no flags. There
are two kinds:

- a network file, which `write` and `ccgpu convert` write: safetensors with {"ccgpu": JSON of a `Header`} as
  metadata, or `torch.save` of {"ccgpu": `Header`, "state_dict": weights};
- a checkpoint of a training run, `last.pt`, which `train/runs/checkpoints.py` writes: `torch.save` of a
  `RunCheckpoint`.

Both hold plain values and tensors only, so that reading a file cannot run code. Published files may hold other objects
beside their weights, which are left out (`models.foreign_objects`).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ccgpu.models.ccnet import CCNet
from ccgpu.models.checkpoint_keys import FORMAT, LAST, RUN_FORMAT, Header, run_problems, wrong_types
from ccgpu.models.classifier import with_rows
from ccgpu.models.image_format import ImageFormat
from ccgpu.models.labels import Labels, same_classes
from ccgpu.models.mmsegmentation import read_labels
from ccgpu.models.published import recognise, translate
from ccgpu.models.weights import (
    check_tensors,
    check_weights,
    differences,
    for_channels,
    listed,
    read_content,
    safetensors_bytes,
    write_atomically,
)

OWN = "a CCNet of ccgpu"
FUNCTION = "CCNet.from_checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """A network read from a file, or to be written to one.

    Attributes:
        network: arguments of `CCNet`, as plain values.
        weights: state dict of that network, of a run with --ema the averaged one; for a file of a backbone alone, the
            backbone's entries of it.
        labels: the classes, see `Description`; None where the file does not say.
        prediction: how the network's evaluation predicts images, see `Description`.
        value_range: (low, high) of images of more than 8 bits, see `Description`; None where the file does not say.
        images: how the images are read; 8-bit RGB for published files.
        source: text that names the layout of the file.
        notes: texts, one for each value that was assumed because the file does not hold it.
        dataset: name of the training command on the dataset that the network was trained on, see `Header`; None where
            the file does not say, and for a run on a folder of images and masks.
        run: "iteration", "dataset", "settings" and "folder" of a `RunCheckpoint`, None for other files. `write` leaves
            it out.
    """

    network: dict[str, Any]
    weights: dict[str, Tensor] = field(repr=False)
    labels: dict[str, Any] | None = None
    prediction: dict[str, Any] = field(default_factory=dict)
    value_range: tuple[float, float] | None = None
    source: str = OWN
    notes: tuple[str, ...] = ()
    run: Mapping[str, Any] | None = field(default=None, repr=False)
    images: ImageFormat = field(default_factory=ImageFormat)
    dataset: str | None = None

    @property
    def num_classes(self) -> int:
        """Classes of the network."""
        number: int = self.network.get("num_classes", 19)
        return number

    @property
    def class_names(self) -> list[str] | None:
        """Names of the network's classes, in the order of its logits; None where the file does not say.

        A published file may name the classes of its data, which are not the network's where their numbers differ.
        """
        names = [] if self.labels is None else [str(name) for name in self.labels["names"]]
        return names if len(names) == self.num_classes else None


def read(path: str | os.PathLike[str], **changes: Any) -> Checkpoint:
    """Read a file of any layout of `ccgpu.models.published`, or of our own; see `CCNet.from_checkpoint` for errors."""
    path = network_file(path)
    found = _read(path, changes)
    check_weights(FUNCTION, path, found.weights)
    return found


def network_file(path: str | os.PathLike[str]) -> Path:
    """Return the file of a network: `last.pt` for the folder of a run, else the path itself.

    Raises:
        ValueError: the path is a folder without such a file.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    if not (path / LAST).is_file():
        raise ValueError(
            f"{FUNCTION}: path must be a file, or a run's folder with a {LAST}, got the folder {str(path)!r} without; "
            "name another, or the file itself."
        )
    return path / LAST


def _read(path: str | os.PathLike[str], changes: Mapping[str, Any]) -> Checkpoint:
    content, metadata = read_content(FUNCTION, path, accepts=lambda found: not (_is_own(found) or _is_run(found)))
    if "ccgpu" in metadata:
        return _own(path, _header(metadata["ccgpu"]), content, changes)
    if _is_own(content):
        return _own(path, content["ccgpu"], content.get("state_dict"), changes)
    if _is_run(content):
        _check_format(path, content, RUN_FORMAT)
        problems = run_problems(content)
        if problems:
            raise ValueError(
                f"{FUNCTION}: {os.fspath(path)!r} must have the keys of a run's checkpoint, got {listed(problems)}; "
                "the file is damaged or was changed: name another checkpoint of the run."
            )
        weights = content["model"] if content["average"] is None else content["average"]
        found = _described(path, content, weights, changes)
        kept = ("iteration", "dataset", "settings", "folder")
        dataset = content["dataset"] if content["folder"] is None else None
        return dataclasses.replace(found, dataset=dataset, run={name: content[name] for name in kept})
    meta: Mapping[str, Any] = {}
    if isinstance(content, Mapping):
        meta = content.get("meta", {}) if isinstance(content.get("meta"), Mapping) else {}
        content = next(
            (content[key] for key in ("state_dict", "model") if isinstance(content.get(key), Mapping)), content
        )
    state = check_tensors(FUNCTION, path, content)
    if all(name.startswith("module.") for name in state):  # saved from inside DataParallel
        state = {name.removeprefix("module."): value for name, value in state.items()}
    layout = recognise(state, meta)
    if layout is None:
        shown = ", ".join(list(state)[:8])
        raise ValueError(
            f"{FUNCTION}: {os.fspath(path)!r} must hold the authors' CCNet, mmsegmentation's CCNet R-50/101-D8, a "
            "ResNet of torchvision, MIT or mmsegmentation, or a network of this package with its arguments (a run's "
            f"last.pt, a file of ccgpu convert), got {len(state)} entries of no such layout: {shown}"
            f"{', ...' if len(state) > 8 else ''}; name such a file."
        )
    network = {**layout.config, **changes}
    weights, problems = translate(layout, state, _skeleton(path, network), network.get("in_channels", 3))
    if problems:
        raise _misfit(path, layout.name, problems)
    notes = tuple(note for argument, note in layout.notes.items() if argument not in changes)
    return Checkpoint(
        network,
        weights,
        read_labels(meta),
        layout.evaluation.prediction,
        source=layout.name,
        notes=(*notes, *layout.evaluation.notes),
        images=_format_of(network, ImageFormat()),
        dataset=layout.evaluation.dataset,
    )


def _is_own(content: Any) -> bool:
    return isinstance(content, Mapping) and "ccgpu" in content


def _is_run(content: Any) -> bool:
    return isinstance(content, Mapping) and {"model", "network", "iteration"} <= set(content)


def build(checkpoint: Checkpoint) -> CCNet:
    """Return the network of a checkpoint in eval mode; entries that the weights lack get random initial values."""
    net = CCNet(**checkpoint.network)
    net.load_state_dict({**net.state_dict(), **checkpoint.weights})
    return net.eval()


def with_classes(
    found: Checkpoint, names: Sequence[str] | None, num_classes: int
) -> tuple[Checkpoint, list[str], list[str]]:
    """Return the network of a file for other classes: the same weights but for the classifiers of both heads.

    A class of the same name (`models.labels.same_classes`) keeps its weights and bias, the others are drawn by torch's
    default, from torch's generator (`models.classifier.with_rows`). A file without names for its rows, and classes
    without names, are compared by their number alone: where it is the same all rows are kept, else all are drawn. The
    result has no run and no dataset; of its flip pairs those remain of which both classes are kept.

    Args:
        found: from `read`.
        names: the new classes, in the order of the logits; None: they have no names.
        num_classes: their number.

    Returns:
        The network, and the names of the classes that were kept and of those that were drawn; "class 0", ... without
        names. Its labels are the new names, in colours of `Labels.numbered`; None without names. If no names are asked
        for and the number is the file's own, the network is `found` itself, labels included.

    Raises:
        ValueError: the names are not `num_classes` different ones, or that number is below 1.
    """
    if num_classes < 1 or (names is not None and len(names) != num_classes):
        raise ValueError(
            f"{FUNCTION}: num_classes must be the number of classes, 1 or more, got {num_classes}"
            f"{'' if names is None else f' for {len(names)} names'}; correct it, or leave the names out."
        )
    own_number, old = found.num_classes, found.class_names
    if names is None:
        shown = [f"class {index}" for index in range(num_classes)]
        if num_classes == own_number:
            return found, shown if old is None else old, []
    else:
        shown = [*names]
    sources: list[int | None] = [None] * num_classes
    labels = None if names is None else dataclasses.replace(Labels.numbered(num_classes), names=tuple(names))
    if labels is not None and old is not None:
        sources = same_classes(old, labels)
    elif num_classes == own_number:
        sources = [*range(num_classes)]
    if not any(name.startswith("head.") for name in found.weights):  # a backbone alone has no rows to keep
        sources = [None] * num_classes
    places = {source: place for place, source in enumerate(sources) if source is not None}
    old_pairs = found.prediction.get("flip_pairs", ())
    pairs = [[places[one], places[other]] for one, other in old_pairs if one in places and other in places]
    prediction = {name: value for name, value in found.prediction.items() if name != "flip_pairs"}
    changed = dataclasses.replace(
        found,
        network={**found.network, "num_classes": num_classes},
        weights=with_rows(found.weights, sources),
        labels=None if labels is None else {"names": shown, "colours": labels.colours.tolist()},
        prediction=prediction | ({"flip_pairs": pairs} if pairs else {}),
        run=None,
        dataset=None,
    )
    kept = [name for name, source in zip(shown, sources, strict=True) if source is not None]
    return changed, kept, [name for name, source in zip(shown, sources, strict=True) if source is None]


def write(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write a checkpoint in our own format: safetensors for the ending .safetensors, `torch.save` for .pt and .pth.

    The file is written atomically and replaces one of the same name.

    Raises:
        ValueError: another ending, or weights that do not fill the network.
        OSError: the file cannot be written.
    """
    path = Path(path)
    problems = differences(checkpoint.weights, _skeleton(path, checkpoint.network))
    if problems:
        raise ValueError(
            f"write: checkpoint must have every weight of its network, got {len(problems)} that do not fit:\n  "
            + "\n  ".join(problems)
            + "\npass the state dict of build(checkpoint)."
        )
    header = Header(
        format=FORMAT,
        network=checkpoint.network,
        labels=checkpoint.labels,
        prediction=checkpoint.prediction,
        value_range=None if checkpoint.value_range is None else list(checkpoint.value_range),
        images=checkpoint.images.as_plain(),
        source=checkpoint.source,
        notes=list(checkpoint.notes),
        dataset=checkpoint.dataset,
    )
    if path.suffix == ".safetensors":
        _write_tensors(path, checkpoint.weights, {"ccgpu": json.dumps(header, allow_nan=False)})
    else:
        _write_tensors(path, checkpoint.weights, {"ccgpu": header})


def write_backbone(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write the backbone of a checkpoint alone, as a state dict that `load_imagenet` takes; see `write`."""
    prefix = "backbone."
    own = {name.removeprefix(prefix): v for name, v in checkpoint.weights.items() if name.startswith(prefix)}
    _write_tensors(Path(path), own, {})


def check_ending(path: Path) -> None:
    """Raise ValueError unless a path has an ending that `write` knows."""
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise ValueError(f"write: path must end in .safetensors, .pt or .pth, got {str(path)!r}; choose one of these.")


def _write_tensors(path: Path, weights: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    check_ending(path)
    if path.suffix == ".safetensors":
        write_atomically(path, safetensors_bytes(weights, header))
    else:
        own = {name: value.detach().contiguous().clone() for name, value in weights.items()}
        content = {**header, "state_dict": own} if header else own
        write_atomically(path, lambda file: torch.save(content, file))


def _header(text: str) -> Any:
    """Return the header of a safetensors file of ours; anything else gives a value that `_own` refuses."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # no JSON, numbers without end, or brackets within brackets
        return None


def _own(path: str | os.PathLike[str], header: Any, state: Any, changes: Mapping[str, Any]) -> Checkpoint:
    """Return the network of a network file from its header and weights."""
    if not isinstance(header, Mapping):
        header = {"format": f"a {type(header).__name__} as header"}
    _check_format(path, header, FORMAT)
    return _described(path, header, state, changes)


def _check_format(path: str | os.PathLike[str], header: Mapping[str, Any], wanted: int) -> None:
    """Raise ValueError unless one of our own files has the format that this version reads, and a network."""
    if header.get("format") != wanted or not isinstance(header.get("network"), Mapping):
        raise ValueError(
            f"{FUNCTION}: {os.fspath(path)!r} must have format {wanted} with a network's arguments, got "
            f"{header.get('format')!r}; read it with the version of ccgpu that wrote it."
        )


def _described(
    path: str | os.PathLike[str], description: Mapping[str, Any], state: Any, changes: Mapping[str, Any]
) -> Checkpoint:
    """Return the network of either kind of our own files."""
    network = {**description["network"], **changes}
    _check_description(path, description)
    skeleton = _skeleton(path, network)
    weights = for_channels(check_tensors(FUNCTION, path, state), skeleton, network.get("in_channels", 3))
    problems = differences(weights, skeleton)
    if problems:
        raise _misfit(path, OWN, problems)
    labels = description.get("labels")
    problem = "" if labels is None else _labels_problem(labels, network["num_classes"])
    if problem:
        raise ValueError(
            f"{FUNCTION}: {os.fspath(path)!r} must hold the classes of its network, got {problem}; the file is damaged "
            "or was changed: write it again."
        )
    value_range, images = description.get("value_range"), ImageFormat.from_plain(description["images"])
    if images.channels != description["network"].get("in_channels", 3):
        raise ValueError(
            f"{FUNCTION}: {os.fspath(path)!r} must hold the format of its network's images, got {images} for a network "
            f"of {description['network'].get('in_channels', 3)} channels; the file is damaged or was changed: write it "
            "again."
        )
    return Checkpoint(
        network,
        weights,
        labels,
        dict(description.get("prediction", {})),
        None if value_range is None else (float(value_range[0]), float(value_range[1])),
        description.get("source", OWN),
        tuple(description.get("notes", ())),
        images=_format_of(network, images),
        dataset=description.get("dataset"),
    )


def _format_of(network: Mapping[str, Any], images: ImageFormat) -> ImageFormat:
    """Return the format of a file's images; for a network of another number of channels, bytes as stored."""
    channels = network.get("in_channels", 3)
    return images if channels == images.channels else ImageFormat(channels, raw=True)


def _check_description(path: str | os.PathLike[str], description: Mapping[str, Any]) -> None:
    """Raise ValueError unless the keys beside the weights have the types that `Description` and `Header` name."""
    wrong = wrong_types(description)
    if wrong:
        raise ValueError(
            f"{FUNCTION}: {os.fspath(path)!r} must describe its network by values of the right types, got "
            f"{', '.join(wrong)}; the file is damaged or was changed: write it again."
        )


def _labels_problem(labels: Mapping[str, Any], num_classes: int) -> str:
    """Return why a file's classes cannot be those of a network with so many classes; empty where they can."""
    try:
        found = Labels.from_plain(labels).num_classes
    except ValueError as error:
        return f"{error!s:.300}"
    return "" if found == num_classes else f"names of {found} classes for a network of {num_classes}"


def _skeleton(path: str | os.PathLike[str], network: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state dict of `CCNet(**network)` on the meta device: names, shapes and dtypes without values."""
    try:
        with torch.device("meta"):
            return CCNet(**network).state_dict()
    except RuntimeError as error:  # the package of the backbone is there and cannot be imported
        raise ImportError(f"{FUNCTION}: {os.fspath(path)!r} must find the package of its backbone: {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{FUNCTION}: {os.fspath(path)!r} must describe a network of this version of ccgpu, got {dict(network)}: "
            f"{error}"
        ) from error


def _misfit(path: str | os.PathLike[str], layout: str, problems: Sequence[str]) -> ValueError:
    return ValueError(
        f"{FUNCTION}: {os.fspath(path)!r}, taken for {layout}, must fit it entry by entry, got {len(problems)} that do "
        "not (nothing was loaded):\n  " + "\n  ".join(problems) + "\nfetch the file again, or name another."
    )
