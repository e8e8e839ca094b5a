"""The keys of our own files: what a network file and a run's checkpoint hold, and whether values have their types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import torch

from ccgpu.models.image_format import ImageFormat
from ccgpu.models.prediction import Prediction

# Versions of the two formats, increased whenever a key changes its meaning; files of another version are refused.
FORMAT = 5  # of `Header`
RUN_FORMAT = 7  # of `RunCheckpoint`
LAST = "last.pt"  # the checkpoint in a run's folder
_LARGEST = torch.finfo(torch.float32).max


class Description(TypedDict):
    """The keys with which each of our own files describes its network.

    Attributes:
        network: arguments of `CCNet`.
        labels: the classes as plain values of `Labels`: "names" and "colours" in the order of the logits, optionally
            "ids", "void" and "coding"; None where the classes are not known.
        prediction: how images are predicted in the network's own evaluation, plain values of arguments of `Prediction`:
            any of {"mode": "whole" or "sliding", "window": [H, W], "stride": [H, W], "short_side": N, "long_side": N,
            "fit": [H, W], "flip_pairs": [[class, class], ...]}. For other images the size and the swapped classes hold
            alone (`Prediction.of_images`).
        value_range: [low, high]: the values of images of more than 8 bits that the network saw as 0 and 255; None:
            such images are read as `models.image_files` reads them without a range.
        images: how the images are read, plain values of `ImageFormat`: "channels", "raw" and "dtype".
    """

    network: dict[str, Any]
    labels: dict[str, Any] | None
    prediction: dict[str, Any]
    value_range: list[float] | None
    images: dict[str, Any]


class Header(Description):
    """The keys of a network file beside its weights.

    Attributes:
        format: `FORMAT`.
        source: text that names the layout of the file from which the network was converted.
        notes: texts, one for each value that was assumed because the original file does not hold it.
        dataset: name of the training command on the dataset that the network was trained on, such as "cityscapes"; None
            where it is not known.
    """

    format: int
    source: str
    notes: list[str]
    dataset: str | None


class RunCheckpoint(Description):
    """The keys of a training run's checkpoint: the network, and all that training needs to continue exactly.

    Attributes:
        format: `RUN_FORMAT`.
        iteration: optimiser steps done.
        position: samples drawn from the stream, iteration * batch.
        dataset: name of the training command.
        settings: all settings of the run by name.
        lengths: the run's iterations as it began and after each --extend, ascending; the last is that of `settings`.
        data: digest of the training images' names, on whose order the stream of samples depends.
        folder: for a dataset that is a folder of images and masks, what it was taken for: plain values of
            `OpenedFolder` in `train/runs/folder.py`; None for other datasets.
        class_weights: the weights of the classes in the loss, in the order of the logits; None where all weigh the
            same.
        model: state dict of the network.
        average: state dict of the averaged network of a run with --ema, which is the one to evaluate and predict with;
            None for other runs.
        optimiser: state dict of the optimiser.
        scaler: state dict of the gradient scaler, empty unless --amp is fp16.
        random: state of all random generators, see `random_state` in `train/runs/checkpoints.py`.
    """

    format: int
    iteration: int
    position: int
    dataset: str
    settings: dict[str, Any]
    lengths: list[int]
    data: str
    folder: dict[str, Any] | None
    class_weights: list[float] | None
    model: dict[str, Any]
    average: dict[str, Any] | None
    optimiser: dict[str, Any]
    scaler: dict[str, Any]
    random: dict[str, Any]


def run_problems(content: Mapping[str, Any]) -> list[str]:
    """Return a line for each key of a run's checkpoint that is missing, surplus or of a wrong type."""
    missing = [f"no {name}" for name in RunCheckpoint.__annotations__ if name not in content]
    surplus = [f"a key {name!r}" for name in content if name not in RunCheckpoint.__annotations__]
    if missing or surplus:
        return missing + surplus
    kinds: dict[str, type] = {
        **dict.fromkeys(("iteration", "position"), int),
        **dict.fromkeys(("dataset", "data"), str),
        **dict.fromkeys(("network", "settings", "model", "optimiser", "scaler", "random"), Mapping),
    }
    kinds |= {name: Mapping for name in ("folder", "average") if content[name] is not None}
    wrong = [f"{name} of type {type(content[name]).__name__}" for name in kinds if not _is(content[name], kinds[name])]
    weights = content["class_weights"]
    if weights is not None and not (_is_list(weights, float) and all(0 <= w <= _LARGEST for w in weights)):
        wrong.append(f"class_weights {weights!r:.80}")
    if not _is_list(content["lengths"], int) or not content["lengths"]:
        wrong.append(f"lengths {content['lengths']!r:.80}")
    network = content["network"] if _is(content["network"], Mapping) else {}
    scales = {name: network.get(name) for name in ("mean", "std")}
    wrong += [f"{name} {v!r:.80}" for name, v in scales.items() if v is not None and not _is_list(v, (int, float))]
    counts = {name: content[name] for name in ("iteration", "position") if _is(content[name], int)}
    return wrong + [f"{name} {count}" for name, count in counts.items() if count < 0] + wrong_types(content)


def wrong_types(description: Mapping[str, Any]) -> list[str]:
    """Return the keys of a `Header`, or those of a `Description` alone, whose values are of a wrong type."""
    labels, value_range = description.get("labels"), description.get("value_range")
    notes = description.get("notes", [])
    right = {
        "labels": labels is None or _is_labels(labels),
        "prediction": _is_prediction(description.get("prediction", {})),
        "value_range": value_range is None or _is_range(value_range),
        "source": isinstance(description.get("source", ""), str),
        "notes": _is_list(notes, str),
        "dataset": isinstance(description.get("dataset", ""), str | None),
        "images": _is_format(description.get("images")),
    }
    return [f"{name} {description.get(name)!r:.80}" for name, is_right in right.items() if not is_right]


def _is_range(values: Any) -> bool:
    """Return whether a value may be [low, high] with low < high, in the range of float32."""
    return _is_list(values, (int, float)) and len(values) == 2 and -_LARGEST <= values[0] < values[1] <= _LARGEST


def _is_prediction(values: Any) -> bool:
    """Return whether a value may be what `Prediction.preparation` returns."""
    try:
        Prediction.from_plain(values)
    except (AttributeError, TypeError, ValueError):
        return False
    return True


def _is_format(images: Any) -> bool:
    """Return whether a value may be the plain values of `ImageFormat`."""
    try:
        ImageFormat.from_plain(images)
    except (TypeError, ValueError):
        return False
    return True


def _is_labels(labels: Any) -> bool:
    """Return whether a value may be the plain values of `Labels`."""
    return (
        isinstance(labels, Mapping)
        and _is_list(labels.get("names"), str)
        and all(_is_list(labels.get(key, []), int) for key in ("ids", "void"))
        and isinstance(labels.get("coding", ""), str)
    )


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_list(values: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(value, kind) for value in values)
