"""Times from numbers that are counted, at the rates that are assumed; tables and record."""

import csv
import io

import pytest

from benchmarks.counts import CHANNELS, DEPTH, IMAGES, Item, N
from benchmarks.limits import __main__ as command
from benchmarks.limits import table
from benchmarks.limits.gpus import H100
from benchmarks.limits.issue import Issued
from benchmarks.limits.l2 import simulate
from benchmarks.limits.times import parts_of, times
from ccgpu.kernels.cuda.plans import plan

LINES = IMAGES * N
CLOCKS = 132 * 1.755e9


def item(kernel, phase, **numbers):
    values = dict.fromkeys(Item._fields, 0) | {"passes": 1} | numbers
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


def test_a_pass_has_an_item_for_each_line():
    counted = {"bytes_read": 1000, "matrix_multiplies": 400, "copy_wavefronts": 30}
    issued = dict.fromkeys(("first", "later"), Issued(5000, 4000, {}))
    once, twice = (
        times(*(item("forward", phase, passes=n, **counted) for phase in ("first", "later")), issued) for n in (1, 2)
    )
    for name in ("l2_us", "shared_us", "products_us", "issue_us", "instructions_least"):
        assert getattr(twice, name) == pytest.approx(2 * getattr(once, name))
    assert (once.passes, twice.passes) == (1, 2)
    assert twice.least_mb == once.least_mb == pytest.approx(IMAGES * N * N * (2 * (2 * DEPTH + 2 * CHANNELS) + 4) / 1e6)
    assert twice.dram_mb < once.least_mb * 1.1


@pytest.mark.parametrize("passes", [1, 2])
def test_parts_of_the_hot_case(passes):
    """112 rows of a line of 97: energies twice in each pass, values once."""
    launches = plan("forward", "bf16", 1, (N, N), DEPTH, CHANNELS, H100.limits, cuts=1, passes=passes)
    traffic = simulate(launches, H100.l2_bytes, [396])
    parts = parts_of(launches, traffic)
    products = 2 * N * 112 * 112 * (2 * DEPTH * passes + CHANNELS) / (16 * 8 * 16)
    assert parts.products == pytest.approx(products * 6.26 / 4 / CLOCKS * 1e6)
    assert parts.dram == pytest.approx(traffic.dram / 3e6)
    assert parts.l2 == pytest.approx(traffic.asked / 5.5e6)
    assert parts.largest == max(parts)


def test_record_and_table(affinity, tmp_path):
    table.write([affinity], tmp_path / "limits.csv")
    (row,) = csv.DictReader(io.StringIO((tmp_path / "limits.csv").read_text()))
    assert row["kernel"] == "affinity"
    assert row["instructions_most"] == str(LINES * 11000)
    assert float(row["largest_us"]) == pytest.approx(affinity.dram_us, abs=0.01)
    header, _, line = table.limits_table([affinity]).splitlines()
    assert header.count("|") == line.count("|") == 12
    assert line.startswith(f"| affinity, bf16 | 1 | {affinity.dram_mb:.0f} ({affinity.least_mb:.0f}) |")


def test_command_refuses_what_it_cannot_do(capsys):
    with pytest.raises(SystemExit):
        command.main(["dran"])
    assert "sections must be of limits, dram, passes, ticks, got dran" in capsys.readouterr().err
    for words in (["dram", "--write"], ["--write", "--lag", "1"], ["--write", "--arithmetic", "bf16"]):
        with pytest.raises(SystemExit):
            command.main(words)
        assert "leave out the other options" in capsys.readouterr().err
