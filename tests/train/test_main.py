"""The command `ccgpu`: its help, its subcommands, what `ccgpu train` trains on, and one spelling for each flag."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from ccgpu.train import camvid
from ccgpu.train.__main__ import ALL, COMMANDS, DATASETS, main, overview
from ccgpu.train.runs.flags import checkpoint_file
from ccgpu.version import __version__
from tests.train.training import TINY, run

ROOT = Path(__file__).resolve().parents[2]
MODULE = """
from dataclasses import replace
from ccgpu.train import camvid
DATASET = replace(camvid.DATASET, name="mine")
"""


def ccgpu(*words: str, module: str = "ccgpu.train") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("module", ["ccgpu.train", "train"])
def test_the_help_is_there_without_torch(module: str) -> None:
    code = (
        "import sys, runpy\nsys.argv = ['ccgpu', '--help']\n"
        f"try:\n    runpy.run_module({module!r}, run_name='__main__')\nexcept SystemExit as exit:\n"
        "    assert not exit.code\nassert not {'torch', 'numpy', 'numba'} & {*sys.modules}"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == overview() + "\n"
    assert all(f"\n  {name} " in shown.stdout for name in ALL)
    assert all(f"\n{title}:\n" in shown.stdout for title in COMMANDS)
    assert max(map(len, shown.stdout.splitlines())) <= 100


def test_versions() -> None:
    assert re.fullmatch(rf"ccgpu {__version__} \(Python 3[\d.]+, torch [\w.+]+\)\n", ccgpu("--version").stdout)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predcit"], "ccgpu: the first argument must be a command, got 'predcit'; did you mean ccgpu predict?"),
        (["Train"], "did you mean ccgpu train?"),
        (["camvid"], "did you mean ccgpu train camvid?"),
        (["docs"], "did you mean ccgpu train docs?"),
        (["--checkpoint"], "got '--checkpoint'; ccgpu --help lists them."),
        (
            ["train", "dcs"],
            "lip, camvid, far_context) or a module with a DATASET, got 'dcs', which is",
        ),
        (["train", "dcs"], "did you mean docs?"),
        (["train", "docs/imges"], "did you mean docs/images?"),
        (["train", "cityscape"], "did you mean cityscapes?"),
        (["train", "setup.cfg"], "got 'setup.cfg', which is a file"),
        (["train", "json"], "got 'json', a module without one"),
        (["train", "no.such"], "got 'no.such', which is neither"),
        (["train", "--data"], "got '--data', which is no folder; ccgpu train --help shows how to go on."),
    ],
)
def test_words_that_name_nothing(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(words) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert len(told.err.splitlines()) == 1
    assert not told.out


def test_without_a_word_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["train"]):
        assert main(words) == 2
        assert main([*words, "--help"]) == 0
        first, second = capsys.readouterr().out.split("usage: ")[1:]
        assert first == second


def test_a_dataset_trains_and_its_name_is_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("camvid").mkdir()
    assert main(["train", "camvid", *TINY, "--out", "run"]) == 0
    assert "the folder camvid/ here is not read" in capsys.readouterr().err
    assert Path("run/last.pt").exists()
    assert main(["train", "camvid", "--resume", "run"]) == 0  # a run folder
    assert "is not read" not in capsys.readouterr().err
    assert main(["evaluate", "--checkpoint", "run", "--workers", "0", "--device", "cpu"]) == 0


def test_a_folder_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    module = type(sys)("ccgpu.train.folder")
    monkeypatch.setitem(sys.modules, "ccgpu.train.folder", module)
    monkeypatch.setattr(module, "main", lambda argv: given.append(argv) or 0, raising=False)
    monkeypatch.chdir(tmp_path)
    Path("camvid").mkdir()
    assert main(["train", "./camvid", "--lr", "1"]) == 0
    assert main(["train", str(tmp_path), "--help"]) == 0
    assert given == [["--data", "./camvid", "--lr", "1"], ["--data", str(tmp_path), "--help"]]


def test_a_module_of_ones_own_is_found_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_streets.py").write_text(MODULE)
    (tmp_path / "my_mistake.py").write_text("import nothing_of_this_name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    assert main(["train", "my_streets", *TINY, "--out", "run"]) == 0
    assert Path("run/last.pt").exists()
    assert main(["train", "my_mistake"]) == 2
    assert "my_mistake must be a module that can be imported, got: No module named" in capsys.readouterr().err


# The flags of all commands

HELPED = [*([name] for name in ALL if name != "train"), *(["train", name] for name in (*DATASETS, str(ROOT)))]


@pytest.fixture(scope="module")
def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command, caught when it is asked to parse."""
    found: dict[str, argparse.ArgumentParser] = {}

    class Caught(Exception):
        pass

    def catch(self: argparse.ArgumentParser, *_: Any) -> None:
        found[self.prog.removeprefix("ccgpu ")] = self
        raise Caught

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", catch)
        for words in HELPED:
            with pytest.raises(Caught):
                main([*words, "--any"])
    return found


@pytest.mark.parametrize("words", HELPED, ids=" ".join)
def test_each_command_has_its_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: ccgpu {' '.join(words).replace(str(ROOT), 'DIR')} ")
    is_dataset = words[0] == "train" and words[1] in DATASETS
    assert ("--scenes" in text) is is_dataset
    assert ("--data " in text) is (is_dataset or words[0] == "evaluate")
    assert ("--clip N" in text) is (words in (["train", "camvid"], ["train", "far_context"]))  # the datasets of videos
    assert ("--markers N" in text) is (words == ["train", "far_context"])
    assert ("default: 0 65535" in " ".join(text.split())) is is_dataset  # a folder's deep images keep their values
    assert "default: None" not in text
    assert "default: none" not in text


def test_the_flags_of_training_stand_in_groups(parsers: dict[str, argparse.ArgumentParser]) -> None:
    groups = {group.title: group for group in parsers["train camvid"]._action_groups}
    wanted = ["data", "network", "loss", "augmentation", "optimisation", "evaluation", "run"]
    assert [title for title in groups if title in wanted] == wanted
    names = {title: {a.option_strings[0] for a in group._group_actions} for title, group in groups.items()}
    assert {"--data", "--clip"} <= names["data"]
    assert {"--window", "--flip", "--fit"} <= names["evaluation"]
    assert {"--out", "--resume", "--preset", "--eval-every"} <= names["run"]
    assert names["options"] == {"-h"}
    for command in ("evaluate", "predict"):
        titles = {group.title for group in parsers[command]._action_groups if group._group_actions}
        assert {"prediction", "results", "run"} <= titles


def test_a_flag_means_the_same_in_every_command(parsers: dict[str, argparse.ArgumentParser]) -> None:
    """One name and one kind of value, so that nobody has to learn a flag twice."""
    kinds, names = defaultdict(set), defaultdict(set)
    for parser in parsers.values():
        for action in parser._actions:
            for name in action.option_strings:
                of_numbers = action.type if action.type in (int, float) else None
                kinds[name].add((action.dest, of_numbers))
                names[action.dest].add(name)
    different = {name: kind for name, kind in kinds.items() if len(kind) > 1}
    assert not different
    for dest, found in names.items():
        wanted = "--" + dest.replace("_", "-")
        assert found <= {wanted, "--no-" + wanted[2:], "-h"}, f"{dest} is spelled {found}"
    sizes = {"scales", "flip", "short_side", "long_side", "fit"}
    evaluated = {*sizes, "mode", "window", "stride", "average"}
    for command, shared in (("train cityscapes", evaluated), ("evaluate", evaluated), ("predict", sizes)):
        assert shared <= {action.dest for action in parsers[command]._actions}
    assert not any(name.startswith(("--eval-", "--ms")) and name != "--eval-every" for name in kinds)


def test_a_run_folder_is_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(camvid, tmp_path / "run")
    assert checkpoint_file(str(tmp_path / "run")) == tmp_path / "run" / "last.pt"
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "--checkpoint", str(tmp_path)])
    message = (
        f"--checkpoint: path must be a file, or a run's folder with a last.pt, got the folder '{tmp_path}' without"
    )
    assert message in capsys.readouterr().err
