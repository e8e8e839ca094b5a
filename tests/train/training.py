"""The smallest run of each training command, for tests that look at what it leaves or what it refuses."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ccgpu.train import ade20k, camvid, cityscapes, far_context, lip, voc
from ccgpu.train.metrics import ConfusionMatrix
from ccgpu.train.runs import records
from tests.train.narrow import NARROW

COMMANDS = [ade20k, camvid, cityscapes, far_context, lip, voc]
TINY = [
    *("--backbone", NARROW, "--head-channels", "8", "--crop", "33", "41", "--batch", "2", "--device", "cpu"),
    *("--iterations", "2", "--save-every", "1", "--log-every", "1", "--lr", "1e-3", "--workers", "0"),
    *("--scenes", "6", "3", "--scenes-size", "64", "96", "--mode", "whole", "--no-tensorboard"),
]


# Flags that fit a recipe to the synthetic images of TINY, and to its two steps.
SMALL = {
    "ade20k": ("--random-short-sides", "48", "64", "--short-side", "64"),
    "lip": ("--fit", "64", "64"),
    "camvid": (),
    "cityscapes": (),
    # Two steps lead to one class everywhere, with which an evaluation cannot be compared with another.
    "far_context": ("--backbone", "local", "--lr", "1e-5", "--seed", "1"),
    "voc": ("--random-short-sides", "64", "--short-side", "64"),
}


def name_of(module: Any) -> str:
    return module.DATASET.name if isinstance(module, ModuleType) else ""


def run(module: ModuleType, out: Path, *flags: str) -> list[dict[str, Any]]:
    """Run a command and return its records."""
    assert module.main([*TINY, *SMALL[name_of(module)], *flags, "--out", str(out)]) == 0
    lines = records.read_records(out / "metrics.jsonl")
    assert [line["iteration"] for line in lines if line["kind"] == "training"] == [1, 2]
    assert lines[-1]["kind"] == "evaluation"
    return lines


def saved_scores(module: ModuleType, predictions: Path, root: Path, split: str) -> ConfusionMatrix:
    """Return the confusion matrix of saved prediction files and the label files, both read from the disk."""
    labels = module.DATASET.labels
    confusion = ConfusionMatrix(labels.num_classes)
    for pair in module.find_pairs(root, split):
        predicted = np.asarray(Image.open(predictions / f"{pair.name}.png"))
        assert set(np.unique(predicted)) <= set(labels.ids)
        truth = labels.to_train[np.asarray(Image.open(pair.label))]
        confusion.update(torch.from_numpy(labels.to_train[predicted].astype(int)), torch.from_numpy(truth.astype(int)))
    return confusion


def told(capsys: pytest.CaptureFixture[str], name: str) -> str:
    """Return the last line that the command NAME printed on stderr: its error."""
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"{name}: ")
    assert not line.startswith(f"{name}: {name}: ")
    return line
