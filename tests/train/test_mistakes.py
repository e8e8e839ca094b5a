"""What a user is told where a command cannot work, or stops in the middle: one line, never a traceback."""

import dataclasses
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from ccgpu.train import camvid, cityscapes, command, distributed, engine, evaluate
from ccgpu.train.runs import errors, records, setup
from tests.train.test_commands import TINY, run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    run(camvid, out, "--context", "none")
    return out


def told(capsys: pytest.CaptureFixture[str], name: str) -> str:
    """The last line of what the command NAME said: its error."""
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"{name}: ")
    assert not line.startswith(f"{name}: {name}: ")
    return line


# The training commands


def test_a_run_of_another_dataset_is_not_continued(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert cityscapes.main(["--resume", str(trained / "last.pt"), "--out", str(out)]) == 2
    assert f"--resume must name a run of cityscapes, got one of camvid in {trained / 'last.pt'}" in told(
        capsys, "cityscapes"
    )
    assert not out.exists()


def test_a_dataset_without_a_demo_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = dataclasses.replace(camvid.DATASET, demo={})
    assert command.main(dataset, ["--preset", "demo", "--out", str(tmp_path / "run")]) == 2
    assert "--preset must be left out for camvid, which has no demo, got demo" in told(capsys, "camvid")


def test_a_package_that_cannot_be_imported_is_told_in_one_line(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "timm.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")')
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    out = tmp_path / "run"
    flags = [*TINY, "--data", str(tiny_data), "--backbone", "timm:resnet18", "--out", str(out)]
    assert cityscapes.main(flags) == 2
    assert "timm must be importable for 'timm:resnet18', got RuntimeError: operator" in told(capsys, "cityscapes")
    assert not out.exists()


def test_an_image_that_vanishes_in_a_loaders_process_is_named(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(tiny_data, data)
    monkeypatch.setattr(setup, "check_pairs", lambda pairs: shutil.rmtree(data / "leftImg8bit" / "train"))
    assert cityscapes.main([*TINY, "--data", str(data), "--workers", "1", "--out", str(out)]) == 1
    line = told(capsys, "cityscapes")
    assert line.startswith("cityscapes: read_pair: file must exist, got no ")
    assert line.endswith(f"put it back. Then continue with --resume --out {out}")


class Deadly(Dataset[dict[str, Any]]):
    def __getitem__(self, index: int) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}


def test_a_loader_that_is_killed_is_told_in_one_line() -> None:
    batches = engine.load_batches(Deadly(), batches=[[0]], workers=1, device=CPU)
    with pytest.raises(RuntimeError) as caught:
        next(iter(batches))
    message = errors.failure(caught.value, again="run it again", smaller="take fewer")
    assert message.startswith("a loader's process ended (DataLoader worker")
    assert message.endswith("lower --workers, then run it again")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("tried 3 GiB"), "out of memory (tried 3 GiB); take fewer"),
        (MemoryError("Unable to allocate 3 GiB"), "out of memory (Unable to allocate 3 GiB); take fewer"),
        (
            RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory\nat"),
            "can't allocate memory); take fewer",
        ),
        (PermissionError(13, "Permission denied", "a.png"), "'a.png'; make room or give access, then run it again"),
        (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1. GLHF"), "another process ended ([gloo]"),
    ],
)
def test_failures_are_told_with_what_to_do(error: Exception, message: str) -> None:
    assert message in errors.failure(error, again="run it again", smaller="take fewer")


def test_an_error_of_the_program_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="size of tensor a"):
        errors.failure(RuntimeError("The size of tensor a (3) must match"), again="", smaller="")


def test_every_process_tells_its_own_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert not distributed.is_main()
    assert errors.fail("camvid", "--lr must be more than 0", 2) == 2
    assert capsys.readouterr().err == ""
    assert errors.fail("camvid", "a.png does not decode", 1, everywhere=True) == 1
    assert capsys.readouterr().err == "camvid: a.png does not decode\n"


def test_a_relative_data_folder_is_found_from_another_folder(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_data.parent)
    out = tmp_path / "run"
    assert cityscapes.main([*TINY, "--data", tiny_data.name, "--out", str(out)]) == 0
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(["--checkpoint", "run/last.pt", "--workers", "0", "--device", "cpu"]) == 0
    assert cityscapes.main(["--resume", "--out", "run"]) == 0


# train.evaluate


def test_evaluate_shows_how_far_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(camvid, tmp_path / "run", "--clip", "3", "--scenes", "12", "7", "--context", "none")
    capsys.readouterr()
    assert evaluate.main(["--checkpoint", str(tmp_path / "run" / "last.pt"), "--workers", "0"]) == 0
    shown = capsys.readouterr()
    assert "3 clips of up to 3 images, whole, scales 1.0" in shown.out
    assert "3/3" in shown.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", ".camvid"], "--dataset must be a module that can be imported, got '.camvid'"),
        (["--dataset", ""], "--dataset must be a module that can be imported, got ''"),
        (["--dataset", "nosuch"], "--dataset must be a module that can be imported, got 'nosuch'"),
        (["--dataset", "json"], "--dataset must be a module with a DATASET, got 'json'"),
        (["--crop", "33"], "--crop and --stride must come with sliding windows, got mode whole"),
        (["--unlabelled", "--save-predictions", "new", "--record", "a"], "--record must not come with --unlabelled"),
        (["--record", "file/scores.jsonl"], "file"),
        (["--save-predictions", "file"], "'file'"),
        (["--split", "train", "val", "--save-predictions", "new"], "must come with images of different names"),
    ],
)
def test_evaluate_names_mistakes_before_it_begins(
    flags: list[str],
    message: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert evaluate.main(["--checkpoint", str(trained / "last.pt"), "--workers", "0", *flags]) == 2
    assert message in told(capsys, "evaluate")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_evaluate_counts_a_split_once_that_is_named_twice(trained: Path, tmp_path: Path) -> None:
    record = tmp_path / "new" / "scores.jsonl"
    flags = ["--checkpoint", str(trained / "last.pt"), "--workers", "0", "--record", str(record)]
    assert evaluate.main([*flags, "--split", "val", "val"]) == 0
    last = records.read_records(trained / "metrics.jsonl")[-1]
    assert records.read_records(record)[0]["matrix"] == last["matrix"]


def test_evaluate_that_cannot_write_a_prediction_failed(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full_disk(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("ccgpu.train.data.submission.write_atomically", full_disk)
    flags = ["--checkpoint", str(trained / "last.pt"), "--workers", "0"]
    assert evaluate.main([*flags, "--save-predictions", str(tmp_path / "new")]) == 1
    line = told(capsys, "evaluate")
    assert "No space left on device" in line
    assert line.endswith("make room or give access, then run the command again")
