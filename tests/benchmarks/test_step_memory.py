"""The flags that save memory do, by what they promise; and docs/own-data.md has the recorded figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import step_memory

ROOT = Path(__file__).resolve().parents[2]


def test_each_flag_saves_what_it_promises(tmp_path: Path) -> None:
    assert step_memory.main(["--record", str(tmp_path / "out"), "--backbone", "resnet18", "--side", "33"]) == 0
    found = json.loads((tmp_path / "out").read_text())["mebibytes"]
    for pieces in (2, 4):
        assert found[f"--accumulate {pieces}"] == pytest.approx(found["none"] / pieces, rel=0.02)
    assert max(found["--freeze backbone"], found["--freeze norms"], found["--recompute"]) < found["none"]


def test_the_page_has_the_recorded_figures() -> None:
    (record,) = map(json.loads, (ROOT / "docs/results/step-memory.jsonl").read_text().splitlines())
    page = (ROOT / "docs/own-data.md").read_text()
    table = page.partition("| flags | MiB |\n")[2].partition("\n\n")[0]
    shown = {}
    for flags, figures in re.findall(r"^\| (.+?) \| ([\d, ]+) \|$", table, re.MULTILINE):
        shown |= dict(zip(flags.replace("`", "").split(", "), map(int, figures.split(", ")), strict=True))
    assert shown == {flags: round(figure) for flags, figure in record["mebibytes"].items()}
