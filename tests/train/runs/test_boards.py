"""What a run's TensorBoard files and its run of Weights & Biases hold, after one start and after a resume."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ccgpu.train import cityscapes
from ccgpu.train.runs import boards, records
from ccgpu.train.runs.settings import run as run_settings
from tests.train.training import TINY, run, told

EVERY_STEP = ("--eval-every", "1", "--tensorboard")


def test_tensorboard_holds_gamma_scores_and_attention_maps_of_every_evaluation(tmp_path: Path) -> None:
    lines = run(cityscapes, tmp_path / "run", *EVERY_STEP, "--gamma", "0.5")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    training = [line for line in lines if line["kind"] == "training"]
    evaluation = [line for line in lines if line["kind"] == "evaluation"]
    for name in ("loss", "lr", "gamma", "images_per_second"):
        values = [event.value for event in events.Scalars(f"training/{name}")]
        assert values == pytest.approx([line[name] for line in training])
    assert training[0]["gamma"] != 0.5
    assert training[0]["gamma"] == pytest.approx(0.5, abs=0.1)
    for name in ("miou", "pixel_accuracy", "mean_accuracy"):
        shown = [(event.step, event.value) for event in events.Scalars(f"evaluation/{name}")]
        assert shown == [(line["iteration"], pytest.approx(line[name])) for line in evaluation]
    maps = [name for name in events.Tags()["images"] if name.startswith("attention/")]
    assert sorted(maps) == ["attention/pixel_16_72", "attention/pixel_32_48", "attention/pixel_48_24"]
    for name in maps:
        first, second = events.Images(name)
        assert (first.width, first.height) == (96, 64)
        assert [first.step, second.step] == [1, 2]
        assert first.encoded_image_string != second.encoded_image_string, "the map changes with training"


@pytest.mark.parametrize("flags", [("--context", "none"), ("--context", "nonlocal")])
def test_heads_without_criss_cross_attention_have_no_maps(flags: tuple[str, ...], tmp_path: Path) -> None:
    lines = run(cityscapes, tmp_path / "run", *EVERY_STEP, *flags)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert not [name for name in events.Tags()["images"] if name.startswith("attention/")]
    assert all(("gamma" in line) == (flags[1] == "nonlocal") for line in lines if line["kind"] == "training")


def test_weights_and_biases_must_be_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(run_settings.importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name))
    assert cityscapes.main([*TINY, "--wandb", "--out", str(tmp_path / "run")]) == 2
    assert 'pip install "ccgpu[wandb]"' in told(capsys, "train")
    assert not (tmp_path / "run").exists()


class Recorder:
    """Stands for the package wandb: notes what a run of it is told."""

    class Error(Exception):
        pass

    class Settings:
        def __init__(self, **values: Any) -> None:
            self.values = values

    class Image:
        def __init__(self, pixels: np.ndarray) -> None:
            self.shape = pixels.shape

    def __init__(self) -> None:
        self.starts: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.exits: list[int] = []
        self.id = ""

    def init(self, **arguments: Any) -> Recorder:
        self.starts.append(arguments)
        self.id = arguments["id"] or f"made{len(self.starts)}"
        return self

    def define_metric(self, name: str, *, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "iteration")

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def finish(self, *, exit_code: int) -> None:
        self.exits.append(exit_code)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)  # type: ignore[arg-type]
    found = importlib.util.find_spec
    monkeypatch.setattr(
        run_settings.importlib.util, "find_spec", lambda name: object() if name == "wandb" else found(name)
    )
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return recorder


def test_weights_and_biases_get_what_tensorboard_gets_and_a_resume_goes_on(wandb: Recorder, tmp_path: Path) -> None:
    out = tmp_path / "run"
    lines = run(cityscapes, out, *EVERY_STEP, "--wandb")
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    for name in events.Tags()["scalars"]:
        rows = [(row["iteration"], row[name]) for row in wandb.rows if name in row]
        assert rows == [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]
    for name in events.Tags()["images"]:
        rows = [(row["iteration"], *row[name].shape) for row in wandb.rows if name in row]
        assert rows == [(event.step, event.height, event.width, 3) for event in events.Images(name)]
    (start,) = wandb.starts
    assert (start["project"], start["name"], start["id"], start["resume"]) == ("ccgpu", "run", None, None)
    assert start["dir"] == str(out)
    assert start["config"]["iterations"] == 2
    assert wandb.exits == [0]
    assert len([line for line in lines if line["kind"] == "evaluation"]) == 2

    (out / "metrics.jsonl").write_text("")
    assert cityscapes.main(["--resume", "--out", str(out)]) == 0
    assert (wandb.starts[1]["id"], wandb.starts[1]["resume"]) == ("made1", "allow")
    assert (out / boards.WANDB_ID).read_text() == "made1\n"
    assert [row["iteration"] for row in wandb.rows if "evaluation/miou" in row] == [1, 2, 2]
    assert cityscapes.main(["--resume", "--no-wandb", "--out", str(out)]) == 0
    assert len(wandb.starts) == 2


def test_a_run_that_begins_again_is_another_run_of_weights_and_biases(wandb: Recorder, tmp_path: Path) -> None:
    (tmp_path / boards.WANDB_ID).write_text("old\n")
    boards.WeightsAndBiases(tmp_path, 0, {})
    assert wandb.starts[0]["id"] is None
    assert (tmp_path / boards.WANDB_ID).read_text() == "made1\n"


def test_a_run_that_fails_is_told_as_failed(wandb: Recorder, tmp_path: Path) -> None:
    assert cityscapes.main([*TINY, "--wandb", "--lr", "1e30", "--out", str(tmp_path / "run")]) == 1
    assert wandb.exits == [1]


def test_a_start_that_fails_is_an_error_before_training(
    wandb: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: Any) -> None:
        raise Recorder.Error("api_key not configured\n(no-tty)")

    monkeypatch.setattr(wandb, "init", fail)
    out = tmp_path / "run"
    assert cityscapes.main([*TINY, "--wandb", "--out", str(out)]) == 2
    assert "got api_key not configured (no-tty); run `wandb login`" in told(capsys, "train")
    assert records.read_records(out / "metrics.jsonl") == []
    assert run(cityscapes, out), "the folder has nothing to lose: a run without --wandb begins in it"


def test_the_package_itself_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for iteration in (0, 5):
        board = boards.WeightsAndBiases(tmp_path, iteration, {"lr": 0.1, "crop": (9, 9)})
        board.scalars(iteration + 1, {"training/loss": 1.5})
        board.image(iteration + 1, "evaluation/0", np.zeros((4, 6, 3), dtype=np.uint8))
        board.close(finished=True)
    name = (tmp_path / boards.WANDB_ID).read_text().strip()
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert {file.name for file in files} == {f"run-{name}.wandb"}, "both starts are the same run"
    deadline = time.monotonic() + 60  # a process of the package writes the files, and may close them later
    while not all(file.stat().st_size for file in files) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(file.stat().st_size for file in files)
