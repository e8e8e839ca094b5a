"""A run folder's records: metrics.jsonl (losses and scores), settings.json."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ccgpu.models.weights import write_atomically
from ccgpu.train.metrics import SCORES, ConfusionMatrix
from ccgpu.version import __version__

METRICS, SETTINGS = "metrics.jsonl", "settings.json"
KINDS = ("training", "evaluation")  # of the records of a run


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Append `record`, which must not contain NaN, as one line of JSON."""
    line = json.dumps(record, allow_nan=False)
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines; an empty list where there is no file.

    An incomplete last line, which a killed run leaves, is ignored.

    Raises:
        ValueError: a complete line is not a record.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError:  # no JSON, or not UTF-8
            record = None
        if not isinstance(record, dict):
            raise ValueError(
                f"read_records: every line of {path} must be a record in JSON, got something else in line {number}; "
                "remove that line."
            )
        records.append(record)
    return records


def cut_records(path: Path, iteration: int) -> list[dict[str, Any]]:
    """Remove the records after `iteration`, which a resumed run writes again; return the remaining ones."""
    found = read_records(path)
    for number, record in enumerate(found, start=1):
        if not isinstance(record.get("iteration"), int) or record.get("kind") not in KINDS:
            raise ValueError(
                f"cut_records: every record of {path} must have a kind and an iteration, got others in line {number}; "
                "remove that line."
            )
    kept = [record for record in found if record["iteration"] <= iteration]
    if path.exists():
        write_atomically(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in kept))
    return kept


def evaluation_record(iteration: int | None, confusion: ConfusionMatrix, names: Sequence[str]) -> dict[str, Any]:
    """Return the record of an evaluation: scores in 0..1, null for classes that do not occur, and the matrix."""
    iou = confusion.iou().tolist()
    return {
        "kind": "evaluation",
        "iteration": iteration,
        **{name: _number(score(confusion)) for name, (_, score) in SCORES.items()},
        "iou": {name: _number(value) for name, value in zip(names, iou, strict=True)},
        "matrix": confusion.matrix.tolist(),
    }


def confusion(record: Mapping[str, Any]) -> ConfusionMatrix:
    """Return the confusion matrix in a record of `evaluation_record`."""
    matrix = torch.tensor(record["matrix"])
    found = ConfusionMatrix(len(matrix))
    found.matrix += matrix
    return found


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def circumstances(device: torch.device) -> dict[str, Any]:
    """Return the circumstances of a measurement or run: commit, device, threads, versions."""
    return {
        "commit": commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {
            "ccgpu": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def write_settings(
    folder: Path,
    settings: Mapping[str, Any],
    device: torch.device,
    processes: int,
    class_weights: Mapping[str, float],
) -> None:
    """Write settings.json: the settings, and time, flags, processes and machine of the first start and every resume.

    The weights of the classes in the loss, if there are any, are written as "class_weights", by name.
    """
    path = folder / SETTINGS
    starts = _read_run(path)["starts"] if path.exists() else []
    starts.append(
        {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "arguments": sys.argv[1:],
            "processes": processes,
            **circumstances(device),
        }
    )
    weights = {"class_weights": dict(class_weights)} if class_weights else {}
    write_atomically(path, json.dumps({"settings": dict(settings), **weights, "starts": starts}, indent=2) + "\n")


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Return the settings of the run in `folder`, or None without a run there.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / SETTINGS
    return _read_run(path)["settings"] if path.exists() else None


def _read_run(path: Path) -> dict[str, Any]:
    """Return the content of settings.json."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError:  # no JSON, or not UTF-8
        found = None
    if not (
        isinstance(found, dict) and isinstance(found.get("settings"), dict) and isinstance(found.get("starts"), list)
    ):
        raise ValueError(
            f"read_settings: {path} must hold the settings and the starts of a run, got something else; the file is "
            "damaged: remove it. A checkpoint beside it holds the settings too, so that --resume continues; without "
            "one, start the run again."
        )
    return found


def commit() -> str | None:
    """Return the checkout's commit, with "+changes" if files differ from it; None outside of a checkout."""
    here = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        commit = subprocess.run([*here, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        changes = subprocess.run([*here, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # no git, or an installed package
        return None
    return commit.strip() + ("+changes" if changes.strip() else "")
