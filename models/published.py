"""State-dict layouts in which CCNets and ResNets are published, and how each maps to a `CCNet`.

A layout is more than the names of entries. With the same ResNet and the same head, the authors' and mmsegmentation's
networks differ in the stem, the dilation of a stage's first block, the max-pool's rounding, the activation of the
heads, the normalisation of images and align_corners. `recognise` therefore returns the arguments of `CCNet` along with
the mapping of names.

| layout | recognised by the entries | config |
|---|---|---|
| the authors' CCNet | `head.conva.0.weight`, `conv1.weight` | deep stem, leaky ReLU, mean but no std, align_corners |
| mmsegmentation's CCNet, R-50/101-D8 | `decode_head.*`, `backbone.*` | v1c or 7x7 stem, halved dilation, floor, ReLU |
| a ResNet: torchvision's, MIT's, mmsegmentation's v1c | `layer1.0.conv1.weight` | the defaults, with this backbone |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ccgpu.models.mmsegmentation import ConfigEvaluation, read_evaluation
from ccgpu.models.resnet import V1C_STEM, depth_of
from ccgpu.models.weights import adapted, differences

AUTHORS = "the authors' CCNet"
MMSEGMENTATION = "mmsegmentation's CCNet"
RESNET = "a ResNet"

# The authors' networks subtract this mean (red, green, blue), do not divide by a std, and take channels blue first.
AUTHORS_MEAN = (122.67891434, 116.66876762, 104.00698793)
# InPlaceABN scales by |weight| + eps.
INPLACE_ABN_EPS = 1e-5


@dataclass(frozen=True)
class Layout:
    """How to build a `CCNet` from a published file.

    Attributes:
        name: the layout's name in messages.
        config: arguments of `CCNet`.
        their_name: name of our entry -> name in the file; None for an entry that such files do not have.
        convert: (name of our entry, value in the file) -> our value.
        part: prefix of the entries that the file fills; "" for the whole network.
        ignored: names in the file that do not belong to a CCNet.
        notes: argument of `CCNet` -> a sentence that names its assumed value, for arguments the file does not hold.
        evaluation: what the file's config says of the evaluation.
    """

    name: str
    config: dict[str, Any]
    their_name: Callable[[str], str | None]
    convert: Callable[[str, Tensor], Tensor]
    part: str = ""
    ignored: tuple[str, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)
    evaluation: ConfigEvaluation = field(default_factory=ConfigEvaluation)


def recognise(state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Layout | None:
    """Return the layout of a state dict, or None if it is in no layout of the table above.

    Args:
        state: the file's tensors by name.
        meta: the file's metadata; mmsegmentation stores its config as text under "config" (versions 0.x) or "cfg"
            (1.x).
    """
    if any(name.startswith("decode_head.") for name in state):
        return _mmsegmentation(state, meta)
    if "conv1.weight" in state and any(name.startswith("head.conva.") for name in state):
        return _authors(state)
    if "layer1.0.conv1.weight" in state:
        return _resnet(state)
    return None


def _axis(state: Mapping[str, Tensor], name: str, axis: int, default: int) -> int:
    """Return an entry's extent along an axis, or the default if the entry is missing; `translate` reports it later."""
    return state[name].shape[axis] if name in state and state[name].ndim > axis else default


def _authors(state: Mapping[str, Tensor]) -> Layout | None:
    depth = depth_of(state)
    if depth is None:
        return None
    channels = _axis(state, "head.conva.0.weight", 0, 512)
    auxiliary = any(name.startswith("dsn.") for name in state)
    config = {
        "backbone": f"resnet{depth}",
        "num_classes": _axis(state, "head.bottleneck.3.weight", 0, 19),
        "stem": "deep",
        "mean": list(AUTHORS_MEAN),
        "std": [1.0, 1.0, 1.0],
        "head_channels": channels,
        "auxiliary": auxiliary,
        "auxiliary_channels": _axis(state, "dsn.0.weight", 0, channels),
        "align_corners": True,
    }

    def their_name(ours: str) -> str:
        part, _, rest = ours.partition(".")
        return {"backbone": rest, "auxiliary_head": f"dsn.{rest}"}.get(part, ours)

    def convert(ours: str, value: Tensor) -> Tensor:
        if ours == "backbone.conv1.weight":
            return value.flip(1)  # blue first -> red first
        # Every 1-d weight belongs to an InPlaceABN.
        return value.abs() + INPLACE_ABN_EPS if ours.endswith(".weight") and value.ndim == 1 else value

    return Layout(
        AUTHORS,
        config,
        their_name,
        convert,
        notes={"recurrence": "such files do not hold R, the number of loops: 2 was taken"},
    )


def _mmsegmentation(state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Layout | None:
    depth = depth_of({name.removeprefix("backbone."): value for name, value in state.items()})
    if depth not in (50, 101):
        return None
    stem = "v1c" if any(name.startswith("backbone.stem.") for name in state) else "7x7"
    channels = _axis(state, "decode_head.convs.0.conv.weight", 0, 512)
    text = str(meta.get("config", meta.get("cfg", "")))
    notes = {}
    # The decode head comes before the auxiliary head in every config, and both have the same value.
    found = re.search(r"align_corners['\"]?\s*[=:]\s*(True|False)", text)
    if found is None:
        notes["align_corners"] = "the file has no config: align_corners=False was taken; configs for 769x769 have True"
    loops = re.search(r"recurrence['\"]?\s*[=:]\s*(\d{1,3})\b", text)
    if loops is None:
        notes["recurrence"] = "the file has no config: R = 2 loops were taken"
    config = {
        "backbone": f"resnet{depth}",
        "num_classes": _axis(state, "decode_head.conv_seg.weight", 0, 19),
        "recurrence": 2 if loops is None else int(loops[1]),
        "stem": stem,
        "halved_dilation": True,
        "ceil_mode": False,
        "head_channels": channels,
        "auxiliary": any(name.startswith("auxiliary_head.") for name in state),
        "auxiliary_channels": _axis(state, "auxiliary_head.convs.0.conv.weight", 0, channels),
        "activation": "relu",
        "align_corners": found is not None and found[1] == "True",
    }
    prefixes = {
        "head.conva.0.": "decode_head.convs.0.conv.",
        "head.conva.1.": "decode_head.convs.0.bn.",
        "head.convb.0.": "decode_head.convs.1.conv.",
        "head.convb.1.": "decode_head.convs.1.bn.",
        "head.cca.gamma": "decode_head.cca.gamma.scale",
        "head.cca.": "decode_head.cca.",
        "head.bottleneck.0.": "decode_head.conv_cat.conv.",
        "head.bottleneck.1.": "decode_head.conv_cat.bn.",
        "head.bottleneck.3.": "decode_head.conv_seg.",
        "auxiliary_head.0.": "auxiliary_head.convs.0.conv.",
        "auxiliary_head.1.": "auxiliary_head.convs.0.bn.",
        "auxiliary_head.3.": "auxiliary_head.conv_seg.",
    }
    if stem == "v1c":
        prefixes |= {f"backbone.{name}": f"backbone.{theirs}" for name, theirs in V1C_STEM.items()}

    def their_name(ours: str) -> str | None:
        if ours == "auxiliary_head.0.bias":
            return None  # the published head has no bias; 0 is equivalent
        prefix = next((prefix for prefix in prefixes if ours.startswith(prefix)), "")
        return prefixes.get(prefix, "") + ours.removeprefix(prefix)

    def convert(ours: str, value: Tensor) -> Tensor:
        return value.reshape(1) if ours == "head.cca.gamma" and value.ndim == 0 else value

    return Layout(MMSEGMENTATION, config, their_name, convert, notes=notes, evaluation=read_evaluation(text))


def _resnet(state: Mapping[str, Tensor]) -> Layout | None:
    depth = depth_of(state)
    if depth is None:
        return None
    stem = "7x7"
    if "stem.0.weight" in state:
        stem = "v1c"
    elif "conv3.weight" in state:
        stem = "deep"

    def their_name(ours: str) -> str:
        name = ours.removeprefix("backbone.")
        if stem == "v1c":
            prefix = next((prefix for prefix in V1C_STEM if name.startswith(prefix)), "")
            return V1C_STEM.get(prefix, "") + name.removeprefix(prefix)
        return name

    return Layout(
        RESNET,
        {"backbone": f"resnet{depth}", "stem": stem},
        their_name,
        lambda _, value: value,
        part="backbone.",
        ignored=("fc.weight", "fc.bias"),
        notes={"head": "the file has a backbone alone: the heads are randomly initialised"},
    )


def translate(
    layout: Layout, state: Mapping[str, Tensor], expected: Mapping[str, Tensor], in_channels: int = 3
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights under our names, and a list of the entries that do not fit, one line for each.

    Args:
        layout: from `recognise`.
        state: the file's tensors by their names.
        expected: the state dict of `CCNet(**config)`; only shapes and dtypes are used, so it may be on the meta device.
        in_channels: channels of the network's images; the first convolution is adapted to others than three.

    Returns:
        The entries of `expected` that begin with `layout.part`, without the counters of batch norms
        (`num_batches_tracked`) where the file does not have them, as old files do not; and the entries that are
        missing, surplus, misshapen or of another kind, under the file's names.
    """
    weights: dict[str, Tensor] = {}
    wanted: dict[str, Tensor] = {}
    found = {name: value for name, value in state.items() if name not in layout.ignored}
    for ours, value in expected.items():
        if not ours.startswith(layout.part):
            continue
        theirs = layout.their_name(ours)
        if theirs is None:
            weights[ours] = torch.zeros(value.shape, dtype=value.dtype)
            continue
        wanted[theirs] = value
        if theirs in state:
            weights[ours] = found[theirs] = adapted(layout.convert(ours, state[theirs]), value, in_channels)
    return weights, differences(found, wanted)
