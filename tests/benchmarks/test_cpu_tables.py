"""The tables of a CPU's suite: what they say of rows, and that the pages say what the record says."""

import pytest

from benchmarks import cpu_tables, results_file
from benchmarks.cpu_tables import BLOCKS, MARKED, PAGES, RECORD, ROOT, newest, written

COMMAND = "python -m benchmarks.cca --suite --record"
TIMES = {
    "ccgpu": 2.0,
    "ccgpu numba_cpu": 2.0,
    "ccgpu cpu": 4.0,
    "batched products": 5.0,
    "authors' bmm": 8.0,
    "mmcv's einsum": 6.0,
}


def row(name, step, ms, shape="1x97x97", dtype="float32", layout="NCHW", **more):
    run = {"date": "2026-01-02T03:04:05+00:00", "commit": "0123456789", "device": "a CPU", "torch": "2", **more}
    case = {"shape": shape, "dtype": dtype, "layout": layout, "name": name, "pass": step}
    columns = {"floor_ms": "1.5", "temporaries_mb": "0.25", "median_ms": str(ms), "command": COMMAND}
    return {**columns, **case, **run}


def rows(**more):
    last = row("ccgpu numba_cpu", "compile", 5200, **{**more, "shape": "", "layout": ""})
    return [last] + [
        row(name, step, ms * factor * wider, layout=layout, **more)
        for name, ms in TIMES.items()
        for step, factor in zip(cpu_tables.STEPS, (1, 3), strict=True)
        for layout, wider in (("channels_last", 1), ("NCHW", 1.5 if name.startswith("ccgpu") else 2))
    ]


def test_ours_stands_beside_the_best_peer_in_the_same_dtype_and_layout():
    slow = row("ccgpu", "forward", 1234.5, dtype="float16", layout="channels_last")
    run = newest([*rows(), *rows(dtype="bfloat16", shape="1x4x4"), slow])
    assert run.best_peer("1x97x97", "float32", "NCHW", "forward") == (10.0, "batched products")
    lines = cpu_tables.peers_table(run, "float32").splitlines()
    assert lines[2] == (
        "| 97x97 | 1.50 / 1.50 | 2.00 / 6.00 | 5.00 b / 15.0 b | 0.40 / 0.40 "
        "| 3.00 / 9.00 | 10.0 b / 30.0 b | 0.30 / 0.30 |"
    )
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert "| 97x97 | 1.50 / - | 1234 / - | - / - | - / - |" in cpu_tables.peers_table(run, "float16")
    assert cpu_tables.peers_block(run).count("| floor |") == 3  # a table for each dtype that was measured


def test_compiled_peers_are_peers_and_marked():
    compiled = row("batched products, compiled", "forward", 4.0, layout="channels_last")
    assert "| 4.00 b* / 15.0 b | 0.50 / 0.40 |" in cpu_tables.peers_table(newest([*rows(), compiled]), "float32")


def test_the_choice_is_judged_by_one_backends_time_over_the_others():
    block = cpu_tables.choice_block(newest([*rows(), *rows(shape="1x1x1000"), *rows(shape="1x4x4", dtype="float64")]))
    assert block.splitlines() == [
        "| map | float32, channels_last | float32, NCHW | float64, channels_last | float64, NCHW |",
        "|---|---|---|---|---|",
        "| 97x97 | 0.50 / 0.50 | 0.50 / 0.50 | - / - | - / - |",
        "| 1x1000 | 0.50 / 0.50 | 0.50 / 0.50 | - / - | - / - |",
        "| 4x4 | - / - | - / - | 0.50 / 0.50 | 0.50 / 0.50 |",
    ]


def test_formulations_are_relative_to_the_authors_on_nchw_tensors():
    block = cpu_tables.formulations_block(newest(rows()))
    assert "| **ccgpu, channels_last** | **0.12** | **0.12** | 0.2 | 0.2 |" in block
    assert "| authors' bmm, NCHW | 1.00 | 1.00 | 0.2 | 0.2 |" in block


def test_seconds_of_compilation_stand_by_dtype():
    compiled = row("ccgpu numba_cpu", "compile", 9960, "", "x", "")
    assert cpu_tables.compile_block(newest([*rows(), compiled])).splitlines() == [
        "| kernels of | float32 | x |",
        "|---|---|---|",
        "| seconds | 5.2 | 10.0 |",
    ]


def test_the_newest_whole_run_counts():
    later = rows(date="2026-01-03T00:00:00+00:00")
    part = [{**r, "command": f"{COMMAND} --dtype float32"} for r in rows(date="2026-01-04T00:00:00+00:00")]
    single = [{**r, "command": "python -m benchmarks.cca --record"} for r in rows(date="2026-01-05T00:00:00+00:00")]
    ended = [r for r in rows(date="2026-01-06T00:00:00+00:00") if r["pass"] != "compile"]
    assert newest([*later, *rows(), *part, *single, *ended]).rows == later
    assert newest([*part, *single]) is None


def test_three_digits_of_a_time():
    assert [cpu_tables.number(x) for x in (0.06, 1.234, 12.34, 123.4, None)] == ["0.060", "1.23", "12.3", "123", "-"]


def test_tables_are_written_between_their_comments():
    page = ROOT / "docs" / "a.md"
    text = "before\n\n<!-- measured: shares -->\n\nold\n\n<!-- end of shares -->\n\nafter\n"
    fresh = written(text, newest(rows()), page)
    assert fresh.startswith("before\n\n<!-- measured: shares -->\n\n| time; ")
    assert fresh.endswith("\n\n<!-- end of shares -->\n\nafter\n")
    assert "old" not in fresh
    assert f"`{COMMAND}` on 2026-01-02, 03:04 UTC: a CPU, torch 2, commit 0123456 " in fresh
    assert "([record](../benchmarks/results/cca_cpu.csv))" in fresh
    assert "([record](benchmarks/results/cca_cpu.csv))" in written(text, newest(rows()), ROOT / "README.md")
    assert written(fresh, newest(rows()), page) == fresh


@pytest.mark.parametrize("name", PAGES)
def test_a_page_says_what_the_record_says(name):
    page = ROOT / name
    text = page.read_text(encoding="utf-8")
    assert MARKED.search(text), "the page has a table of the record"
    assert {found[2] for found in MARKED.finditer(text)} <= BLOCKS.keys()
    run = newest(results_file.read(RECORD))
    assert run is not None, "record one with python -m benchmarks.cca --suite --record"
    assert written(text, run, page) == text, "write it anew with python -m benchmarks.cpu_tables --write"
