"""The table of errors: its units, its text, merging tables, and that pytest prints it."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import error_table
from tests.ccgpu.problems import Problem, attend_plainly, check_errors, row_of, truth_in_float64
from tests.ccgpu.stage_problems import record
from tests.error_table import ErrorTable, Row, in_units

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"out": 2, "dq": 3}
NUMBERS = st.floats(0, 1e6)
RECORDS = st.lists(
    st.tuples(
        st.builds(Row, st.sampled_from(["cpu", "torch"]), st.sampled_from(["float32", "tf32"]), st.integers(1, 3)),
        st.dictionaries(st.sampled_from(list(LIMITS)), NUMBERS | st.just(math.inf)),
    )
)


def table_of(records):
    table = ErrorTable("cca", LIMITS)
    for row, units in records:
        table.record(row, units)
    return table


@given(error=NUMBERS, plain_error=NUMBERS, floor=st.floats(1e-300, 1e6), limit=st.sampled_from([2, 3]))
def test_within_the_limit_means_within_the_tolerance(error, plain_error, floor, limit):
    allowed = limit * plain_error + floor
    if not math.isclose(error, allowed):  # where rounding may decide
        assert (in_units(error, plain_error, floor, limit) <= limit) == (error <= allowed)


def test_units_of_arrays_are_the_largest_element():
    assert in_units(np.array([1.0, 3.0, 2.0]), 0.5, np.array([1.0, 3.0, 9.0]), 2) == 1.5
    assert in_units(np.empty(0), 0.0, np.empty(0), 2) == 0.0


def test_nan_counts_as_infinity():
    assert in_units(math.nan, 1.0, 1.0, 2) == math.inf
    assert in_units(np.array([0.0, math.nan]), 1.0, np.ones(2), 2) == math.inf
    assert in_units(math.inf, math.inf, 1.0, 2) == math.inf


def test_lines_are_rounded_up_sorted_and_aligned():
    table = ErrorTable("cca", LIMITS)
    table.record(Row("torch", "float32", 2), {"out": 0.5, "dq": 3.0})
    table.record(Row("cpu", "bfloat16", 1), {"out": 2.0004, "dq": 12.0})
    table.record(Row("cpu", "bfloat16", 1), {"out": 1.0, "dq": math.inf})
    table.record(Row("cpu", "bfloat16", 3), {"out": 0.0})
    table.record(Row("cpu", "bfloat16", 2), {"out": 1.4e12, "dq": 0.0001})
    assert table.lines() == [
        "cca",
        "backend  dtype     rank  examples     out    dq",
        "cpu      bfloat16     1         2   2.01!  inf!",
        "cpu      bfloat16     2         1  1e+12!  0.01",
        "cpu      bfloat16     3         1    0.00     -",
        "torch    float32      2         1    0.50  3.00",
    ]
    assert ErrorTable("cca", LIMITS).lines() == []


@given(first=RECORDS, second=RECORDS)
def test_merged_tables_are_the_table_of_both(first, second):
    table = table_of(first)
    table.merge(table_of(second).contents())
    assert table.lines() == table_of(first + second).lines()


def test_unknown_column_is_refused():
    with pytest.raises(AssertionError):
        ErrorTable("cca", LIMITS).record(Row("cpu", "float32", 1), {"lse": 1.0})


@pytest.fixture
def tables(monkeypatch):
    """The module with empty tables instead of the session's."""
    for name in ("CCA", "STAGES"):
        table = getattr(error_table, name)
        monkeypatch.setattr(error_table, name, ErrorTable(table.title, table.limits))
    return error_table


@pytest.fixture
def problem():
    q, k, v, dout = (torch.randn(1, n, 3, 4, generator=torch.Generator().manual_seed(n)) for n in (2, 2, 5, 5))
    return Problem((q, k, v), dout, torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0)), 1.0)


def test_check_records_right_and_wrong_results(tables, problem):
    truth, plain = truth_in_float64(problem), attend_plainly(problem)
    check_errors(plain, plain, truth, problem, row=row_of(problem, "right"))
    wrong = (*plain[:3], plain[3] + 1, plain[4])
    with pytest.raises(AssertionError, match=r"^dk: "):
        check_errors(wrong, plain, truth, problem, row=row_of(problem, "wrong", "tf32"))
    lost = (plain[0] * math.nan, *plain[1:])
    with pytest.raises(AssertionError, match=r"^out: "):
        check_errors(lost, plain, truth, problem, row=row_of(problem, "wrong", "tf32"))
    assert not any("!" in cell for cell in tables.CCA.lines()[2].split())
    *name, out, lse, dq, dk, dv = tables.CCA.lines()[3].split()
    assert name == ["wrong", "tf32", "2", "2"]
    assert [cell.endswith("!") for cell in (out, lse, dq, dk, dv)] == [True, False, False, True, False]
    assert out == "inf!"


def test_check_without_a_row_records_nothing(tables, problem):
    plain = attend_plainly(problem)
    check_errors(plain, plain, truth_in_float64(problem), problem)
    assert tables.CCA.lines() == []


def test_stage_records_before_it_raises(tables):
    with pytest.raises(AssertionError, match=r"^dv: 3\.1 units"):
        record("cpu", torch.zeros(1, 1, 5), "aggregate", 1.5, {"dweights": 0.2, "dv": 3.1})
    assert tables.STAGES.lines()[2].split() == ["cpu", "float32", "1", "1", "-", "-", "1.50", "3.10!", "-", "-"]


@pytest.mark.parametrize("workers", [0, 2])
def test_pytest_prints_the_table(workers):
    """With pytest-xdist, it has the rows of every worker."""
    options = []
    if workers:
        pytest.importorskip("xdist")
        options = ["-n", str(workers)]
    path = "tests/ccgpu/test_ops.py"
    chosen = [f"{path}::test_cca_matches_reference[{backend}-float64-1D]" for backend in ("cpu", "torch")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *chosen]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    rows = [line.split()[:4] for line in result.stdout.splitlines() if " float64 " in line]
    assert rows == [["cpu", "float64", "1", "20"], ["torch", "float64", "1", "20"]]
    assert error_table.HEADING in result.stdout
