"""The benchmark of exported modules: what it records, and the table of docs/export.md."""

from pathlib import Path

import pytest

from benchmarks import export as benchmark
from ccgpu.train.runs import records

ROOT = Path(__file__).resolve().parents[2]


def test_every_route_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "export.jsonl"
    small = ("--channels", "16", "--shape", "1", "7", "9", "--rounds", "1")
    assert benchmark.main([*small, "--record", str(path)]) == 0
    (record,) = records.read_records(path)
    assert record["threads"] == 1
    assert record["milliseconds"].keys() == record["bytes"].keys() == benchmark.ROUTES.keys()
    assert all(value > 0 for column in ("milliseconds", "bytes") for value in record[column].values())
    assert benchmark.table(record) in capsys.readouterr().out


def test_the_page_shows_the_newest_record() -> None:
    record = records.read_records(ROOT / "docs/results/export.jsonl")[-1]
    assert benchmark.table(record) in (ROOT / "docs/export.md").read_text()
