"""The dataset file that docs/own-data.md shows is complete: it trains, and its checkpoint is evaluated."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ccgpu.train import evaluate
from ccgpu.train.runs import records
from tests.docs.reader import ROOT, blocks
from tests.train.narrow import NARROW

TINY = [
    *("--backbone", NARROW, "--head-channels", "8", "--crop", "33", "--batch", "2", "--iterations", "2"),
    *("--workers", "0", "--device", "cpu", "--no-tensorboard"),
]


def test_the_dataset_shown_trains_and_is_evaluated(
    tmp_path: Path, data: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = (block.text for block in blocks(ROOT / "docs" / "own-data.md") if block.title == "ponds.py")
    (tmp_path / "ponds.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    import ponds

    assert ponds.main(["--out", str(tmp_path / "nothing")]) == 2  # without --data, because it has no synthetic images
    out = tmp_path / "run"
    assert ponds.main([*TINY, "--data", str(data("ponds")), "--out", str(out)]) == 0
    trained = records.read_records(out / "metrics.jsonl")[-1]
    assert list(trained["iou"]) == ["water", "reed", "sky"]
    record = tmp_path / "scores.jsonl"
    flags = ["--checkpoint", str(out / "last.pt"), "--dataset", "ponds", "--workers", "0", "--record", str(record)]
    assert evaluate.main(flags) == 0
    assert records.read_records(record)[0]["matrix"] == trained["matrix"]
