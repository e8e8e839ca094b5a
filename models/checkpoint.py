"""Files of whole networks: read those of any known layout, write our own.

Our own file holds the arguments of `CCNet` and the labels beside the weights, so that whoever reads it needs no flags:

- safetensors, with `{"ccgpu": JSON}` as metadata, the JSON an object with "format", "network", "labels", "prediction",
  "source" and "notes" (see `Checkpoint`);
- of `torch.save`: {"ccgpu": the same as plain values, "state_dict": weights}.

The checkpoints of a training run (`last.pt`) hold "network", "labels", "prediction" and "model" beside what training
needs to go on.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ccgpu.models.ccnet import CCNet
from ccgpu.models.published import recognise, translate
from ccgpu.models.weights import check_tensors, differences, read_content, write_atomically

FORMAT = 2
OWN = "a CCNet of ccgpu"
FUNCTION = "CCNet.from_checkpoint"
_RUN = ("iteration", "dataset", "settings")


@dataclass(frozen=True)
class Checkpoint:
    """A network on its way between files.

    Attributes:
        network: arguments of `CCNet`, as plain values.
        weights: state dict of that network, all of it or (a backbone's file) the entries of a part.
        labels: the classes, {"names", "colours"} in the order of the logits and perhaps "ids" and "void" of label
            files; None where the file does not say.
        prediction: how images are brought to the size that the network was made for, and which classes a flipped image
            exchanges: any of {"short_side": N, "fit": [H, W], "flip_pairs": [[class, class], ...]}.
        source: the layout that it came from, in words.
        notes: what was assumed because the file does not say, in words.
        run: of a training run's checkpoint, what else it says of the run ("iteration", "dataset", "settings"); it is
            not written to our own files.
    """

    network: dict[str, Any]
    weights: dict[str, Tensor] = field(repr=False)
    labels: dict[str, Any] | None = None
    prediction: dict[str, Any] = field(default_factory=dict)
    source: str = OWN
    notes: tuple[str, ...] = ()
    run: Mapping[str, Any] | None = field(default=None, repr=False)


def read(path: str | os.PathLike[str], **changes: Any) -> Checkpoint:
    """Read a file of any layout of `ccgpu.models.published`, or of our own; see `CCNet.from_checkpoint` for errors."""
    content, metadata = read_content(FUNCTION, path)
    if "ccgpu" in metadata:
        return _own(path, json.loads(metadata["ccgpu"]), content, changes)
    if isinstance(content, Mapping) and "ccgpu" in content:
        return _own(path, content["ccgpu"], content.get("state_dict"), changes)
    if isinstance(content, Mapping) and {"model", "network", "iteration"} <= set(content):
        found = _own(path, {**content, "format": FORMAT}, content["model"], changes)
        return dataclasses.replace(found, run={name: content.get(name) for name in _RUN})
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
            f"last.pt, a file of python -m train.convert), got {len(state)} entries of no such layout: {shown}"
            f"{', ...' if len(state) > 8 else ''}; name such a file."
        )
    network = {**layout.config, **changes}
    weights, problems = translate(layout, state, _skeleton(path, network))
    if problems:
        raise _misfit(path, layout.name, problems)
    notes = tuple(note for argument, note in layout.notes.items() if argument not in changes)
    return Checkpoint(network, weights, _mmsegmentation_labels(meta), source=layout.name, notes=notes)


def build(checkpoint: Checkpoint) -> CCNet:
    """Return the network of a checkpoint with its weights, in eval mode; what the weights leave out is drawn anew."""
    net = CCNet(**checkpoint.network)
    net.load_state_dict({**net.state_dict(), **checkpoint.weights})
    return net.eval()


def write(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write a checkpoint as our own file: safetensors for the ending .safetensors, `torch.save`'s for .pt or .pth.

    The file is there atomically; one of the same name is replaced.

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
    header = {
        "format": FORMAT,
        "network": checkpoint.network,
        "labels": checkpoint.labels,
        "prediction": checkpoint.prediction,
        "source": checkpoint.source,
        "notes": list(checkpoint.notes),
    }
    if path.suffix == ".safetensors":
        _write_tensors(path, checkpoint.weights, {"ccgpu": json.dumps(header, allow_nan=False)})
    else:
        _write_tensors(path, checkpoint.weights, {"ccgpu": header})


def write_backbone(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write the backbone of a checkpoint alone, as a state dict that `load_imagenet` takes; see `write`."""
    prefix = "backbone."
    own = {name.removeprefix(prefix): v for name, v in checkpoint.weights.items() if name.startswith(prefix)}
    _write_tensors(Path(path), own, {})


def _write_tensors(path: Path, weights: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    # In a safetensors file each tensor needs memory of its own, without gaps.
    own = {name: value.detach().contiguous().clone() for name, value in weights.items()}
    if path.suffix == ".safetensors":
        write_atomically(path, safetensors.torch.save(own, metadata=dict(header)))
    elif path.suffix in (".pt", ".pth"):
        buffer = io.BytesIO()
        torch.save({**header, "state_dict": own} if header else own, buffer)
        write_atomically(path, buffer.getvalue())
    else:
        raise ValueError(f"write: path must end in .safetensors, .pt or .pth, got {str(path)!r}; choose one of these.")


def _own(path: str | os.PathLike[str], header: Any, state: Any, changes: Mapping[str, Any]) -> Checkpoint:
    """Return the checkpoint of a file of ours from its header and its weights."""
    known = isinstance(header, Mapping) and isinstance(header.get("network"), Mapping)
    if not known or header["format"] != FORMAT:
        found = repr(header.get("format")) if isinstance(header, Mapping) else f"a {type(header).__name__} as header"
        raise ValueError(
            f"{FUNCTION}: {os.fspath(path)!r} must have format {FORMAT} with a network's arguments, got {found}; "
            "read it with the version of ccgpu that wrote it."
        )
    network = {**header["network"], **changes}
    weights = check_tensors(FUNCTION, path, state)
    problems = differences(weights, _skeleton(path, network))
    if problems:
        raise _misfit(path, OWN, problems)
    return Checkpoint(
        network,
        weights,
        header.get("labels"),
        dict(header.get("prediction", {})),
        header.get("source", OWN),
        tuple(header.get("notes", ())),
    )


def _skeleton(path: str | os.PathLike[str], network: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state dict of `CCNet(**network)` without memory for its values."""
    try:
        with torch.device("meta"):
            return CCNet(**network).state_dict()
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


def _mmsegmentation_labels(meta: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the classes that mmsegmentation's meta data name, in the order of the logits, or None."""
    inner = meta.get("dataset_meta", meta)  # versions 1.x and 0.x
    found = {
        key: next((inner[name] for name in (key, key.upper()) if name in inner), None) for key in ("classes", "palette")
    }
    names, colours = found["classes"], found["palette"]
    if not names or not colours or len(names) != len(colours):
        return None
    return {"names": [str(name) for name in names], "colours": [[int(x) for x in colour] for colour in colours]}
