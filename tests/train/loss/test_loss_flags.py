"""The losses as flags: a run of two steps with each, whose records hold what a plain rendering computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ccgpu.models.ccnet import Outputs
from ccgpu.train import folder
from ccgpu.train.loss.criterion import Criterion, Loss, Totals
from tests.train.folders import TINY, write_folder
from tests.train.loss.pixel_cases import dice_loop, pixel_loss_loop


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("photos"))


def losses_of_run(
    photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *flags: str
) -> tuple[list[dict[str, Any]], list[tuple[Outputs, torch.Tensor]]]:
    """Run a command; return its records of training, and what its loss was computed of, in float64."""
    seen = []
    compute = Criterion.__call__

    def remember(self: Criterion, outputs: Outputs, label: torch.Tensor, totals: Totals | None = None) -> Loss:
        seen.append((Outputs(*(part.detach().double() for part in outputs if part is not None)), label))
        return compute(self, outputs, label, totals)

    monkeypatch.setattr(Criterion, "__call__", remember)
    assert folder.main([*TINY, "--data", str(photos), "--log-every", "1", "--out", str(out), *flags]) == 0
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "training"], seen


@pytest.mark.parametrize(
    ("flags", "options", "dice"),
    [
        (("--label-smoothing", "0.1"), {"smoothing": 0.1}, 0.0),
        (("--focal", "2"), {"focal": 2.0}, 0.0),
        (("--loss-average", "all", "--fit-crop", "--random-scale", "0.5", "0.6"), {"average": "all"}, 0.0),
        (("--dice", "0.5"), {}, 0.5),
    ],
    ids=["smoothing", "focal", "all", "dice"],
)
def test_records_hold_the_losses_of_a_plain_rendering(
    flags: tuple[str, ...],
    options: dict[str, Any],
    dice: float,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records, seen = losses_of_run(photos, tmp_path / "run", monkeypatch, *flags)
    assert len(records) == len(seen) == 2
    for record, (outputs, label) in zip(records, seen, strict=True):
        assert outputs.auxiliary is not None
        main, auxiliary = (pixel_loss_loop(logits, label, **options) for logits in outputs[:2])
        assert record["main"] == pytest.approx(main, rel=1e-4)
        assert record["auxiliary"] == pytest.approx(auxiliary, rel=1e-4)
        overlap = dice_loop(outputs.logits, label)
        assert ("dice" in record) == (dice > 0)
        assert record.get("dice", overlap) == pytest.approx(overlap, rel=1e-4)
        assert record["loss"] == pytest.approx(main + 0.4 * auxiliary + dice * overlap, rel=1e-4)
    if options.get("average") == "all":  # else this would be the mean over the labelled pixels
        assert any((label == 255).any() for _, label in seen)
