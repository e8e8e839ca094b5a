"""How a run starts: what its folder may hold, damaged settings, checkpoints of other runs, failures without any."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ccgpu.train import camvid, engine
from ccgpu.train.runs import checkpoints, records
from ccgpu.train.runs.parser import command_parser
from ccgpu.train.runs.plan import open_run_folder, read_request
from ccgpu.train.runs.settings.training import Settings
from tests.train.training import TINY, told

SMALL = [*TINY, "--context", "none"]


@pytest.fixture
def run_folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def resume(folder: Path, *flags: str) -> int:
    return camvid.main(["--resume", "--out", str(folder), *flags])


def test_another_crop_is_taken_after_a_run_that_came_to_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"

    def fill_the_memory(*_: Any, **__: Any) -> Iterator[engine.Step]:
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")
        yield

    def fail(*flags: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "train", fill_the_memory)
            assert camvid.main([*SMALL, "--out", str(out), "--baselines", *flags]) == 1
        assert "out of memory (tried to allocate 3 GiB); lower --batch or --crop" in told(capsys, "train")

    fail("--crop", "49", "65")
    assert [record["iteration"] for record in records.read_records(out / "metrics.jsonl")] == [0]
    fail("--crop", "41", "65", "--resume")  # free, because nothing was trained with the former one
    assert camvid.main([*SMALL, "--out", str(out), "--crop", "33", "41"]) == 0
    assert records.read_settings(out)["crop"] == [33, 41]  # type: ignore[index]
    lines = records.read_records(out / "metrics.jsonl")
    assert [(line["kind"], line["iteration"]) for line in lines] == [
        ("training", 1),
        ("training", 2),
        ("evaluation", 2),
    ]
    assert camvid.main([*SMALL, "--out", str(out)]) == 2
    assert "--out must be a new or empty folder" in told(capsys, "train")
    assert resume(out, "--crop", "41", "49") == 2
    assert "--crop was 33 41, is 41 49" in told(capsys, "train")


def test_a_checkpoint_that_was_written_meanwhile_is_kept(trained: Path, tmp_path: Path) -> None:
    """Another command may end while this one waits for the folder's lock."""
    out = tmp_path / "run"
    parser = command_parser("camvid", "")
    plan = read_request(parser, [*SMALL, "--out", str(out)], Settings, {}, lambda _: out).plan({})
    shutil.copytree(trained, out)
    with pytest.raises(FileExistsError, match=r"must be a folder without a checkpoint, got .*run, where one now is"):
        open_run_folder(plan, "miou")
    assert (out / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["photo.jpg", "last.pt", "results.txt", "images/a.png"])
def test_a_folder_with_other_files_is_left_alone(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    assert camvid.main([*SMALL, "--out", str(tmp_path)]) == 2
    assert "--out must be a new or empty folder" in told(capsys, "train")
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"{", b"[]", b"\xff\xfe", b'{"settings": [], "starts": []}', b'{"settings": {}}']
)
def test_damaged_settings_are_told_and_the_checkpoint_continues_without_them(
    content: bytes, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_folder / "settings.json").write_bytes(content)
    assert resume(run_folder) == 2
    line = told(capsys, "train")
    assert f"{run_folder / 'settings.json'} must hold the settings and the starts of a run" in line
    (run_folder / "settings.json").unlink()
    assert resume(run_folder) == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", "fast"), ("crop", 33), ("crop", [33.5, 2]), ("flip", 1), ("amp", "fp64"), ("batch", None)],
)
def test_settings_of_wrong_types_are_told(
    name: str, value: Any, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_folder / "settings.json"
    content = json.loads(path.read_text())
    content["settings"][name] = value
    path.write_text(json.dumps(content))
    for checkpoint in ("last.pt", "previous.pt"):
        assert resume(run_folder) == 2
        shown = tuple(value) if isinstance(value, list) else value
        assert f"must hold settings of the right types, got --{name} {shown!r}; the file" in told(capsys, "train")
        (run_folder / checkpoint).unlink()


def test_a_checkpoint_of_another_run_is_not_continued(
    run_folder: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found before the network is built from settings that are not its own."""
    last = run_folder / "last.pt"
    content = torch.load(last, weights_only=True)
    other = {**content["settings"], "lr": 0.5, "window": (65, 65), "workers": 7, "head_channels": 16}
    torch.save({**content, "settings": other}, last)
    assert resume(run_folder) == 2
    line = told(capsys, "train")
    assert f"{last} must be a checkpoint of the run in {run_folder}" in line
    assert "--head-channels was 8, is 16; --lr was 0.001, is 0.5; --window was" in line
    assert "--workers" not in line
    shutil.copy(trained / "last.pt", last)
    assert resume(run_folder, "--workers", "0") == 0


@pytest.mark.parametrize("changes", [{"iteration": 7, "position": 14}, {"iteration": 0}, {"position": 2**70}])
def test_a_checkpoint_of_another_step_is_told(
    changes: dict[str, int], run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(run_folder / "last.pt", weights_only=True)
    torch.save({**content, **changes}, run_folder / "last.pt")
    (run_folder / "metrics.jsonl").unlink()
    assert resume(run_folder) == 2
    assert "must name a checkpoint of at most 2 iterations of 2 samples, got" in told(capsys, "train")


@pytest.mark.parametrize("line", ["3", "{}", '{"kind": "training"}', '{"iteration": 1}', "\udcff"])
def test_records_of_another_kind_are_told(line: str, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + line.encode("utf-8", "surrogateescape") + b"\n")
    assert resume(run_folder) == 2
    assert "remove that line" in told(capsys, "train")


def test_a_finished_run_is_resumed_without_its_images(run_folder: Path) -> None:
    shutil.rmtree(run_folder / "images")
    assert camvid.main(["--resume", "--out", str(run_folder)]) == 0
    assert (run_folder / "results.txt").exists()


def test_evaluating_on_training_images_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert camvid.main([*SMALL, "--out", str(tmp_path / "run"), "--val-split", "train"]) == 0
    assert "warning: 6 of 6 images for evaluation are training images too, such as" in capsys.readouterr().out


def test_ctrl_c_while_the_checkpoint_is_read_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "read_checkpoint", interrupt)
    assert camvid.main(["--resume", str(tmp_path / "last.pt")]) == 130
    assert capsys.readouterr().err == "train: stopped before the run began\n"
