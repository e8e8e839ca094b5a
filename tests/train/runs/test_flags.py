from dataclasses import dataclass

import pytest

from ccgpu.train import predict
from ccgpu.train.runs.flags import add_flags, combine, option, range_problems
from ccgpu.train.runs.parser import command_parser
from ccgpu.train.runs.settings.training import Settings


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


@dataclass(frozen=True)
class Sized(Some):
    short: int | None = option(None, "short side", kind=int, excludes=("fit",))
    fit: bool = option(False, "fit", kind=bool, excludes=("short",))


def test_a_flag_replaces_what_it_excludes_but_not_another_flag() -> None:
    assert combine(Sized, preset={"short": 9}, saved=None, flags={"fit": True}) == Sized(short=None, fit=True)
    assert combine(Sized, preset={"fit": True}, saved=None, flags={"short": 9}) == Sized(short=9, fit=False)
    assert combine(Sized, preset={"short": 9}, saved=None, flags={"fit": False}) == Sized(short=9)
    both = {"short": 9, "fit": True}  # for the check of the settings, which refuses them
    assert combine(Sized, preset={}, saved=None, flags=both) == Sized(short=9, fit=True)


def test_scales_without_values_are_those_of_the_paper() -> None:
    parser = command_parser("train", "")
    add_flags(parser, Settings, {})
    assert vars(parser.parse_args(["--scales"])) == {"scales": (0.75, 1.0, 1.25)}
    assert vars(parser.parse_args(["--scales", "1", "2"])) == {"scales": (1.0, 2.0)}
    assert vars(parser.parse_args([])) == {}


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
        (["a.jpg", "--checkpoint", "c", "--output", "b"], "unrecognized arguments: --output b; did you mean --out?"),
        (
            ["a.jpg", "--out", "b", "--chekpoint=c"],
            "required: --checkpoint; got --chekpoint=c; did you mean --check",
        ),
        (["a.jpg", "--out", "b"], "required: --checkpoint\n"),
        (["a.jpg", "--out", "b", "--checkpoint", "c", "--TILE", "9"], "--TILE 9; did you mean --tile?"),
        (["a.jpg", "--out", "b", "--checkpoint", "c", "-e"], "unrecognized arguments: -e; --help lists all flags"),
    ],
)
def test_flags_that_are_empty_missing_or_unknown(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        predict.main(words)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "flag"),
    [
        ("--warmup", "--warmup-steps"),  # and not --amp, which is spelled more like it
        ("--early-stopping", "--patience"),
        ("--gradient-accumulation", "--accumulate"),
        ("--color-jitter", "--photometric"),
        ("--class-weight", "--class-weights"),
        ("--epochs", "--iterations"),
        ("--pretrained", "--imagenet"),
    ],
)
def test_other_names_of_flags_lead_to_them(word: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = command_parser("train", "")
    add_flags(parser, Settings, {})
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args([word, "1"])
    assert f"{word} 1; did you mean {flag}?" in capsys.readouterr().err
