from dataclasses import dataclass

import pytest

from ccgpu.train import predict
from ccgpu.train.runs.flags import combine, option, range_problems


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
    assert combine(Recorded, preset={}, saved=saved, flags={"split": "train"}, kept=("result",)).split == "train"
    with pytest.raises(ValueError, match=r"--lr was 3\.0, is 2\.0"):
        combine(Recorded, preset={}, saved=saved, flags={"lr": 2.0}, kept=("result",))


def test_range_problems_names_each_setting_once() -> None:
    assert range_problems(Some()) == []
    assert range_problems(Some(lr=-1.0, size=(1, 10), workers=-5)) == [
        "--lr must be 0 or more, got -1.0",
        "--size must be 2 or more and at most 9, got 1 10",
    ]
    assert range_problems(Some(lr=float("nan"))) == ["--lr must be 0 or more, got nan"]
    assert range_problems(Some(size=(5, 10**400))) == [f"--size must be at most 9, got 5 {10**400}"]
    assert range_problems(Some(lr=float("inf"))) == ["--lr must be finite, got inf"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--out", "", "a.jpg"],
            "argument --out: expected a value, got an empty one, as of a variable",
        ),
        (["--out=", "a.jpg"], "argument --out: expected a value, got an empty one"),
        (["--out", "b", ""], "expected a value, got an empty one"),
        (["a.jpg", "--checkpoint", "c", "--output", "b"], "required: --out; got --output; did you mean --out?"),
        (
            ["a.jpg", "--out", "b", "--chekpoint=c"],
            "required: --checkpoint; got --chekpoint=c; did you mean --check",
        ),
        (["a.jpg", "--out", "b"], "required: --checkpoint\n"),
        (["a.jpg", "--out", "b", "--checkpoint", "c", "--WINDOW", "9"], "--WINDOW 9; did you mean --window?"),
        (["a.jpg", "--out", "b", "--checkpoint", "c", "-e"], "unrecognized arguments: -e; --help lists all flags"),
    ],
)
def test_flags_that_are_empty_missing_or_unknown(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        predict.main(words)
    assert message in capsys.readouterr().err
