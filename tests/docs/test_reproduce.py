"""The trainings of docs/reproduce.md: each preset and each row of its tables is a command that can begin."""

from __future__ import annotations

import argparse
import re
import shlex

import pytest
import torch

from ccgpu.train import command
from ccgpu.train.dataset import find_dataset
from ccgpu.train.runs.flags import add_flags, combine
from ccgpu.train.runs.settings.run import PRESETS
from ccgpu.train.runs.settings.training import Settings, check_settings
from tests.docs.reader import ROOT

TEXT = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")


def trainings() -> list[tuple[str, str]]:
    """The dataset and flags of each inline command, and of each row of a table that names a preset or only flags."""
    found = re.findall(r"`ccgpu train (\w+)([^`]*)`", TEXT)
    for section in re.split(r"^##", TEXT, flags=re.MULTILINE):
        preset, dataset = None, None
        for line in section.splitlines():
            if line.startswith("ccgpu train") and "--resume" not in line:
                words = shlex.split(line)
                preset = words[words.index("--preset") + 1] if "--preset" in words else None
                dataset = words[2]
            row = re.fullmatch(r"\|([^|]*)\| *(?:`(--[^`|]*)`)? *\| *[0-9][^|]*\|.*", line)
            if row is not None and dataset is not None:
                named = re.search(r"`([\w-]+)`", row[1])
                chosen = named[1] if named else preset
                found.append((dataset, f"{'' if chosen is None else f'--preset {chosen}'} {row[2] or ''}"))
    return found


def test_the_tables_have_the_rows_of_the_published_figures() -> None:
    assert len(trainings()) >= 8 + 3 + 8 + 5 + 4
    presets = {flags.split()[1] for _, flags in trainings() if "--preset" in flags}
    assert presets == set(PRESETS), "every preset is on the page"


@pytest.mark.parametrize(("name", "flags"), trainings())
def test_the_command_of_a_row_can_begin(name: str, flags: str) -> None:
    dataset = find_dataset(name)
    parser = argparse.ArgumentParser()
    add_flags(parser, Settings, dataset.recipe)
    given = vars(parser.parse_args(shlex.split(flags)))
    presets = command.presets(dataset)
    settings = combine(Settings, preset=presets[given.get("preset")], saved=None, flags=given)
    check_settings(settings, dataset, 1, torch.device("cpu"))
