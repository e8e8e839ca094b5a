"""What a training command says of settings that have no effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ccgpu.train.runs.announcements import announce, without_effect
from ccgpu.train.runs.plan import Plan
from ccgpu.train.runs.settings.training import Settings

SIZES: dict[str, Any] = {"batch": 4, "crop": (32, 48)}


@pytest.mark.parametrize(
    ("changes", "pixels"),
    [({"ohem": (0.7, 6143.0)}, None), ({"ohem": (0.7, 6144.0)}, 6144), ({"ohem": (0.7, 1e5), "clip": 5}, 30720)],
)
def test_ohem_that_keeps_all_pixels_of_a_step_is_told(
    changes: dict[str, Any], pixels: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(**SIZES, **changes)
    announce(Plan(settings, tmp_path, False, None, None, (10,)), settings, torch.device("cpu"), 5, 5)
    told = [line for line in capsys.readouterr().out.splitlines() if "--ohem" in line]
    kept = f"{changes['ohem'][1]:.0f}"
    expected = f"warning: --ohem keeps at least {kept} pixels of a step, which has {pixels}: none is left out; give a "
    assert told == ([] if pixels is None else [f"{expected}smaller number"])


@pytest.mark.parametrize(
    ("iterations", "every", "patience", "evaluations"),
    [(10, 2, 3, None), (10, 2, 4, 5), (10, 3, 2, None), (10, 3, 3, 4), (10, 10, 1, 1), (10, 10, 0, None)],
)
def test_patience_that_the_evaluations_cannot_exhaust_is_told(
    iterations: int, every: int, patience: int, evaluations: int | None
) -> None:
    """The first of five evaluations is the best so far, and the fifth ends the run anyway: three may be in vain."""
    lines = without_effect(Settings(iterations=iterations, eval_every=every, patience=patience))
    number = f"{evaluations} evaluation{'s' * (evaluations != 1)}"
    told = f"--patience {patience} cannot end a run of {number} early; lower it, "
    assert lines == ([] if evaluations is None else [f"{told}or --eval-every, which is {every}"])
