"""The command that measures crossings of memory: what it records."""

from pathlib import Path

import pytest

from benchmarks import interchange as benchmark
from ccgpu.train.runs import records


def test_every_group_is_measured_or_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "interchange.jsonl"
    assert benchmark.main(["--record", str(path), "--batches", "1"]) == 0
    (record,) = records.read_records(path)
    assert record["kind"] == "interchange"
    assert all(value > 0 for value in record["microseconds"].values())
    assert {"numpy_view", "from_numpy", "address", "from_any_numpy", "from_exporter"} <= set(record["microseconds"])
    assert set(record["unmeasured"]) <= {"simulator", "Numba", "CuPy"}
    assert all(record["unmeasured"].values())
    assert {"commit", "device", "versions"} <= set(record)
    assert "numpy_view" in capsys.readouterr().out
