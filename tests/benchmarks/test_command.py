"""`python -m benchmarks.cca`, `.plot` and `.profile_kernels` on the CPU, into a temporary folder."""

import csv
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from benchmarks import cca, cpu_tables, plot, profile_kernels, results_file, run_case
from benchmarks.candidates import Candidate, candidates, ours
from benchmarks.cases import Case
from ccgpu.bridges import numba_cuda
from ccgpu.bridges.cupy_cuda import device

CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--size", "5", "6", "--query-channels", "4", "--channels", "4"]
SMALL += ["--turns", "3", "--threads", "1"]
RATES = {"copy": 1e10, "matrix": 1e11}


@pytest.fixture(autouse=True)
def _same_threads_after():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _quick_rates(monkeypatch):
    monkeypatch.setattr(cca, "rates_of", lambda case, device: RATES)


def rows_of(folder):
    (path,) = folder.glob("*.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_command_measures_and_records(tmp_path, capsys):
    words = [*SMALL, "--without", "compiled", "--out", str(tmp_path), "--commit", "abc"]
    assert cca.main(words) == 0
    rows = rows_of(tmp_path)
    timed = [r for r in rows if r["median_ms"] and not r["pass"].startswith("host")]
    names = {r["name"] for r in timed}
    assert names == {
        "ccgpu",
        "ccgpu numba_cpu",
        "ccgpu cpu",
        "batched products",
        "mmcv's einsum",
        "authors' bmm",
        "SDPA an axis, merged",
        "dense SDPA (non-local)",
    }
    assert {r["pass"] for r in timed} == {"forward", "backward", "forward+backward"}
    for row in timed:
        assert float(row["low_ms"]) <= float(row["median_ms"]) <= float(row["high_ms"])
        assert float(row["temporaries_mb"]) >= 0
        assert row["commit"] == "abc"
        assert row["shape"] == "1x5x6"
        assert str(tmp_path) not in row["command"]
        if row["name"] != "dense SDPA (non-local)":
            assert 0 < float(row["error"]) < 1e-5
        achieved = float(row["minimum_mb"]) / float(row["median_ms"])
        assert float(row["achieved_gb_s"]) == pytest.approx(achieved, rel=0.1, abs=0.1)
    flexes = [r for r in rows if r["name"].startswith("Flex")]
    assert {r["reason"] for r in flexes} == {"it has no backward on a CPU"}
    assert any(r["pass"] == "host, forward" for r in rows)
    assert "authors' bmm, NCHW" in capsys.readouterr().out


def test_a_cpus_suite_is_recorded_and_prints_its_tables(tmp_path, monkeypatch, capsys):
    cases = [Case(1, (5, 6), "float32", 16, 32), Case(1, (1, 7), "bfloat16", 16, 32)]
    monkeypatch.setattr(cca, "cpu_suite", lambda: cases)
    monkeypatch.setattr(cca, "compile_seconds", {"float32": 5.25, "bfloat16": 7.5}.get)
    words = ["--device", "cpu", "--suite", "--turns", "3", "--threads", "1", "--out", str(tmp_path)]
    words += ["--without", "compiled"]
    assert cca.main(words) == 0
    rows = rows_of(tmp_path)
    timed = [row for row in rows if row["median_ms"] and row["layout"]]
    assert {(row["shape"], row["dtype"]) for row in timed} == {("1x5x6", "float32"), ("1x1x7", "bfloat16")}
    peers = {"batched products", "mmcv's einsum", "authors' bmm"}
    assert {row["name"] for row in timed} == {"ccgpu", "ccgpu numba_cpu", "ccgpu cpu", *peers}
    assert {row["pass"] for row in timed} == {"forward", "forward+backward"}
    assert [(row["dtype"], row["pass"], row["median_ms"]) for row in rows[-2:]] == [
        ("float32", "compile", "5250.0"),
        ("bfloat16", "compile", "7500.0"),
    ]
    printed = capsys.readouterr().out
    assert "| 5x6 | " in printed
    assert "| 1x7 | " in printed
    assert cpu_tables.newest(rows) is None, "a run that left something out is not whole"
    run = cpu_tables.Run(rows)
    assert 0 < run.share("1x5x6", "float32", "NCHW", "forward") < float("inf")


def test_second_run_adds_rows_and_columns(tmp_path):
    path = tmp_path / "cca_cpu.csv"
    path.write_text("name,old\nearlier,1\n")
    results_file.append(path, [{"name": "later", "new": 2}])
    results_file.append(path, [{"new": 3, "name": "x, y"}])
    assert results_file.read(path) == [
        {"name": "earlier", "old": "1", "new": ""},
        {"name": "later", "old": "", "new": "2"},
        {"name": "x, y", "old": "", "new": "3"},
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_a_device_has_a_file_of_its_own(monkeypatch, tmp_path):
    assert results_file.path_for(CPU, tmp_path).name == "cca_cpu.csv"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    name = results_file.path_for(torch.device("cuda"), tmp_path).name
    assert name == "cca_nvidia-h100-80gb-hbm3.csv"


@pytest.mark.parametrize("words", [["--size", "5"], ["--size", "5", "0"], ["--dtype", "int8"]])
def test_wrong_flags_are_named(words, capsys):
    with pytest.raises(SystemExit):
        cca.main(["--device", "cpu", *words])
    assert words[0] in capsys.readouterr().err


def test_no_time_left_is_a_reason(tmp_path):
    case = Case(1, (4, 4), "float32", 4, 4)
    rows, failed = run_case.measure_case(case, candidates(case, CPU), CPU, RATES, deadline=0.0, say=lambda line: None)
    assert failed == []
    assert any(r["reason"].startswith("no time") for r in rows)
    assert not any("median_ms" in r for r in rows)


def test_ours_are_the_backends_made_for_the_device(monkeypatch):
    case = Case(1, (4, 4), "bfloat16", 4, 4)
    names = ["ccgpu", "ccgpu numba_cpu", "ccgpu cpu"]
    assert [(c.name, c.why_not) for c in ours(case, CPU)] == [(name, None) for name in names]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(device, "_REASONS", {0: "no CuPy"})
    monkeypatch.setattr(numba_cuda, "_REASONS", {0: None})
    monkeypatch.setattr(numba_cuda, "simulated", lambda: False)
    assert [(c.name, c.why_not) for c in ours(case, torch.device("cuda"))] == [
        ("ccgpu cupy", "no CuPy"),
        ("ccgpu numba_cuda", "it has no kernels for torch.bfloat16"),
        ("ccgpu torch", None),
    ]


def wrong(q, k, v):
    return v * (q * k).sum(1, keepdim=True)


def broken(q, k, v):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")


def forward_only(q, k, v):
    if q.requires_grad:
        return v * q.sum(1, keepdim=True) * k.sum(1, keepdim=True)
    raise RuntimeError("only with gradients\nand more")


@pytest.mark.parametrize(
    ("name", "function", "same", "why", "serious"),
    [
        ("peer", wrong, True, "disagrees with float64", True),
        ("peer", broken, True, "out of memory", False),
        ("ccgpu x", broken, True, "out of memory", True),
        ("peer", forward_only, False, "RuntimeError: only with gradients", False),
    ],
)
def test_what_fails_is_a_row_and_the_others_are_measured(name, function, same, why, serious):
    case = Case(1, (4, 4), "float32", 4, 4)
    peer = Candidate(name, lambda: function, layouts=("NCHW",), same_function=same)
    rows, failed = run_case.measure_case(case, [peer, *ours(case, CPU)], CPU, RATES, turns=2, say=lambda line: None)
    assert [why in r["reason"] for r in rows if r["name"] == name and r["reason"]] == [True]
    assert bool(failed) == serious
    assert {r["pass"] for r in rows if r["name"] == "ccgpu numba_cpu"} == {"forward", "backward", "forward+backward"}


def row(name, shape, milliseconds, step="forward+backward", layout="NCHW", reason="", **more):
    sizes = {"device": "a GPU", "D": "64", "C": "512", "dtype": "bfloat16", "temporaries_mb": "1.5"}
    return {
        **sizes,
        **{"name": name, "shape": shape, "pass": step, "layout": layout, "reason": reason},
        **{"median_ms": milliseconds, "share_of_copy": "0.5", **more},
    }


def records():
    shapes = ("1x65x129", "1x97x97", "1x256x256")
    rows = [row(n, s, str(f * i)) for i, s in enumerate(shapes, 1) for n, f in (("ccgpu cupy", 0.1), ("bmm", 1.0))]
    rows += [row(n, "8x97x97", t, step) for n, t in (("ccgpu cupy", "0.2"), ("bmm", "1.0")) for step in plot.STEPS]
    rows += [row("flex", "8x97x97", "", step="", reason="out of memory")]
    return rows


def test_plot_draws_every_implementation(tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib, of the extra dev")
    path = tmp_path / "cca_x.csv"
    results_file.append(path, records())
    assert plot.main([str(path)]) == 0
    drawing = (tmp_path / "cca_x.svg").read_text()
    ElementTree.fromstring(drawing)
    for text in ("ccgpu cupy", "bmm", "97x97", "256x256", "a GPU"):
        assert text in drawing
    assert len(drawing) < 100_000
    plot.main([str(path)])
    assert (tmp_path / "cca_x.svg").read_text() == drawing
    assert plot.main([str(path), "--format", "png"]) == 0
    assert (tmp_path / "cca_x.png").stat().st_size > 10_000


def test_table_gives_times_ours_and_reasons():
    lines = plot.table(records(), "8x97x97", "bfloat16").splitlines()
    assert "| **ccgpu cupy** | 0.200 (1.00x) | 0.200 (1.00x) | 0.200 (1.00x) | 1.5 | 1.5 | 0.5 | 0.5 |" in lines
    assert "| bmm | 1.000 (5.00x) | 1.000 (5.00x) | 1.000 (5.00x) | 1.5 | 1.5 | 0.5 | 0.5 |" in lines
    assert "| flex | out of memory | | | | | | |" in lines
    assert "No times" in plot.table(records(), "8x1x1", "bfloat16")


def test_last_row_counts_and_the_faster_layout():
    rows = [row("bmm", "1x2x2", "3"), row("bmm", "1x2x2", "2"), row("bmm", "1x2x2", "1", layout="channels_last")]
    assert sorted(r["median_ms"] for r in plot.latest(rows)) == ["1", "2"]
    assert plot.fastest(plot.latest(rows))["bmm"]["median_ms"] == "1"
    failed = row("bmm", "1x2x2", "", step="", reason="out of memory")
    assert [r["reason"] for r in plot.latest([rows[0], failed])] == ["out of memory"]
    assert [r["median_ms"] for r in plot.latest([failed, rows[0]])] == ["3"]
    assert plot.latest([{"name": "older file", "median_ms": "1"}]) == []


def test_plot_without_rows_says_so(tmp_path, capsys):
    path = tmp_path / "cca_x.csv"
    results_file.append(path, [row("bmm", "1x2x2", "3")])
    assert plot.main([str(path), "--dtype", "float16"]) == 1
    assert "no rows in float16" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path / "none.csv")])


def test_profile_prints_times(capsys):
    words = ["--device", "cpu", "--size", "4", "5", "--batch", "1", "--query-channels", "4", "--channels", "4"]
    assert profile_kernels.main([*words, "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    assert "ccgpu::cca_backward" in printed


def test_profile_command_counts_inside_only():
    line = profile_kernels.command("/opt/ncu", ["--batch", "1"])
    assert line[0] == "/opt/ncu"
    assert line[line.index("--profile-from-start") + 1] == "off"
    assert line[-4:] == ["benchmarks.profile_kernels", "--counted", "--batch", "1"]
