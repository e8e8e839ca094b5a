"""docs/coming-from.md: its code runs with the libraries that are installed, and its tables name flags that exist."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import re
import shlex
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ccgpu.models.ccnet import CCNet
from ccgpu.train.__main__ import main
from ccgpu.train.command import presets
from ccgpu.train.dataset import find_dataset
from ccgpu.train.runs.flags import add_flags, combine
from ccgpu.train.runs.settings.training import Settings, check_settings
from tests.docs.reader import ROOT, Block, Reader, blocks
from tests.models.openmmlab import openmmlab
from tests.torchvision_operators import import_torchvision

PAGE = ROOT / "docs" / "coming-from.md"
TEXT = PAGE.read_text(encoding="utf-8")
# Heading of a section with code -> the packages that it imports.
SECTIONS = {
    "A drop-in replacement for the attention module": (),
    "Behind mmsegmentation's CCHead": ("mmcv", "mmseg"),
    "segmentation_models_pytorch": ("torchvision", "timm", "segmentation_models_pytorch"),
    "timm": ("torchvision", "timm"),
    "Mask R-CNN of torchvision": ("torchvision",),
    "torch.hub": (),
}


def code() -> dict[str, list[Block]]:
    """The blocks of each section."""
    headings = [(TEXT.count("\n", 0, found.start()) + 1, found[1]) for found in re.finditer(r"^## (.*)$", TEXT, re.M)]
    sections: dict[str, list[Block]] = {}
    for block in blocks(PAGE):
        _, heading = max(entry for entry in headings if entry[0] < block.line)
        sections.setdefault(heading, []).append(block)
    return sections


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """A reader in a folder of their own, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Reader(lambda name: tmp_path / name)
    for block in blocks(PAGE):
        sys.modules.pop(block.title.removesuffix(".py"), None)


def test_every_section_with_code_is_run() -> None:
    assert code().keys() == SECTIONS.keys()


@pytest.mark.parametrize("heading", [heading for heading, packages in SECTIONS.items() if "mmcv" not in packages])
def test_the_code_of_a_section_runs(heading: str, reader: Reader) -> None:
    packages = SECTIONS[heading]
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    if "torchvision" in packages:
        import_torchvision()
    for block in code()[heading]:
        reader.follow(block)


def registration() -> tuple[Block, Block, Block]:
    """The file that registers the attention, the code that uses it, and the file for a mmcv without operators."""
    registered, used, operators = code()["Behind mmsegmentation's CCHead"]
    assert (registered.title, used.title, operators.title) == ("criss_cross.py", "", "mmcv_ops.py")
    lines = [line for line in registered.text.splitlines() if line]
    assert len(lines) == 3, "the page says three lines"
    return registered, used, operators


def test_the_registration_works_with_mmcvs_operators(reader: Reader, tmp_path: Path) -> None:
    registered, used, _ = registration()
    with openmmlab(tmp_path / "packages", operators=True):
        reader.follow(registered)
        reader.follow(used)
    assert reader.names["logits"].shape == (1, 19, 17, 33)


def test_the_registration_works_without_mmcvs_operators(reader: Reader, tmp_path: Path) -> None:
    _, used, operators = registration()
    with openmmlab(tmp_path / "packages", operators=False):
        reader.follow(operators)
        Path("criss_cross.py").write_text("import mmcv_ops\nimport mmseg.models\n")
        reader.follow(used)
    assert reader.names["logits"].shape == (1, 19, 17, 33)


def test_the_page_says_what_runs_in_mmsegmentation_itself(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("mmseg") is None:
        pytest.skip("mmsegmentation is not installed")
    registered, used, operators = registration()
    import_torchvision()
    try:
        importlib.import_module("mmcv.ops")
    except ModuleNotFoundError:
        monkeypatch.setitem(sys.modules, "mmcv.ops", ModuleType("mmcv.ops"))
        reader.follow(operators)
        importlib.import_module("mmcv_ops")
    reader.follow(registered)
    reader.follow(used)
    assert reader.names["logits"].shape == (1, 19, 17, 33)


# The tables


def rows() -> list[tuple[str, str, list[str]]]:
    """Header of the second column, second cell and spans of code in it, of every row of every table."""
    found, header = [], ""
    for line in TEXT.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] if line.startswith("|") else []
        if not cells:
            header = ""
        elif not header:
            header = cells[1]
        elif set(cells[0]) - set("-:"):
            found.append((header, cells[1], re.findall(r"`([^`]+)`", cells[1])))
    return found


def spans(command: str) -> list[str]:
    """The spans of code in the columns of a command, such as "evaluate"."""
    return [span for header, _, found in rows() if f"`ccgpu {command}" in header for span in found]


def known_flags(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> set[str]:
    with contextlib.suppress(SystemExit):
        main([*arguments, "--help"])
    return set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))


@pytest.mark.parametrize(("command", "least"), [("train", 70), ("evaluate", 7)])
def test_every_flag_of_ours_exists(command: str, least: int, capsys: pytest.CaptureFixture[str]) -> None:
    flags = re.findall(r"--[\w-]+", " ".join(spans(command)))
    assert len(flags) >= least
    assert {*flags} <= known_flags([command, "cityscapes"] if command == "train" else [command], capsys)


def parsed(dataset: str, flags: str) -> dict[str, object]:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_flags(parser, Settings, find_dataset(dataset).recipe)
    return vars(parser.parse_args(shlex.split(flags)))


def test_flags_with_values_are_accepted() -> None:
    given = [span for span in spans("train") if re.match(r"--[\w-]+ ", span)]
    assert len(given) >= 25
    for flags in given:
        parsed("cityscapes", flags)


def test_the_trainings_of_the_configs_can_begin() -> None:
    commands = re.findall(r"`ccgpu train (\w+) (--preset [^`]*)`", TEXT)
    assert len(commands) == 4
    for name, flags in commands:
        dataset, given = find_dataset(name), parsed(name, flags)
        settings = combine(Settings, preset=presets(dataset)[given.get("preset")], saved=None, flags=given)
        check_settings(settings, dataset, 1, torch.device("cpu"))


def test_every_argument_of_ours_exists() -> None:
    arguments = [span for header, _, found in rows() if header == "`CCNet`" for span in found]
    names = {argument.partition("=")[0] for argument in arguments}
    assert len(names) >= 5
    assert names <= inspect.signature(CCNet).parameters.keys()


def test_what_a_flag_sets_is_what_the_page_says() -> None:
    """The pairs of theirs and ours that are the same number on both sides."""
    pairs = re.findall(r"^\| `--[\w-]+ ([\d.e-]+)` \| `(--[\w-]+) ([\d.e-]+)` \|", TEXT, re.M)
    assert len(pairs) >= 4
    assert all(theirs == ours for theirs, _, ours in pairs)
