from pathlib import Path

import pytest
import torch

from ccgpu.train.metrics import ConfusionMatrix
from ccgpu.train.runs import records


def test_records_are_cut_back_and_a_broken_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert records.read_records(path) == []
    for iteration in range(1, 5):
        records.append_record(path, {"kind": "training", "iteration": iteration, "loss": 0.1 * iteration})
    whole = records.read_records(path)
    with open(path, "a") as file:
        file.write('{"iteration": 5, "lo')
    assert records.read_records(path) == whole
    assert records.cut_records(path, 3) == whole[:3]
    records.append_record(path, whole[3])
    assert records.read_records(path) == whole


def test_records_refuse_a_broken_line_in_the_middle_and_nan(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n{"iter\n{"iteration": 2}\n')
    with pytest.raises(ValueError, match="something else in line 2"):
        records.read_records(path)
    with pytest.raises(ValueError, match="JSON compliant"):
        records.append_record(path, {"iteration": 3, "loss": float("nan")})


def test_evaluation_record_holds_null_for_a_class_that_does_not_occur() -> None:
    confusion = ConfusionMatrix(3)
    confusion.matrix += torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    record = records.evaluation_record(7, confusion, ("a", "b", "c"))
    assert record["iou"] == {"a": 0.75, "b": 0.8, "c": None}
    assert record["miou"] == pytest.approx(0.775)
    assert record["pixel_accuracy"] == pytest.approx(7 / 8)
