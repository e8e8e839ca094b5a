"""The commands that measure gradients and times of dilated convolutions: what they record."""

from pathlib import Path

from benchmarks import convolution_gradients, dilated_speed
from ccgpu.train.runs import records


def test_errors_are_recorded_and_no_random_call_is_wrong_in_right_gradients(tmp_path: Path) -> None:
    path = tmp_path / "gradients.jsonl"
    # Exit status 1 would mean a wrong gradient.
    assert convolution_gradients.main(["--record", str(path), "--rows", "4", "--random", "40"]) == 0
    head, *rows, total = records.read_records(path)
    assert {"commit", "date", "command", "versions"} <= set(head)
    assert len(rows) == 4
    assert all(row["error_out"] < 0.01 for row in rows)
    assert all(row["error_x"] < 0.01 for row in rows)
    assert (total["calls"], total["wrong_in_right_gradients"]) == (40, 0)


def test_an_error_is_called_wrong_above_rounding_and_without_a_number() -> None:
    case = convolution_gradients.Case()
    assert not convolution_gradients.is_wrong(case, {"out": 2e-3})
    for error in (1.4, float("inf"), float("nan")):
        assert convolution_gradients.is_wrong(case, {"out": 0.0, "weight": error})
    single = convolution_gradients.Case(dtype="float32", groups=1, size=(5, 6))
    assert not convolution_gradients.is_wrong(single, convolution_gradients.errors(single))


def test_times_are_recorded_for_every_way(tmp_path: Path) -> None:
    path = tmp_path / "speed.jsonl"
    assert dilated_speed.main(["--record", str(path), "--repeats", "1", "--layers", "1", "--crop", "32", "32"]) == 0
    head, layer, step = records.read_records(path)
    assert {"commit", "date", "command", "versions"} <= set(head)
    assert set(layer["seconds"]) == {"torch bfloat16", "torch float32", "depthwise"}
    assert all(value > 0 for times in layer["seconds"].values() for value in times.values())
    assert set(step["seconds"]) == {"depthwise", "torch bfloat16"}
