"""Runs with all flags of the optimisation: what they leave, and that a resumed one ends like a whole one."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ccgpu.models.ccnet import CCNet
from ccgpu.train import camvid, evaluate
from ccgpu.train.runs import records
from tests.train import narrow
from tests.train.training import TINY, run

FLAGS = [
    *("--optimiser", "adamw", "--lr", "1e-3", "--schedule", "cosine", "--min-lr", "1e-4", "--warmup-steps", "2"),
    *("--head-lr", "4", "--accumulate", "2", "--clip-gradients", "0.5", "--ema", "0.3", "--context", "none"),
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a backbone's weights whose norms have statistics, scale and shift of their own."""
    path = tmp_path_factory.mktemp("weights") / "backbone.pth"
    torch.manual_seed(3)
    state = narrow.build(narrow.NARROW).state_dict()
    for value in norms_of(state).values():
        if value.is_floating_point():
            value += 0.2 * torch.rand_like(value)
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def whole(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run with frozen norms."""
    out = tmp_path_factory.mktemp("optimisation") / "run"
    run(camvid, out, *FLAGS, "--imagenet", str(weights), "--freeze", "norms")
    return out


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def norms_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the entries of the backbone's batch norms: all of a layer with statistics."""
    layers = {name.rsplit(".", 1)[0] for name in state if name.endswith("running_mean")}
    return {name: value for name, value in state.items() if name.rsplit(".", 1)[0] in layers}


def test_rates_follow_the_schedule_and_its_factor(whole: Path) -> None:
    lines = records.read_records(whole / records.METRICS)
    rates = [line["lr"] for line in lines if line["kind"] == "training"]
    assert rates == pytest.approx([1e-3 / 2, 1e-4 + 9e-4 / 2])  # (1 + cos(pi i / 2)) / 2 is 1, then 1/2
    groups = read(whole / "last.pt")["optimiser"]["param_groups"]
    assert [(group["lr_factor"], group["lr"] / rates[-1]) for group in groups] == [(1, 1), (4, pytest.approx(4))]


def test_frozen_norms_are_those_of_the_file(whole: Path, weights: Path) -> None:
    saved = {name.removeprefix("backbone."): value for name, value in read(whole / "last.pt")["model"].items()}
    norms = norms_of(read(weights))
    assert len(norms) > 50
    for name, value in norms.items():
        assert torch.equal(saved[name], value), name
    learned = [name for name, value in read(weights).items() if name not in norms and torch.equal(saved[name], value)]
    assert learned == []


def test_a_run_resumed_in_its_middle_ends_bit_for_bit_like_a_whole_one(
    whole: Path, weights: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert camvid.main(["--resume", str(whole / "previous.pt"), "--out", str(out), "--device", "cpu"]) == 0
    one, other = read(whole / "last.pt"), read(out / "last.pt")
    assert one["iteration"] == other["iteration"] == 2
    for part in ("model", "average"):
        for name, value in one[part].items():
            assert torch.equal(value, other[part][name]), name
    assert one["optimiser"]["state"].keys() == other["optimiser"]["state"].keys()
    for index, state in one["optimiser"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, other["optimiser"]["state"][index][name]), (index, name)
    ends = [records.read_records(folder / records.METRICS)[-1] for folder in (whole, out)]
    assert ends[0] == ends[1]


def test_the_averaged_weights_are_evaluated_and_used(whole: Path, tmp_path: Path) -> None:
    saved, before = (read(whole / name) for name in ("last.pt", "previous.pt"))
    keep = (1 + 1) / (10 + 1)  # of the second step, less than the decay
    used = CCNet.from_checkpoint(whole).state_dict()
    for name, value in saved["average"].items():
        if value.is_floating_point():
            expected = keep * before["average"][name] + (1 - keep) * saved["model"][name]
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7, msg=name)
        assert torch.equal(used[name], value), name
    assert not torch.equal(saved["average"]["backbone.conv1.weight"], saved["model"]["backbone.conv1.weight"])
    record = tmp_path / "scores.jsonl"
    assert evaluate.main(["--checkpoint", str(whole), "--workers", "0", "--record", str(record)]) == 0
    last = records.read_records(whole / records.METRICS)[-1]
    assert records.read_records(record)[0]["matrix"] == last["matrix"]


def test_a_frozen_backbone_is_that_of_the_file(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ["--imagenet", str(weights), "--freeze", "backbone", "--context", "none", "--iterations", "1"]
    assert camvid.main([*TINY, *flags, "--out", str(out)]) == 0
    saved = read(out / "last.pt")
    assert saved["average"] is None
    for name, value in read(weights).items():
        assert torch.equal(saved["model"][f"backbone.{name}"], value), name
    assert len(saved["optimiser"]["param_groups"]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved.update(average=None), "averaged weights for a run with --ema alone, got none"),
        (lambda saved: saved.update(average=3), "got average of type int"),
        (lambda saved: saved["average"].popitem(), "must hold this network, got 1 difference"),
        (
            lambda saved: next(iter(saved["average"].values())).fill_(torch.nan),
            r"must hold finite weights, got backbone\.\S+ has \d+ of \d+ values NaN",
        ),
    ],
)
def test_broken_averages_are_told(
    whole: Path, tmp_path: Path, change: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = read(whole / "last.pt")
    change(saved)
    path = tmp_path / "last.pt"
    torch.save(saved, path)
    assert camvid.main(["--resume", str(path), "--out", str(tmp_path / "other"), "--device", "cpu"]) in (1, 2)
    assert re.search(message, capsys.readouterr().err)
