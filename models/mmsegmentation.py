"""The metadata of mmsegmentation's checkpoints: classes, and what the config says of the evaluation.

mmsegmentation stores its config as Python text in its checkpoints. The text is parsed (`ast`) and never run: of its
expressions only literals, `dict(...)` and names of values further up have a value.
"""

from __future__ import annotations

import ast
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ccgpu.models.labels import Labels
from ccgpu.models.prediction import Prediction

DATASETS = {"CityscapesDataset": "cityscapes", "ADE20KDataset": "ade20k", "PascalVOCDataset": "voc"}
"""mmsegmentation's class of a dataset -> our training command."""
# Steps of a pipeline that change the size of an image in ways that `Prediction` does not know.
_OTHER_SIZES = ("ResizeToMultiple", "Pad", "RandomCrop")


class _Unknown:
    """A value that only running the config would tell."""


_UNKNOWN = _Unknown()


@dataclass(frozen=True)
class ConfigEvaluation:
    """The evaluation of a config.

    Attributes:
        prediction: arguments of `ccgpu.models.prediction.Prediction` as plain values; those that the config does not
            give are missing.
        dataset: name of our training command on the same dataset; None for a dataset that there is none for.
        notes: sentences on what was not taken from the config, each with the reason.
    """

    prediction: dict[str, Any] = field(default_factory=dict)
    dataset: str | None = None
    notes: tuple[str, ...] = ()


def read_evaluation(text: str) -> ConfigEvaluation:
    """Return the evaluation that a config describes.

    Read are `test_cfg` (mode "whole" or "slide" with crop_size and stride as (height, width)), and of the pipeline
    for tests the size: `Resize` with keep_ratio and scale, `MultiScaleFlipAug` with img_scale, `ResizeShortestEdge`.
    A scale of mmsegmentation has a long and a short side in either order; images get the largest size within both.

    Args:
        text: the config as mmsegmentation 0.x and 1.x store it, Python text; empty for a file without one.
    """
    if not text.strip():
        return ConfigEvaluation()
    values = _values(text)
    if values is None:
        return ConfigEvaluation(notes=("the file's config is no Python text: the evaluation was not taken from it",))
    tested, pipeline = _tested(values)
    kind = _name(tested.get("type", values.get("dataset_type")))
    prediction, notes = _mode(values)
    size, more = _size(pipeline)
    return ConfigEvaluation({**prediction, **size}, DATASETS.get(kind), (*notes, *more))


def read_labels(meta: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the classes in mmsegmentation's metadata, in the order of the logits; None where there are none."""
    inner = meta.get("dataset_meta", meta)  # versions 1.x and 0.x
    inner = inner if isinstance(inner, Mapping) else {}
    found = {
        key: next((inner[name] for name in (key, key.upper()) if name in inner), None) for key in ("classes", "palette")
    }
    names, colours = found["classes"], found["palette"]
    if not names or not isinstance(names, (list, tuple)):  # else an object of another program
        return None
    try:
        table = [[int(value) for value in colour] for colour in colours or ()]
    except TypeError:
        table = []
    if len(table) != len(names):
        table = Labels.numbered(len(names)).colours.tolist()
    return {"names": [*map(str, names)], "colours": table}


def _values(text: str) -> dict[str, Any] | None:
    """Return the values that a config assigns, by name; None where it is no Python text."""
    # The text of an mmcv Config is its path and a dictionary.
    body = re.sub(r"\A\s*Config \(path: .*?\):\s*(?=\{)", "", text)
    try:
        statements = ast.parse(body).body
        known: dict[str, Any] = {}
        for statement in statements:
            if isinstance(statement, ast.Assign):
                value = _value(statement.value, known)
                known |= {target.id: value for target in statement.targets if isinstance(target, ast.Name)}
            elif isinstance(statement, ast.Expr) and len(statements) == 1:
                value = _value(statement.value, known)
                return value if isinstance(value, dict) else None
    # MemoryError: how the parser says that brackets are nested too deeply.
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return known


def _value(node: ast.expr | None, known: Mapping[str, Any]) -> Any:
    """Return the value of an expression; `_UNKNOWN` where it is none of those that this module reads."""
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return known.get(node.id, _UNKNOWN)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.List() | ast.Tuple():
            return [_value(element, known) for element in node.elts]
        case ast.Dict():
            pairs = zip(node.keys, node.values, strict=True)
            return _merged([(_value(key, known) if key else None, _value(value, known)) for key, value in pairs])
        case ast.Call(func=ast.Name(id="dict"), args=[]):
            return _merged([(keyword.arg, _value(keyword.value, known)) for keyword in node.keywords])
    return _UNKNOWN


def _merged(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return a dictionary of pairs; one without a key (`**values`) gives all of its own."""
    merged: dict[Any, Any] = {}
    for key, value in pairs:
        if isinstance(key, str):
            merged[key] = value
        elif key is None and isinstance(value, dict):
            merged |= value
    return merged


def _tested(values: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return the dataset that the config tests on, without what wraps it ({} if there is none), and its pipeline."""
    for place in (("test_dataloader",), ("val_dataloader",), ("data", "test"), ("data", "val")):
        found: Any = values
        for key in place:
            found = found.get(key) if isinstance(found, dict) else None
        while isinstance(found, dict):
            inner = found.get("dataset", found.get("datasets"))
            if isinstance(inner, list):
                inner = inner[0] if inner else None
            if not isinstance(inner, dict):
                return found, found.get("pipeline", values.get("test_pipeline"))
            found = inner
    return {}, values.get("test_pipeline")


def _mode(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return mode, window and stride, and notes."""
    model = values.get("model")
    found = model.get("test_cfg") if isinstance(model, dict) else None
    found = found if isinstance(found, dict) else values.get("test_cfg")
    if not isinstance(found, dict) or "mode" not in found:
        return {}, []
    mode = found["mode"]
    if mode == "whole":
        return {"mode": "whole"}, []
    asked = {"mode": "sliding", "window": found.get("crop_size"), "stride": found.get("stride")}
    if mode != "slide" or not _is_prediction(asked):
        return {}, [f"the config's test_cfg was not taken, which is no mode of ours: {reprlib.repr(found)}"]
    return asked, []


def _size(pipeline: Any) -> tuple[dict[str, Any], list[str]]:
    """Return short_side and long_side of a pipeline for tests, and notes."""
    asked: dict[str, Any] = {}
    notes = []
    for step, scale in _steps(pipeline):
        kind = _name(step.get("type"))
        if kind == "ResizeShortestEdge":
            asked = {"short_side": step.get("scale"), "long_side": step.get("max_size")}
        elif kind == "Resize":
            scale = step.get("scale", step.get("img_scale", scale))
            sides = sorted(scale) if _is_size(scale) else None
            # Without keep_ratio, version 0.x, where the scale has another name, keeps the ratio, and 1.x does not.
            if sides is None or step.get("keep_ratio", "scale" not in step) is not True:
                notes.append(
                    "the size of the config's images was not taken, which is not one scale (long side, short side) "
                    f"that keeps the ratio: {reprlib.repr(step)}"
                )
                continue
            asked = {"short_side": sides[0], "long_side": sides[1]}
        elif kind == "MultiScaleFlipAug":
            notes.append("the config averages several scales or flipped images: --scales and --flip do that")
        elif kind in _OTHER_SIZES:
            notes.append(f"a step of the config's pipeline for tests was left out, which changes sizes: {kind}")
    if asked and not _is_prediction(asked):
        return {}, [*notes, f"the size of the config's images was not taken: {asked}"]
    return asked, notes


def _steps(pipeline: Any) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yield the steps of a pipeline, each with the scale that a MultiScaleFlipAug around it sets.

    A MultiScaleFlipAug itself is yielded where it predicts an image more than once.
    """
    for step in pipeline if isinstance(pipeline, list) else ():
        if not isinstance(step, dict):
            continue
        if _name(step.get("type")) != "MultiScaleFlipAug":
            yield step, None
            continue
        scales, inner, ratios = (step.get(name) for name in ("img_scale", "transforms", "img_ratios"))
        if step.get("flip") is True or (isinstance(ratios, list) and len(ratios) > 1):
            yield step, None
        scale = scales[0] if isinstance(scales, list) and len(scales) == 1 else scales
        yield from ((part, scale) for part in (inner if isinstance(inner, list) else ()) if isinstance(part, dict))


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(side) is int for side in value)


def _is_prediction(values: Mapping[str, Any]) -> bool:
    """Return whether `Prediction` takes the values."""
    try:
        Prediction.from_plain(values)
    except (TypeError, ValueError):
        return False
    return True


def _name(kind: Any) -> str:
    """Return the name of a class without the package's scope, such as "mmseg."; "" for what is no name."""
    return kind.rpartition(".")[2] if isinstance(kind, str) else ""
