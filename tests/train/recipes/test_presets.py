"""Every preset of every dataset trains: a step on synthetic images, with the smallest sizes."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ccgpu.train import command
from ccgpu.train.runs import records
from ccgpu.train.runs.settings.training import Settings
from tests.train.training import COMMANDS, TINY, name_of

PRESETS = [(module, name) for module in COMMANDS for name in module.DATASET.presets if name not in ("demo", "paper")]
"""All but the demos and the recipes, which are run elsewhere."""


def smallest(settings: Settings) -> dict[str, tuple[Any, ...]]:
    """The flags, and their values, that shrink a preset's sizes to those of the images of TINY."""
    flags: dict[str, tuple[Any, ...]] = {"--iterations": (1,), "--mode": (settings.mode,)}
    if settings.auxiliary_channels is not None:
        flags["--auxiliary-channels"] = (8,)
    if settings.random_short_sides:
        flags["--random-short-sides"] = (48,)
    if settings.random_long_side is not None:
        flags["--random-long-side"] = (80,)
    if settings.short_side is not None:
        flags["--short-side"] = (48,)
    if settings.long_side is not None:
        flags["--long-side"] = (80,)
    if settings.mode == "sliding":
        flags |= {"--window": (33, 33), "--stride": (25, 25)}
    return flags


@pytest.mark.parametrize(("module", "name"), PRESETS, ids=[f"{name_of(module)}-{name}" for module, name in PRESETS])
def test_a_preset_trains_with_its_settings(
    module: ModuleType, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = Settings(**command.presets(module.DATASET)[name])
    flags = smallest(preset)
    words = [str(word) for flag, values in flags.items() for word in (flag, *values)]
    assert module.main([*TINY, *words, "--preset", name, "--out", str(tmp_path)]) == 0
    found = records.read_records(tmp_path / "metrics.jsonl")
    assert [line["kind"] for line in found] == ["training", "evaluation"]
    saved = records.read_settings(tmp_path)
    given = {flag[2:].replace("-", "_") for flag in [*flags, *TINY] if flag.startswith("--")} | {"tensorboard"}
    kept = {key: value for key, value in vars(preset).items() if key not in given | {"preset"}}
    assert {key: tuple(saved[key]) if isinstance(saved[key], list) else saved[key] for key in kept} == kept
    assert saved["preset"] == name
    rows, columns = preset.crop
    departing = f"batch 2 and crop 33x41 depart from the preset {name} ({preset.batch} and {rows}x{columns})"
    assert departing in capsys.readouterr().out
