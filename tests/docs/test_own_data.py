"""The data set that docs/own-data.md shows is whole: it trains, and its checkpoint is evaluated."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ccgpu.train import evaluate, records

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "own-data.md").read_text()
TINY = [
    *("--backbone", "resnet18", "--head-channels", "8", "--crop", "33", "--batch", "2", "--iterations", "2"),
    *("--workers", "0", "--device", "cpu", "--no-tensorboard"),
]


def test_the_data_set_shown_trains_and_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python title=\"ponds.py\"\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "ponds.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("pictures", "labels"):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
        for name in "abc":
            ids = np.kron(generator.integers(0, 4, (5, 7)), np.ones((9, 9))).astype(np.uint8)
            picture = np.stack([60 * ids, 255 - 60 * ids, ids], axis=-1)
            Image.fromarray(picture).save(tmp_path / "data" / split / "pictures" / f"{name}.jpg")
            Image.fromarray(ids).save(tmp_path / "data" / split / "labels" / f"{name}.png")
    import ponds

    assert ponds.main(["--out", str(tmp_path / "nothing")]) == 2  # it draws no pictures of its own
    out = tmp_path / "run"
    assert ponds.main([*TINY, "--data", str(tmp_path / "data"), "--out", str(out)]) == 0
    trained = records.read_records(out / "metrics.jsonl")[-1]
    assert list(trained["iou"]) == ["water", "reed", "sky"]
    record = tmp_path / "scores.jsonl"
    flags = ["--checkpoint", str(out / "last.pt"), "--data-set", "ponds", "--workers", "0", "--record", str(record)]
    assert evaluate.main(flags) == 0
    assert records.read_records(record)[0]["matrix"] == trained["matrix"]
