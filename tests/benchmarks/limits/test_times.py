"""Times from numbers that are counted, at the rates that are assumed; tables and record."""

import csv
import io

import pytest

from benchmarks.counts import CHANNELS, DEPTH, IMAGES, Item, N
from benchmarks.limits import __main__ as command
from benchmarks.limits import table
from benchmarks.limits.issue import Issued
from benchmarks.limits.times import times

LINES = IMAGES * N
CLOCKS = 132 * 1.755e9


def item(kernel, phase, **numbers):
    values = dict.fromkeys(Item._fields, 0) | numbers
    return Item(**values | {"kernel": kernel, "arithmetic": "bf16", "phase": phase, "entry": "cca"})


@pytest.fixture
def affinity():
    counted = {"bytes_read": 1000, "bytes_written": 500, "matrix_multiplies": 400, "load_wavefronts": 30}
    issued = {"first": Issued(5000, 4000, {}), "later": Issued(6000, 4500, {})}
    return times(item("affinity", "first", **counted), item("affinity", "later", **counted), issued)


def test_times_follow_from_the_counts(affinity):
    least = IMAGES * N * N * (2 * DEPTH * 2 + (2 * N - 1) * 4)
    assert affinity.least_mb == affinity.dram_mb == pytest.approx(least / 1e6)
    assert affinity.dram_us == pytest.approx(least / 3e6)
    assert affinity.l2_us == pytest.approx(LINES * 3000 / 5.5e6)
    assert affinity.shared_us == pytest.approx(LINES * 60 / CLOCKS * 1e6)
    assert affinity.products_us == pytest.approx(LINES * 800 * 6.26 / 4 / CLOCKS * 1e6)
    assert affinity.issue_us == pytest.approx(LINES * 11000 / 4 / CLOCKS * 1e6)
    assert affinity.instructions_least == LINES * 8500
    assert affinity.largest == affinity.dram_us
    assert affinity.sum == pytest.approx(sum(affinity[-5:]))


def test_multiply_adds_are_the_products_where_there_are_no_matrix_units():
    got = times(item("aggregate", "first", multiply_adds=10**6), item("aggregate", "later", multiply_adds=10**6), {})
    assert got.least_mb == pytest.approx(IMAGES * N * N * (2 * CHANNELS * 2 + (2 * N - 1) * 4) / 1e6)
    assert got.products_us == pytest.approx(LINES * 2e6 / 128 / CLOCKS * 1e6)
    assert got.issue_us is None
    assert got.instructions_most is None
    assert got.sum == pytest.approx(got.dram_us + got.products_us)


def test_record_and_table(affinity, tmp_path):
    table.write([affinity], tmp_path / "limits.csv")
    (row,) = csv.DictReader(io.StringIO((tmp_path / "limits.csv").read_text()))
    assert row["kernel"] == "affinity"
    assert row["instructions_most"] == str(LINES * 11000)
    assert float(row["largest_us"]) == pytest.approx(affinity.dram_us, abs=0.01)
    header, _, line = table.limits_table([affinity]).splitlines()
    assert header.count("|") == line.count("|") == 11
    assert line.startswith(f"| affinity, bf16 | {affinity.dram_mb:.0f} ({affinity.least_mb:.0f}) |")


def test_command_refuses_what_it_cannot_do(capsys):
    with pytest.raises(SystemExit):
        command.main(["dran"])
    assert "sections must be of limits, dram, ticks, got dran" in capsys.readouterr().err
    for words in (["dram", "--write"], ["--write", "--lag", "1"], ["--write", "--arithmetic", "bf16"]):
        with pytest.raises(SystemExit):
            command.main(words)
        assert "leave out the other options" in capsys.readouterr().err
