"""The losses as flags: a run of two steps with each, whose records hold what a plain rendering computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ccgpu.models.ccnet import Outputs
from ccgpu.train import cityscapes, folder
from ccgpu.train.dataset import Opened
from ccgpu.train.loss.criterion import Criterion, Loss, Totals
from ccgpu.train.runs import class_weights
from ccgpu.train.runs.plan import Plan
from ccgpu.train.runs.settings.training import Settings
from tests.train import training
from tests.train.folders import COLOURS, TINY, write_folder
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


def counted_weights(photos: Path, names: list[str]) -> list[float]:
    """Return the weights of median frequency balancing of the classes of masks, in the order of their colours."""
    masks = [np.asarray(Image.open(photos / "masks" / f"{name}.png")) for name in names]
    frequency = []
    for colour in COLOURS:
        shares = [(mask == colour).all(axis=-1).mean() for mask in masks]  # all masks have one size
        frequency.append(np.mean([share for share in shares if share > 0]))
    return [float(np.median(frequency) / f) for f in frequency]


def test_counted_class_weights_are_used_told_saved_and_kept(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, out = ("--class-weights", "median-frequency", "--save-every", "1"), tmp_path / "run"
    with monkeypatch.context() as patch:
        records, seen = losses_of_run(photos, out, patch, *flags, "--no-check")
    told = capsys.readouterr().out
    saved = torch.load(out / "last.pt")
    weights, names = saved["class_weights"], saved["labels"]["names"]
    counted = counted_weights(photos, saved["folder"]["split"]["names"]["train"])
    colours = [COLOURS.tolist().index([*colour]) for colour in saved["labels"]["colours"]]
    assert weights == pytest.approx([counted[colour] for colour in colours], rel=1e-12)
    assert len({*weights}) == 3
    assert json.loads((out / "settings.json").read_text())["class_weights"] == dict(zip(names, weights, strict=True))
    for name, weight in zip(names, weights, strict=True):
        assert any(line.split() == [*name.split(), f"{weight:.4f}"] for line in told.splitlines())
    for record, (outputs, label) in zip(records, seen, strict=True):
        expected = [pixel_loss_loop(logits, label, tuple(weights)) for logits in outputs[:2]]
        assert [record["main"], record["auxiliary"]] == pytest.approx(expected, rel=1e-4)
    # A resumed run takes them from the checkpoint, and ends as the undisturbed one.
    monkeypatch.setattr(class_weights, "median_frequency", None)
    again = tmp_path / "again"
    assert folder.main(["--resume", str(out / "previous.pt"), "--out", str(again), "--device", "cpu"]) == 0
    resumed = torch.load(again / "last.pt")
    assert resumed["class_weights"] == weights
    assert all(torch.equal(value, resumed["model"][name]) for name, value in saved["model"].items())
    # Weights that were changed in the file, or are not those that the flag gives, are told.
    for changed in ([1.0, 2.0], None):
        torch.save({**saved, "class_weights": changed}, tmp_path / "changed.pt")
        assert folder.main(["--resume", str(tmp_path / "changed.pt"), "--out", str(tmp_path / "other")]) == 2
        assert "must hold the weights of the 3 classes that --class-weights asks for" in capsys.readouterr().err


def test_given_class_weights_are_the_alpha_of_the_focal_loss(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, seen = losses_of_run(
        photos, tmp_path / "run", monkeypatch, "--class-weights", "0", "1", "2.5", "--focal", "1"
    )
    for record, (outputs, label) in zip(records, seen, strict=True):
        assert record["main"] == pytest.approx(
            pixel_loss_loop(outputs.logits, label, (0.0, 1.0, 2.5), 0.0, 1.0), rel=1e-4
        )
    assert torch.load(tmp_path / "run" / "last.pt")["class_weights"] == [0.0, 1.0, 2.5]


def test_counting_classes_tells_of_label_files_that_cannot_be_used(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(tiny_data, tmp_path / "data")
    broken, wrong = sorted((root / "gtFine/train").rglob("*_labelIds.png"))[:2]
    broken.write_bytes(broken.read_bytes()[:100])
    Image.fromarray(np.full((64, 128), 77, dtype=np.uint8)).save(wrong)
    flags = ["--class-weights", "median-frequency", "--no-check", "--out", str(tmp_path / "run")]
    assert cityscapes.main([*training.TINY, "--data", str(root), *flags]) == 2
    told = capsys.readouterr().err
    assert "check_labels: label files must be usable, got 2 problems in 9 files" in told
    assert f"{broken}: " in told
    assert f"{wrong}: holds the values 77" in told
    assert not (tmp_path / "run").exists()


def test_classes_that_no_training_file_holds_weigh_1_which_is_told(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(tiny_data, tmp_path / "data")
    pixels = np.full((64, 128), 7, dtype=np.uint8)  # road, and a quarter of car
    pixels[:32, :64] = 26
    for path in (root / "gtFine/train").rglob("*_labelIds.png"):
        Image.fromarray(pixels).save(path)
    settings = Settings(data=str(root), class_weights=("median-frequency",), workers=0)
    clips = [(pair,) for pair in cityscapes.find_pairs(root, "train")]
    plan = Plan(settings, tmp_path / "run", False, None, None, (settings.iterations,))
    weights = class_weights.choose_class_weights(plan, Opened(cityscapes.DATASET), clips)
    expected = dict.fromkeys(cityscapes.DATASET.labels.names, 1.0) | {"road": 0.5 / 0.75, "car": 0.5 / 0.25}
    assert weights == pytest.approx([*expected.values()])
    told = capsys.readouterr().out
    assert "note: no training label file holds sidewalk, building, " in told
    assert "bicycle: weight 1 in the loss (--class-weights)" in told
