from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ccgpu.train.metrics import ConfusionMatrix
from ccgpu.train.runs import records
from ccgpu.train.runs.flags import combine, option, range_problems
from ccgpu.train.runs.training_run import one_class_baseline


@dataclass(frozen=True)
class Some:
    lr: float = option(1.0, "rate", kind=float, least=0)
    size: tuple[int, int] = option((4, 4), "size", kind=int, count="size", least=2, most=9)
    workers: int = option(4, "workers", kind=int, decides="nothing")


@dataclass(frozen=True)
class Recorded(Some):
    split: str = option("val", "split to evaluate on", decides="records")


def test_combine_flag_beats_saved_beats_preset_beats_default() -> None:
    preset = {"lr": 2.0, "workers": 1}
    assert combine(Some, preset={}, saved=None, flags={}) == Some(1.0, (4, 4), 4)
    assert combine(Some, preset=preset, saved=None, flags={}) == Some(2.0, (4, 4), 1)
    assert combine(Some, preset=preset, saved=None, flags={"lr": 0.0}) == Some(0.0, (4, 4), 1)
    saved = {"lr": 3.0, "size": [5, 6], "workers": 2}
    assert combine(Some, preset=preset, saved=saved, flags={}) == Some(3.0, (5, 6), 2)
    assert combine(Some, preset=preset, saved=saved, flags={"workers": 0}) == Some(3.0, (5, 6), 0)
    assert combine(Some, preset=preset, saved=saved, flags={"size": (5, 6)}) == Some(3.0, (5, 6), 2)


def test_combine_lists_old_and_new_of_every_difference() -> None:
    saved = {"lr": 3.0, "size": [5, 6], "workers": 2}
    with pytest.raises(ValueError, match=r"--lr was 3\.0, is 2\.0; --size was 5 6, is 5 5"):
        combine(Some, preset={}, saved=saved, flags={"lr": 2.0, "size": (5, 5), "workers": 9})
    with pytest.raises(ValueError, match=r"got a difference in \['other'\]"):
        combine(Some, preset={}, saved={**saved, "other": 1}, flags={})


def test_settings_of_the_records_are_free_in_another_folder() -> None:
    saved = {"lr": 3.0, "size": [5, 6], "workers": 2, "split": "val"}
    with pytest.raises(ValueError, match=r"--split was val, is train"):
        combine(Recorded, preset={}, saved=saved, flags={"split": "train"})
    assert combine(Recorded, preset={}, saved=saved, flags={"split": "train"}, elsewhere=True).split == "train"
    with pytest.raises(ValueError, match=r"--lr was 3\.0, is 2\.0"):
        combine(Recorded, preset={}, saved=saved, flags={"lr": 2.0}, elsewhere=True)


def test_range_problems_names_each_setting_once() -> None:
    assert range_problems(Some()) == []
    assert range_problems(Some(lr=-1.0, size=(1, 10), workers=-5)) == [
        "--lr must be 0 or more, got -1.0",
        "--size must be 2 or more and at most 9, got 1 10",
    ]
    assert range_problems(Some(lr=float("nan"))) == ["--lr must be 0 or more, got nan"]


def test_records_are_cut_back_and_a_broken_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert records.read_records(path) == []
    for iteration in range(1, 5):
        records.append_record(path, {"iteration": iteration, "loss": 0.1 * iteration})
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


def test_one_class_baseline_has_the_iou_of_a_constant_answer() -> None:
    confusion = ConfusionMatrix(3)
    confusion.matrix += torch.tensor([[3, 1, 0], [0, 4, 0], [0, 1, 1]])
    expected = ConfusionMatrix(3)
    label = torch.tensor([0] * 4 + [1] * 4 + [2] * 2)
    expected.update(torch.zeros_like(label), label)
    assert torch.equal(one_class_baseline(confusion).matrix, expected.matrix)
    assert one_class_baseline(confusion).iou().tolist() == [0.4, 0.0, 0.0]
