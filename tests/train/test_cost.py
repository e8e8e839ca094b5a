"""ccgpu cost: its numbers equal the paper's FLOPs and memory; the tables; wrong flags. gamma is 0.5."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from ccgpu.models.resnet import ResNet
from ccgpu.train import cost
from ccgpu.train.cost import feature_shape, main
from ccgpu.train.measurement.contexts import (
    CANDIDATES,
    PAPERS_SHAPE,
    Candidate,
    flops,
    measure,
    prepared,
    training_step,
)
from ccgpu.train.measurement.timing import Clock
from ccgpu.train.memory import peak_bytes, saved_bytes

CPU = torch.device("cpu")
CANDIDATE = {candidate.name: candidate for candidate in CANDIDATES}


def saved_mb(name: str) -> float:
    return saved_bytes(*prepared(CANDIDATE[name].build, PAPERS_SHAPE, CPU)) / 1e6


# The paper's numbers


@pytest.mark.parametrize("candidate", [c for c in CANDIDATES if "gflops" in c.paper], ids=lambda c: c.name)
def test_flops_are_those_of_the_paper(candidate: Candidate) -> None:
    """The increments for 769x769; the paper counts multiply and add as two operations, as torch does."""
    assert flops(candidate.build, PAPERS_SHAPE) == pytest.approx(1e9 * candidate.paper["gflops"], rel=0.01)


@pytest.mark.parametrize("recurrence", [1, 2, 3])
def test_flops_of_rcca_are_those_of_the_authors_formula(recurrence: int) -> None:
    """1x1 convolutions with bias, affinity, aggregation; torch leaves out the bias."""
    batch, channels, height, width = PAPERS_SHAPE
    n, length, d = batch * height * width, height + width - 1, channels // 8
    loop = 2 * n * (channels + 1) * (2 * d + channels) + 2 * n * length * d + 2 * n * length * channels
    biases = 2 * n * (2 * d + channels)
    counted = flops(CANDIDATE[f"RCCA R={recurrence}"].build, PAPERS_SHAPE)
    assert counted == pytest.approx(recurrence * (loop - biases), rel=0.005)


def test_both_forms_of_non_local_have_the_same_flops() -> None:
    assert len({flops(CANDIDATE[f"non-local, {form}"].build, PAPERS_SHAPE) for form in ("materialised", "sdpa")}) == 1


def test_the_paper_compares_what_rcca_saves_with_the_peak_of_non_local() -> None:
    two_loops, recomputed = saved_mb("RCCA R=2"), saved_mb("RCCA R=2, recompute")
    assert two_loops == pytest.approx(CANDIDATE["RCCA R=2"].paper["saved_mb"], rel=0.05)
    # Its N x N matrices are nearly all of it, so an eighth of the channels, and of the time, shows it too.
    name, fewer = "non-local, materialised", (1, PAPERS_SHAPE[1] // 8, *PAPERS_SHAPE[2:])
    peak = peak_bytes(training_step(*prepared(CANDIDATE[name].build, fewer, CPU)), CPU)[0] / 1e6
    assert peak == pytest.approx(CANDIDATE[name].paper["peak_mb"], rel=0.05)
    assert peak / two_loops >= 11
    assert peak / recomputed >= 25


@pytest.mark.parametrize("recurrence", [1, 2, 3])
def test_rcca_saves_its_maps(recurrence: int) -> None:
    """Each loop saves x, q, k, v, the attention's output and lse; with recompute x alone."""
    batch, channels, height, width = PAPERS_SHAPE
    position_bytes = 4 * (3 * channels + 2 * channels // 8 + 1)
    positions = batch * height * width
    assert saved_mb(f"RCCA R={recurrence}") == pytest.approx(recurrence * position_bytes * positions / 1e6, rel=1e-3)
    if recurrence == 2:
        assert saved_mb("RCCA R=2, recompute") == pytest.approx(2 * 4 * channels * positions / 1e6, rel=1e-3)


# Measuring


@pytest.mark.parametrize("size", [(769, 769), (1024, 2048), (1, 1), (40, 57)])
@pytest.mark.parametrize("stride", [8, 16, 32])
def test_feature_shape_is_that_of_the_backbone(size: tuple[int, int], stride: int) -> None:
    shape = feature_shape(2, 5, size, stride)
    assert shape[:2] == (2, 5)
    with torch.device("meta"), torch.no_grad():
        assert shape[2:] == ResNet(50, stem="7x7", output_stride=stride).eval()(torch.empty(1, 3, *size))[1].shape[2:]
    if stride == 8:
        assert shape[2:] == tuple((n + 1) // 8 + 1 for n in size)


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda c: c.name)
def test_every_module_is_measured_with_its_attention_at_work(candidate: Candidate) -> None:
    shape = (2, 16, 5, 7)
    module, x = prepared(candidate.build, shape, CPU)
    assert not torch.equal(module(x), x)
    gradients = training_step(module, x)()
    assert [g.shape for g in gradients] == [x.shape, *(p.shape for p in module.parameters())]
    assert all(gradient.any() for gradient in gradients[1:] if gradient.ndim > 1)
    record = measure(candidate.build, shape, Clock(CPU), repeats=1)
    assert record["parameters"] == sum(parameter.numel() for parameter in module.parameters())
    assert all(value > 0 for value in record.values())
    # At least the gradients exist when the peak is over.
    assert record["peak_mb"] * 1e6 >= sum(gradient.nbytes for gradient in gradients)


# The command


def test_command_prints_a_line_and_writes_a_record_for_each_module(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cost.jsonl"
    assert main(["--sizes", "33x49", "--channels", "16", "--repeats", "1", "--json", str(file), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "features 1x16x5x7" in lines[0]
    assert "paper" not in lines[1]
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["module"] for record in records] == [candidate.name for candidate in CANDIDATES]
    for record, line in zip(records, lines[2:], strict=False):
        assert line.startswith(record["module"])
        assert f" {record['parameters']:,} " in line
        assert len(line) == len(lines[1])
        assert record["features"] == [1, 16, 5, 7]
        assert record["image"] == [33, 49]
        assert {"device", "versions", "commit", "threads", "date", "cpu", "dtype", "clock"} <= record.keys()
        assert record["predicted"] == []
        assert all(value > 0 for value in record["foreseen"].values())


def test_maps_are_measured_from_the_smallest_and_what_exceeds_a_limit_is_predicted_and_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cost.jsonl"
    flags = ["--channels", "16", "--repeats", "1", "--json", str(file), "--device", "cpu", "--contexts", "nonlocal"]
    assert main(["--maps", "999x999", "9x9", *flags, "--most-gb", "0.1"]) == 0
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["features"] for record in records] == 2 * [[1, 16, 9, 9]] + 2 * [[1, 16, 999, 999]]
    small, large = records[0], records[2]
    assert small["predicted"] == []
    assert large["predicted"] == ["peak_mb", "forward_ms", "forward_backward_ms"]
    assert "above 0.1 GB (--most-gb)" in large["why"]
    # By the module's own rates at the smaller size.
    rate = small["forward_ms"] / small["gflops"]
    assert large["forward_ms"] == pytest.approx(large["gflops"] * rate)
    assert large["saved_mb"] * 1e6 > 4 * 999**4
    marked = [line for line in capsys.readouterr().out.splitlines() if "~" in line and line.startswith("non-local")]
    assert len(marked) == 2
    assert all(line.count("~") == 3 for line in marked)
    assert main(["--maps", "9x9", *flags, "--most-seconds", "1e-9"]) == 0
    assert "(--most-seconds)" in json.loads(file.read_text().splitlines()[-1])["why"]


def test_networks_have_a_line_for_each_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cost.jsonl"
    flags = ["--channels", "8", "--repeats", "1", "--json", str(file), "--device", "cpu"]
    assert main(["--network", "resnet18", "--sizes", "33x41", *flags]) == 0
    (record,) = (json.loads(line) for line in file.read_text().splitlines())
    assert (record["backbone"], record["context"], record["image"]) == ("resnet18", "rcca", [33, 41])
    lines = capsys.readouterr().out.splitlines()
    for part, milliseconds in record["training_ms"].items():
        (line,) = (line for line in lines if line.startswith(f"{part}  "))
        assert f" {milliseconds:,.1f} (" in line
    assert main(["--network", "resnet18", "--sizes", "33x41", *flags, "--most-gb", "0.001"]) == 0
    left_out = json.loads(file.read_text().splitlines()[-1])
    assert "(--most-gb)" in left_out["why"]
    assert "training_ms" not in left_out
    assert left_out["saved_mb"] == record["saved_mb"]


def test_table_of_the_papers_case_shows_the_papers_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measuring this case takes a minute and is tested above: here it is replaced by fixed numbers."""
    found = dict(zip((key for key, _, _ in cost.COLUMNS), (328_321, 16.46, 125.33, 169.2, 300.04, 900.0), strict=True))
    monkeypatch.setattr(cost, "measure", lambda *arguments: found)
    assert main(["--contexts", "rcca", "nonlocal", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split().count("paper") == 3
    rows = {line[:24].strip(): line[24:].split() for line in lines[2:] if line.startswith(("RCCA", "non-local"))}
    assert rows["RCCA R=2"] == ["328,321", "16.5", "16.5", "125.3", "127", "169.2", "300.0", "900.0"]
    assert rows["non-local, materialised"] == ["328,321", "16.5", "108", "125.3", "169.2", "1411", "300.0", "900.0"]
    assert len(rows) == 6
    assert "1411 MB of the non-local block is a peak" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "0x769"], "cost: --sizes must be from 1 to 32768, got 0x769"),
        (["--sizes", "97x97", f"769x{'9' * 9}"], "cost: --sizes must be from 1 to 32768, got 769x999999999"),
        (["--maps", "0x9"], "cost: --maps must be from 1 to 32768, got 0x9"),
        (["--network", "resnet18", "--sizes", "9x99"], "cost: --sizes must be from 16 to 32768, got 9x99"),
        (["--network", "resnet18", "--maps", "9x99"], "cost: --maps must be left out with --network"),
        (["--network", "resnet18", "--output-stride", "16"], "cost: --output-stride must be left out with --network"),
        (["--network", "resnet18", "--contexts", "psp"], "cost: --batch must be 2 or more to train with psp, got 1"),
        (["--most-gb", "0"], "cost: --most-gb must be above 0, got 0"),
        (["--most-seconds", "nan"], "cost: --most-seconds must be above 0, got nan"),
        (["--channels", "0"], "cost: --channels must be from 1 to 65536, got 0"),
        (["--batch", "-1"], "cost: --batch must be from 1 to 65536, got -1"),
        (["--repeats", "0"], "cost: --repeats must be from 1 to 1000000, got 0"),
        (["--json", "{folder}/none/cost.jsonl"], "cost: .*No such file or directory"),
        (["--json", "{folder}"], "cost: .*Is a directory"),
    ],
)
def test_wrong_values_are_told_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.format(folder=tmp_path) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert re.match(message, captured.err)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--output-stride", "4"],
        ["--contexts", "ocr"],
        ["--sizes", "769"],
        ["--channels", "x"],
        ["--sizes", "9x9", "--maps", "9x9"],
    ],
)
def test_wrong_flags_have_exit_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


def test_processor_time_needs_one_thread(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert main(["--processor-time", "--device", "cpu"]) == 2
    finally:
        torch.set_num_threads(threads)
    assert "--processor-time must come with one thread, got 2; set OMP_NUM_THREADS=1" in capsys.readouterr().err
