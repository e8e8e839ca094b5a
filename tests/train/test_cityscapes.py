import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ccgpu.train import cityscapes
from ccgpu.train.metrics import ConfusionMatrix
from ccgpu.train.runs import checkpoints, plan, records
from ccgpu.train.runs.settings import training as settings
from tests.train.narrow import NARROW

ROOT = Path(__file__).resolve().parents[2]
ITERATIONS = 8
# The smallest run with dropout, auxiliary head, and several checkpoints and evaluations. The learning rate is so low
# that float32 rounding errors stay small: at a higher one a single ReLU whose input changes sign moves the loss by 1e-3
# within a few steps (test_distributed.py compares the processes in float64, at a high rate).
TINY = [
    *("--backbone", NARROW, "--head-channels", "8", "--crop", "25", "33", "--batch", "4", "--device", "cpu"),
    *("--iterations", str(ITERATIONS), "--save-every", "2", "--eval-every", "4", "--log-every", "1", "--lr", "2e-4"),
    *("--mode", "sliding", "--window", "64", "96", "--stride", "64", "32", "--workers", "0"),
    "--no-tensorboard",
]


def start(*arguments: str, launcher: tuple[str, ...] = (), signalled: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Begin a training in a process of its own; see `tests.train.signalled` for what `signalled` says."""
    program = ["tests.train.signalled", *signalled] if signalled else ["tests.train.narrow"]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", *program, "train", "cityscapes", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == status, out + errors
    return out + errors


def iterations_in(out: Path) -> list[int]:
    return [r["iteration"] for r in records.read_records(out / records.METRICS) if r["kind"] == "training"]


def comparable(out: Path) -> list[dict[str, Any]]:
    """Return all records without the speed, the only entry that may differ between two equal runs."""
    lines = records.read_records(out / records.METRICS)
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


@pytest.fixture(scope="module")
def folders(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of two undisturbed runs with the same settings: one process, and two processes."""
    one, two = (tmp_path_factory.mktemp(name) / "run" for name in ("one", "two"))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    arguments = ("--data", str(tiny_data), *TINY, "--baselines", "--out")
    running = [start(*arguments, str(one)), start(*arguments, str(two), launcher=launcher)]
    for process in running:
        assert "warning: batch 4 and crop 25x33 depart from the recipe" in finish(process)
    return one, two


@pytest.fixture(scope="module")
def alone(folders: tuple[Path, Path]) -> Path:
    return folders[0]


def test_a_run_leaves_its_records_images_and_results(alone: Path) -> None:
    lines = records.read_records(alone / "metrics.jsonl")
    assert [line["iteration"] for line in lines if line["kind"] == "training"] == list(range(1, ITERATIONS + 1))
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    assert [line["iteration"] for line in evaluations] == [0, 4, ITERATIONS]
    for line in lines:
        if line["kind"] == "training":
            assert line["loss"] == pytest.approx(line["main"] + 0.4 * line["auxiliary"], rel=1e-6)
            assert line["lr"] == pytest.approx(2e-4 * (1 - (line["iteration"] - 1) / ITERATIONS) ** 0.9)
    confusion = ConfusionMatrix(19)
    confusion.matrix += torch.tensor(evaluations[-1]["matrix"])
    assert confusion.miou() == evaluations[-1]["miou"]
    results = (alone / "results.txt").read_text()
    assert f"trained network: mIoU {100 * confusion.miou():.2f} %" in results
    assert f"untrained network: mIoU {100 * evaluations[0]['miou']:.2f} %" in results
    assert "everything is road: mIoU" in results
    assert "motorcycle" in results
    written = json.loads((alone / "settings.json").read_text())
    assert written["settings"]["lr"] == 2e-4
    assert written["settings"]["crop"] == [25, 33]
    assert written["starts"][0]["versions"]["torch"] == torch.__version__
    names = sorted(path.name for path in (alone / "images").iterdir())
    assert names == ["attention.png", *(f"town_{index:06d}_000019.png" for index in range(3))]
    assert {"last.pt", "previous.pt", "best.pt"} <= {path.name for path in alone.iterdir()}


def test_a_killed_and_resumed_run_ends_bit_for_bit_like_an_undisturbed_one(
    alone: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Killed before its first checkpoint and while one is written, then stopped by Ctrl-C; resumed each time."""
    out = tmp_path / "run"
    arguments = ("--data", str(tiny_data), *TINY, "--baselines", "--out", str(out))

    finish(start(*arguments, signalled=("SIGKILL", "record", "1")), -signal.SIGKILL)
    assert iterations_in(out) == [1]
    assert not (out / "last.pt").exists()

    # Flags left out take the saved values, here all but the folder.
    process = start("--out", str(out), "--data", str(tiny_data), "--resume", signalled=("SIGKILL", "checkpoint", "4"))
    assert "no checkpoint in" in finish(process, -signal.SIGKILL)
    assert checkpoints.read_checkpoint(out / "last.pt")["iteration"] == 2
    assert (out / "last.pt.partial").exists()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"kind": "training", "itera')  # a line the kill cut off

    text = finish(start("--out", str(out), "--resume", signalled=("SIGINT", "record", "5")), 130)
    assert "continuing" in text
    assert f"stopped; continue with ccgpu train cityscapes --resume --out {out}" in text

    text = finish(start("--resume", str(out / "last.pt")))
    assert "mIoU" in text
    one, other = (torch.load(folder / "last.pt", weights_only=True) for folder in (alone, out))
    assert one["iteration"] == other["iteration"] == ITERATIONS
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name
    for index, state in one["optimiser"]["state"].items():
        assert torch.equal(state["momentum_buffer"], other["optimiser"]["state"][index]["momentum_buffer"])
    assert torch.equal(one["random"]["torch"], other["random"]["torch"])
    assert comparable(out) == comparable(alone)
    assert (out / "results.txt").read_text() == (alone / "results.txt").read_text()
    assert not (out / "last.pt.partial").exists()


def test_the_folder_of_a_running_command_is_locked(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "LOCK_SECONDS", 0.2)
    out = tmp_path / "run"
    process = start("--data", str(tiny_data), *TINY, "--out", str(out), signalled=("SIGSTOP", "record", "1"))
    assert os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT).si_code == os.CLD_STOPPED
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert cityscapes.main(["--resume", "--out", str(out)]) == 2
    assert f"no other command writes to, got {out}, where a run is under way" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    process.kill()
    finish(process, -signal.SIGKILL)
    assert cityscapes.main(["--resume", "--out", str(out)]) == 0
    assert iterations_in(out) == list(range(1, ITERATIONS + 1))


def test_a_new_run_may_use_a_folder_with_a_lock_alone(tiny_data: Path, tmp_path: Path) -> None:
    """A refused command leaves its lock file behind, which holds nothing that could be lost."""
    (tmp_path / plan.LOCK).touch()
    assert cityscapes.main(["--data", str(tiny_data), *TINY, "--iterations", "1", "--out", str(tmp_path)]) == 0


def test_two_processes_follow_the_loss_curve_of_one(folders: tuple[Path, Path]) -> None:
    one, two = map(comparable, folders)
    assert [line["iteration"] for line in two] == [line["iteration"] for line in one]
    # The same weights before the first step: the same matrix, each of the three images counted once.
    assert two[0] == one[0]
    assert one[0]["kind"] == "evaluation"
    for expected, line in zip(one, two, strict=True):
        if line["kind"] == "training":
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        else:
            assert sum(map(sum, line["matrix"])) == sum(map(sum, expected["matrix"]))
    assert json.loads((folders[1] / "settings.json").read_text())["starts"][0]["processes"] == 2


def test_resume_on_a_finished_run_reports_again_and_changes_nothing(
    alone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (alone / "metrics.jsonl").read_text()
    assert cityscapes.main(["--resume", "--out", str(alone), "--log-every", "5"]) == 0
    assert "trained network: mIoU" in capsys.readouterr().out
    assert (alone / "metrics.jsonl").read_text() == before
    assert len(json.loads((alone / "settings.json").read_text())["starts"]) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", "0.02", "--batch", "2"], r"--lr was 0.0002, is 0.02; --batch was 4, is 2"),
        (["--preset", "demo"], "--preset was none, is demo"),
        (["--crop", "33"], "--crop was 25 33, is 33 33"),
        (["--val-split", "train"], "--val-split was val, is train"),
        (["--train-split", "val"], "--train-split was train, is val"),
    ],
)
def test_resume_refuses_flags_that_differ_from_the_run(
    alone: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cityscapes.main(["--resume", "--out", str(alone), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_finished_run_is_evaluated_on_another_split_into_another_folder(
    alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (alone / "metrics.jsonl").read_text()
    out = tmp_path / "other"
    flags = ["--resume", str(alone / "last.pt"), "--out", str(out), "--val-split", "train"]
    assert cityscapes.main(flags) == 0
    assert "trained network: mIoU" in capsys.readouterr().out
    first, second = (json.loads(text.splitlines()[-1]) for text in (before, (out / "metrics.jsonl").read_text()))
    assert first["kind"] == second["kind"] == "evaluation"
    assert first["iteration"] == second["iteration"]
    assert sum(map(sum, first["matrix"])) != sum(map(sum, second["matrix"]))  # other images
    assert (alone / "metrics.jsonl").read_text() == before


def test_resume_names_a_missing_or_damaged_checkpoint(
    alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cityscapes.main(["--resume", str(tmp_path / "absent.pt")]) == 2
    assert "absent.pt" in capsys.readouterr().err
    (tmp_path / "last.pt").write_bytes((alone / "last.pt").read_bytes()[:100_000])
    assert cityscapes.main(["--resume", "--out", str(tmp_path)]) == 2
    assert "last.pt must be a whole checkpoint" in capsys.readouterr().err


def test_a_new_run_never_overwrites_one(alone: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in alone.rglob("*")}
    assert cityscapes.main(["--data", str(tiny_data), *TINY, "--out", str(alone)]) == 2
    assert "already holds files; continue the run in it with --resume" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in alone.rglob("*")} == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch", "0"], "--batch must be 1 or more, got 0"),
        (["--batch", "-4"], "--batch must be 1 or more, got -4"),
        (["--iterations", "0"], "--iterations must be 1 or more"),
        (["--lr", "nan"], "--lr must be 0 or more, got nan"),
        (["--lr", "0"], "--lr must be more than 0"),
        (["--lr", "inf"], "--lr must be"),
        (["--lr", "fast"], "invalid float value: 'fast'"),
        (["--momentum", "1.5"], "--momentum must be at most 1, got 1.5"),
        (["--optimiser", "adamw", "--lr", "0.01"], "--lr must be less than 0.01 with --optimiser adamw"),
        (["--optimiser", "adamw", "--head-lr", "100"], "--lr times --head-lr must be less than 0.01"),
        (["--optimiser", "adam"], "invalid choice: 'adam'"),
        (["--accumulate", "0"], "--accumulate must be 1 or more, got 0"),
        (["--accumulate", "3"], "--batch must be a multiple of --accumulate 3, got 4"),
        (["--accumulate", "4", "--context", "psp"], "--batch divided by --accumulate must be 2 or more"),
        (["--clip-gradients", "0"], "--clip-gradients must be more than 0, got 0.0"),
        (["--ema", "1"], "--ema must be more than 0 and less than 1, got 1.0"),
        (["--ema", "0"], "--ema must be more than 0 and less than 1, got 0.0"),
        (["--freeze", "backbone"], "--freeze must come with --imagenet or --init, got backbone of random weights"),
        (["--head-lr", "0"], "--head-lr must be more than 0, got 0.0"),
        (["--min-lr", "0.1"], "--min-lr must be at most --lr 0.0002, got 0.1"),
        (["--min-lr", "1e-5", "--schedule", "constant"], "--min-lr must come with a --schedule that falls"),
        (["--power", "2", "--schedule", "cosine"], "--power must come with --schedule poly or mmseg-poly, got cosine"),
        (["--warmup-steps", "9"], "--warmup-steps must be at most --iterations 8, got 9"),
        (["--dropout", "-0.1"], "--dropout must be"),
        (["--crop", "8"], "--crop must be 16 or more, got 8 8"),
        (["--crop", "32", "32", "3"], "expected H W, or N for a square, got 3 numbers"),
        (["--random-scale", "2", "0.5"], "--random-scale must be LOW HIGH with LOW <= HIGH, got 2.0 0.5"),
        (["--random-scale", "1e9", "1e9"], "--random-scale must be at most 20.0, got 1000000000.0 1000000000.0"),
        (["--batch", "9" * 20], "--batch must be at most 65536, got 99999999999999999999"),
        (["--iterations", "9" * 20], "--iterations must be at most 1000000000"),
        (["--seed", "9" * 26], "--seed must be at most 9223372036854775807"),
        (["--seed", "9" * 5000], "invalid int value"),
        (["--workers", "10000"], "--workers must be at most 256, got 10000"),
        (["--dropout", "1"], "--dropout must be less than 1, got 1.0"),
        (["--momentum", "1"], "--momentum must be less than 1, got 1.0"),
        (["--crop", "100000"], "--crop must be at most 32768, got 100000 100000"),
        (["--window", "100000"], "--window must be at most 32768"),
        (["--scenes-size", "100000"], "--scenes-size must be at most 32768"),
        (["--scenes", "1", "9" * 20], "--scenes must be at most 10000000"),
        (["--head-channels", "9" * 10], "--head-channels must be at most 65536"),
        (["--recurrence", "1000"], "--recurrence must be at most 64"),
        (["--batch", "9" * 400], "--batch must be at most 65536"),
        (["--ohem", "0.7", "1e300"], "--ohem must be a probability and a number of pixels up to 1099511627776"),
        (["--batch-size", "4"], "unrecognized arguments: --batch-size 4; did you mean --batch?"),
        (["--window", "32", "--stride", "33"], "--stride must be at most --window (32, 32)"),
        (["--recurrence", "-1"], "--recurrence must be 0 or more"),
        (["--workers", "-1"], "--workers must be 0 or more"),
        (["--seed", "-1"], "--seed must be 0 or more"),
        (["--backbone", "vgg"], "got 'vgg'"),
        (["--context", "pool"], "invalid choice: 'pool'"),
        (["--context", "none", "--recurrence", "2"], "--recurrence must come with --context rcca, got none"),
        (["--context", "psp", "--gamma", "1"], "--gamma must come with --context rcca or nonlocal, got psp"),
        (["--gamma", "inf"], "--gamma must be finite, got inf"),
        (["--nonlocal-form", "materialised"], "--nonlocal-form must come with --context nonlocal, got rcca"),
        (["--context", "psp", "--batch", "1"], "--batch must be 2 or more for --context psp"),
        (["--ohem", "0.7", "0.5"], "--ohem must be a probability and a number of pixels"),
        (["--ohem", "2", "100"], "--ohem must be a probability and a number of pixels"),
        (
            ["--class-weights", "1", "2"],
            "--class-weights must be a number for each of the 19 classes of cityscapes (road",
        ),
        (["--class-weights", "median"], "--class-weights must be numbers of 0 or more, above 0 for two classes or"),
        (["--class-weights", "1", "median-frequency"], "or median-frequency, got 1 median-frequency"),
        (["--class-weights", *["0"] * 19], "above 0 for two classes or more"),
        (["--class-weights", "1", *["0"] * 18], "above 0 for two classes or more"),
        (["--class-weights", "-1", *["1"] * 18], "numbers of 0 or more"),
        (["--class-weights", "nan", *["1"] * 18], "numbers of 0 or more"),
        (["--class-weights", "1e999", *["1"] * 18], "numbers of 0 or more"),
        (["--label-smoothing", "1"], "--label-smoothing must be below 1, got 1.0"),
        (["--focal", "2", "--label-smoothing", "0.1"], "--label-smoothing must be 0 with --focal, got 0.1"),
        (["--focal", "2", "--ohem", "0.7", "1000"], "--focal must come without --ohem, got both"),
        (["--focal", "-1"], "--focal must be 0 or more, got -1.0"),
        (["--ccl-margins", "0.5", "2"], "--ccl-margins must come with --ccl, got it without"),
        (["--ccl-form", "quadratic"], "--ccl-form must come with --ccl, got it without"),
        (["--dice", "inf"], "--dice must be finite, got inf"),
        (["--loss-average", "valid"], "invalid choice: 'valid'"),
        (["--clip", "5"], "--clip must be 1 for cityscapes, whose images are no videos"),
        (["--fit-crop", "--random-short-sides", "300"], "--fit-crop and --random-short-sides exclude each other"),
        (["--scales", "0"], "--scales must be 0.01 or more, got 0.0"),
        (["--scales", "1e9"], "--scales must be at most 20.0, got 1000000000.0"),
        (["--amp", "fp16", "--device", "cpu"], "--amp fp16 needs a CUDA device"),
        (["--val-split", "nowhere"], "'nowhere'"),
        (["--data", "/nowhere"], "/nowhere"),
        (["--imagenet", "/nowhere.pth"], "/nowhere.pth"),
        (["--log-every", "0"], "--log-every must be 1 or more"),
    ],
)
def test_bad_flags_exit_with_2_before_anything_is_written(
    tiny_data: Path, tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    try:
        status: Any = cityscapes.main(["--data", str(tiny_data), *TINY, "--out", str(out), *flags])
    except SystemExit as stopped:  # argparse
        status = stopped.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_batch_must_be_a_multiple_of_the_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert cityscapes.main(["--batch", "8", "--out", str(tmp_path / "run")]) == 2
    assert "--batch must be a multiple of the 3 processes, got 8" in capsys.readouterr().err
    assert cityscapes.main(["--batch", "9", "--accumulate", "2", "--out", str(tmp_path / "run")]) == 2
    assert "--batch must be a multiple of the 3 processes times --accumulate 2, got 9" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    flags = ["--lr", "1e18", "--save-every", "1", "--eval-every", "0"]
    assert cityscapes.main(["--data", str(tiny_data), *TINY, "--out", str(out), *flags]) == 1
    assert "must be finite" in capsys.readouterr().err
    kept = torch.load(out / "last.pt", weights_only=True)
    assert all(bool(torch.isfinite(value).all()) for value in kept["model"].values())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_does_not_decode_is_named(
    tiny_data: Path, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Header and end of the file are intact, so that only decoding finds the damage, in the middle of training."""
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    for path in (data / "leftImg8bit" / "train").rglob("*.png"):
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 200] = bytes(200)
        path.write_bytes(content)
    out = tmp_path / "run"
    flags = ["--data", str(data), *TINY, "--no-check", "--workers", str(workers), "--out", str(out)]
    assert cityscapes.main(flags) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("train: read_image: path must be a whole image, got ")
    assert "_leftImg8bit.png" in line
    assert line.endswith(f"continue with ccgpu train cityscapes --resume --out {out}")


def test_help_names_every_setting_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cityscapes.main(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in settings.Settings.__dataclass_fields__:
        named = re.search(rf"--{name.replace('_', '-')}(?![\w-])", text)
        # The images are no videos, and the synthetic ones have no markers.
        assert (named is not None) == (name not in ("clip", "markers"))
    assert "learning rate from which the schedule starts (adamw: 1e-4 is usual) (default: 0.01)" in text
