"""Classes that are renamed, reordered or renumbered after training: every command refuses them and shows both lists."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ccgpu.models.labels import Labels
from ccgpu.train import camvid, convert, evaluate, predict
from tests.train.networks import write_network
from tests.train.training import told

SWAPPED = [1, 0, *range(2, camvid.LABELS.num_classes)]


def changed(order: Sequence[int] = range(camvid.LABELS.num_classes), **changes: Any) -> Labels:
    """Return CamVid's classes in another order, with other names or ids."""
    labels = camvid.LABELS
    values: dict[str, Any] = {
        "names": tuple(labels.names[i] for i in order),
        "colours": labels.colours[list(order)],
        "ids": tuple(labels.ids[i] for i in order),
        "void": labels.void,
    }
    return Labels(**{**values, **changes})


def use(labels: Labels, monkeypatch: pytest.MonkeyPatch, name: str = "camvid") -> None:
    """Change the classes in the dataset's file, as an editor would."""
    monkeypatch.setattr(camvid, "DATASET", dataclasses.replace(camvid.DATASET, labels=labels, name=name))


REORDERED = changed(SWAPPED)
RENUMBERED = changed(ids=tuple(camvid.LABELS.ids[i] for i in SWAPPED))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (REORDERED, "got camvid with the same names in another order (class 0: 'Sky' (id 0) -> 'Building' (id 1)"),
        (RENUMBERED, "got camvid with other label ids (class 0: 'Sky' (id 0) -> 'Sky' (id 1)"),
    ],
)
def test_evaluate_and_resume_refuse_other_classes(
    labels: Labels,
    message: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use(labels, monkeypatch)
    assert evaluate.main(["--checkpoint", str(trained / "last.pt"), "--workers", "0"]) == 2
    assert message in told(capsys, "evaluate")
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    before = (out / "metrics.jsonl").read_bytes()
    assert camvid.main(["--resume", "--out", str(out)]) == 2
    assert message in told(capsys, "train")
    assert (out / "metrics.jsonl").read_bytes() == before


def test_resume_refuses_other_void_ids(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(changed(void=(*camvid.LABELS.void, 254)), monkeypatch)
    assert camvid.main(["--resume", "--out", str(trained)]) == 2
    assert "254] instead of [" in told(capsys, "train")
    assert evaluate.main(["--checkpoint", str(trained / "last.pt"), "--workers", "0"]) == 0


@pytest.mark.parametrize("command", [evaluate, predict, convert])
def test_a_dataset_of_other_classes_is_refused(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_network(tmp_path / "net.pt")
    Image.new("RGB", (33, 33)).save(tmp_path / "a.png")
    use(REORDERED, monkeypatch)
    net, data = str(tmp_path / "net.pt"), str(tmp_path)
    flags = {
        evaluate: ["--checkpoint", net, "--data", data],
        predict: ["--checkpoint", net, data, "--out", str(tmp_path / "out")],
        convert: [net, str(tmp_path / "out.pt")],
    }
    assert command.main([*flags[command], "--dataset", "camvid"]) == 2
    message = "got camvid with the same names in another order (class 0: 'Sky' -> 'Building'; class 1: 'Building' ->"
    assert message in told(capsys, command.__name__.rpartition(".")[2])
    assert {path.name for path in tmp_path.iterdir()} <= {"a.png", "net.pt"}


def test_label_ids_of_another_dataset_are_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_network(tmp_path / "net.pt")
    use(RENUMBERED, monkeypatch)
    assert convert.main([str(tmp_path / "net.pt"), str(tmp_path / "out.pt"), "--dataset", "camvid"]) == 0
    assert "note: label ids are those of camvid" in capsys.readouterr().out


def test_a_network_without_names_takes_any_dataset_of_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_network(tmp_path / "net.pt", labels=None)
    use(REORDERED, monkeypatch)
    assert convert.main([str(tmp_path / "net.pt"), str(tmp_path / "out.pt"), "--dataset", "camvid"]) == 0
