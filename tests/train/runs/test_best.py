"""best.pt, --patience and --extend: what a run chooses, where it ends, and that a kill changes neither."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ccgpu.train import camvid, engine, evaluate
from ccgpu.train.metrics import ConfusionMatrix
from ccgpu.train.runs import checkpoints, plan, records, training_run
from tests.train.training import TINY, told

SMALL = [*TINY, "--context", "none"]
# Score of the evaluation after each step, in parts of 1000; None: no class occurs.
COURSE = (200, 400, None, 400, 300)


class Kill(BaseException):
    """Ends a command as a kill does: nothing catches it."""


def score(monkeypatch: pytest.MonkeyPatch, course: Sequence[int | None]) -> None:
    """Let the evaluation after step i have score course[i - 1], whatever the network."""

    def evaluate_as_told(*_: Any, num_classes: int, **__: Any) -> ConfusionMatrix:
        found = ConfusionMatrix(num_classes)
        hits = course[saved_iteration[-1] - 1]
        if hits is not None:
            found.matrix[0, 0] += hits
            found.matrix[0, 1] += 1000 - hits
        return found

    saved_iteration: list[int] = []
    evaluate_run = training_run.TrainingRun.evaluate

    def note(run: training_run.TrainingRun, iteration: int) -> None:
        saved_iteration.append(iteration)
        evaluate_run(run, iteration)

    monkeypatch.setattr(training_run.TrainingRun, "evaluate", note)
    monkeypatch.setattr(training_run.TrainingRun, "_draw", lambda *_: None)
    monkeypatch.setattr(engine, "evaluate", evaluate_as_told)


def train(out: Path, *flags: str, data: Path) -> int:
    return camvid.main(
        [*SMALL, "--iterations", "5", "--eval-every", "1", "--data", str(data), "--out", str(out), *flags]
    )


def resume(out: Path, *flags: str) -> int:
    return camvid.main(["--resume", "--out", str(out), *flags])


def iteration_of(path: Path) -> int:
    found: int = torch.load(path, weights_only=True)["iteration"]
    return found


def comparable(out: Path) -> list[dict[str, Any]]:
    lines = records.read_records(out / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


def same_runs(one: Path, other: Path) -> None:
    """Assert that two run folders hold the same records, choice and networks."""
    assert comparable(one) == comparable(other)
    assert (one / "results.txt").read_text() == (other / "results.txt").read_text()
    for name in ("last.pt", "previous.pt", "best.pt"):
        first, second = (torch.load(folder / name, weights_only=True) for folder in (one, other))
        assert first["iteration"] == second["iteration"], name
        assert first["lengths"] == second["lengths"]
        assert torch.equal(first["random"]["torch"], second["random"]["torch"])
        for key, value in first["model"].items():
            assert torch.equal(value, second["model"][key]), (name, key)
    assert not [*one.glob("*.partial"), *other.glob("*.partial")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return camvid.write_videos(tmp_path_factory.mktemp("best") / "data", {"train": 4, "val": 2}, (64, 96), 0)


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 5 steps with the scores of `COURSE`; tests leave it as it is."""
    out = tmp_path_factory.mktemp("best") / "run"
    with pytest.MonkeyPatch.context() as patch:
        score(patch, COURSE)
        assert train(out, data=data) == 0
    return out


@pytest.fixture
def run_folder(undisturbed: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be changed; best.pt stays a file of its own."""
    return Path(shutil.copytree(undisturbed, tmp_path / "copy"))


def test_best_is_the_checkpoint_of_the_first_best_score(undisturbed: Path) -> None:
    assert iteration_of(undisturbed / "best.pt") == 2
    assert "best evaluation: iteration 2, mIoU 20.00 % (best.pt)" in (undisturbed / "results.txt").read_text()


def test_best_is_evaluated_and_trained_on_in_another_folder(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = undisturbed / "best.pt"
    assert evaluate.main(["--checkpoint", str(best), "--workers", "0", "--device", "cpu"]) == 0
    assert f"{best}, iteration 2: camvid" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    assert camvid.main(["--resume", str(best)]) == 2
    assert f"--resume must come with another --out for {best}" in told(capsys, "train")
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")} == before
    other = tmp_path / "other"
    assert camvid.main(["--resume", str(best), "--out", str(other), "--eval-every", "0"]) == 0
    lines = comparable(other)
    assert [line["iteration"] for line in lines if line["kind"] == "training"] == [3, 4, 5]
    own = [line for line in comparable(undisturbed) if line["kind"] == "training"]
    assert [line for line in lines if line["kind"] == "training"] == own[2:]
    assert iteration_of(other / "best.pt") == 5
    assert "best evaluation" not in (other / "results.txt").read_text()  # there is one alone


def kill_at(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """End the command in the second evaluation, whose network is the best: at a place of the writing of best.pt."""
    calls = {"keep": 0}
    keep_best, append_record, replace = checkpoints.keep_best, records.append_record, os.replace

    def keep(folder: Path) -> None:
        calls["keep"] += 1
        if calls["keep"] == 2 and where == "before":
            raise Kill
        keep_best(folder)

    def rename(source: Any, target: Any) -> None:
        if calls["keep"] == 2 and where == "rename" and Path(target).name == "best.pt":
            raise Kill
        replace(source, target)

    def append(path: Path, record: Any) -> None:
        if where == "record" and record["kind"] == "evaluation" and record["iteration"] == 2:
            raise Kill
        append_record(path, record)

    monkeypatch.setattr(checkpoints, "keep_best", keep)
    monkeypatch.setattr(os, "replace", rename)
    monkeypatch.setattr(records, "append_record", append)


@pytest.mark.parametrize("where", ["before", "rename", "record"])
def test_a_kill_changes_no_choice(where: str, undisturbed: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        score(patch, COURSE)
        kill_at(patch, where)
        with pytest.raises(Kill):
            train(out, data=data)
    assert iteration_of(out / "best.pt") == (2 if where == "record" else 1)
    (out / "best.pt.partial").write_bytes(b"half")  # what a kill leaves, whose finally does not run
    with pytest.MonkeyPatch.context() as patch:
        score(patch, COURSE)
        assert resume(out) == 0
    same_runs(out, undisturbed)


def test_a_run_that_goes_on_from_an_earlier_checkpoint_chooses_again(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best evaluation was after the checkpoint that the run goes on from: its record is cut back."""
    score(monkeypatch, (200, 400, None, 100, 500))
    content = torch.load(run_folder / "previous.pt", weights_only=True)
    assert content["iteration"] == 4
    shutil.copyfile(run_folder / "last.pt", run_folder / "best.pt")
    (run_folder / "last.pt").write_bytes(b"damaged")
    assert camvid.main(["--resume", str(run_folder / "previous.pt")]) == 0
    assert iteration_of(run_folder / "abandoned-best.pt") == 5
    assert iteration_of(run_folder / "best.pt") == 5  # trained and chosen again
    assert (run_folder / "best.pt").samefile(run_folder / "last.pt")


def test_best_of_records_that_were_cut_back_is_named_if_it_is_gone(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    score(monkeypatch, COURSE)
    (run_folder / "best.pt").write_bytes(b"damaged")
    assert resume(run_folder) == 0
    assert "iteration 2, mIoU 20.00 % (whose checkpoint is not kept)" in capsys.readouterr().out
    assert not (run_folder / "best.pt").exists()
    assert (run_folder / "abandoned-best.pt").read_bytes() == b"damaged"


def test_a_missing_best_is_made_of_the_checkpoint_that_the_run_continues_from(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    last = {**json.loads(lines[-1]), "miou": 0.9}
    (run_folder / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    (run_folder / "best.pt").unlink()
    assert resume(run_folder) == 0
    assert iteration_of(run_folder / "best.pt") == 5


def no_links(*_: Any, **__: Any) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def full_disk(source: Path, target: Path) -> None:
    Path(target).write_bytes(b"half of it")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_best_is_copied_where_there_are_no_links_and_survives_a_full_disk(
    undisturbed: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    score(monkeypatch, COURSE)
    monkeypatch.setattr(os, "link", no_links)
    copy, copied = shutil.copyfile, list[str]()

    def copy_once(source: Path, target: Path) -> None:
        copied.append(Path(target).name)
        (copy if len(copied) == 1 else full_disk)(source, target)

    monkeypatch.setattr(shutil, "copyfile", copy_once)
    assert train(out, data=data) == 1
    line = told(capsys, "train")
    assert f"{out / 'best.pt'} must be writable, got 'No space left on device'" in line
    assert "continue with" in line
    assert copied == ["best.pt.partial"] * 2
    assert iteration_of(out / "best.pt") == 1
    assert not [*out.glob("*.partial")]
    monkeypatch.setattr(shutil, "copyfile", copy)
    assert resume(out) == 0
    assert not (out / "best.pt").samefile(out / "last.pt")
    same_runs(out, undisturbed)


def test_a_best_that_is_the_last_is_one_file_with_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(monkeypatch, (100, 200))
    assert train(tmp_path / "run", "--iterations", "2", data=data) == 0
    best, last = tmp_path / "run" / "best.pt", tmp_path / "run" / "last.pt"
    assert best.samefile(last)
    checkpoints.keep_best(tmp_path / "run")  # renaming a name of a file onto another of it does nothing
    assert best.samefile(last)
    assert not [*best.parent.glob("*.partial")]


# --patience


def test_patience_ends_a_run_which_can_go_on(
    undisturbed: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    score(monkeypatch, COURSE)
    assert train(out, "--patience", "2", data=data) == 0
    why = "stopped after 4 of 5 iterations: 2 evaluations in a row without a better mIoU (--patience 2; --resume"
    shown = capsys.readouterr().out
    assert why in shown
    assert f"the best evaluated network: ccgpu predict photos/ --checkpoint {out}/best.pt" in shown
    assert why in (out / "results.txt").read_text()
    assert iteration_of(out / "last.pt") == 4
    before = comparable(out)
    assert resume(out) == 0  # finished: nothing is trained
    assert why in capsys.readouterr().out
    assert comparable(out) == before
    assert camvid.main(["--resume", "--out", str(out), "--extend", "2"]) == 2
    line = told(capsys, "train")
    assert f"--extend must come with a finished run, got {out / 'last.pt'} after 4 of 5 iterations" in line
    assert "--patience 0 with it" in line
    assert resume(out, "--patience", "0") == 0
    same_runs(out, undisturbed)


def test_patience_needs_evaluations_during_training(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", "--patience", "1", "--eval-every", "0", data=data) == 2
    assert "--patience must come with evaluations during training, got 1 and --eval-every 0" in told(capsys, "train")


# --extend


def test_a_run_is_extended_after_evaluations_without_a_better_score(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    score(monkeypatch, (200, 400, 300, 300, 300, 200, 100))
    assert train(out, "--patience", "3", data=data) == 0
    assert resume(out, "--extend", "2") == 0
    assert iteration_of(out / "last.pt") == 6  # one more step and evaluation, which was no better
    assert resume(out) == 0  # finished
    assert iteration_of(out / "last.pt") == 6


@pytest.fixture(scope="module")
def extended(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of 5 steps, made 2 steps longer; tests leave it as it is."""
    out = Path(shutil.copytree(undisturbed, tmp_path_factory.mktemp("extended") / "run"))
    with pytest.MonkeyPatch.context() as patch:
        score(patch, (*COURSE, 450, 100))
        assert resume(out, "--extend", "2") == 0
    return out


def test_extend_trains_a_finished_run_on_by_the_schedule_of_the_new_length(extended: Path, undisturbed: Path) -> None:
    lines = comparable(extended)
    assert lines[: len(comparable(undisturbed))] == comparable(undisturbed)
    rates = {line["iteration"]: line["lr"] for line in lines if line["kind"] == "training"}
    assert [*rates] == [1, 2, 3, 4, 5, 6, 7]
    for step in (6, 7):
        assert rates[step] == pytest.approx(1e-3 * (1 - (step - 1) / 7) ** 0.9)
    assert rates[6] > rates[5]
    content = torch.load(extended / "last.pt", weights_only=True)
    assert (content["iteration"], content["settings"]["iterations"], content["lengths"]) == (7, 7, [5, 7])
    settings = records.read_settings(extended)
    assert settings is not None
    assert settings["iterations"] == 7
    assert iteration_of(extended / "best.pt") == 6


def killed_before_settings(patch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise Kill

    patch.setattr(records, "write_settings", fail)


def killed_in_the_checkpoint(patch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def rename(source: Any, target: Any) -> None:
        if Path(target).name == "last.pt":
            raise Kill
        replace(source, target)

    patch.setattr(os, "replace", rename)


def killed_after_settings(patch: pytest.MonkeyPatch) -> None:
    write_settings = plan.write_settings

    def write(*arguments: Any) -> None:
        write_settings(*arguments)
        raise Kill

    patch.setattr("ccgpu.train.command.write_settings", write)


@pytest.mark.parametrize(
    ("kill", "flags"),
    [
        (killed_before_settings, ()),
        (killed_in_the_checkpoint, ("--extend", "2")),  # nothing was written yet: the same command
        (killed_after_settings, ()),
    ],
)
def test_an_extension_that_is_killed_goes_on(
    kill: Callable[[pytest.MonkeyPatch], None],
    flags: tuple[str, ...],
    run_folder: Path,
    extended: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kill(patch)
        with pytest.raises(Kill):
            resume(run_folder, "--extend", "2")
    told_numbers = "extended from 5 to 7 iterations, over which the schedule now goes: the learning rate was"
    assert told_numbers in capsys.readouterr().out
    score(monkeypatch, (*COURSE, 450, 100))
    if not flags:
        assert resume(run_folder, "--extend", "2") == 2
        assert "after 5 of 7 iterations; continue it first, with --resume alone" in told(capsys, "train")
    assert resume(run_folder, *flags) == 0
    same_runs(run_folder, extended)


def test_a_run_is_extended_in_another_folder(
    undisturbed: Path, extended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "other"
    flags = ["--resume", str(undisturbed / "last.pt"), "--out", str(out), "--extend", "2"]
    score(monkeypatch, (*COURSE, 450, 100))
    with pytest.MonkeyPatch.context() as patch:
        killed_after_settings(patch)
        with pytest.raises(Kill):
            camvid.main(flags)
    assert iteration_of(out / "last.pt") == 5
    assert resume(out) == 0
    steps = [line for line in comparable(out) if line["kind"] == "training"]
    assert steps == [line for line in comparable(extended) if line["kind"] == "training"][5:]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--extend", "0"], "--extend must be 1 or more, got 0"),
        (["--extend", "1", "--iterations", "6"], "--extend must come without --iterations"),
        (["--extend", "9999999999"], "--iterations must be at most"),
        (["--extend", "x"], "invalid int value: 'x'"),
    ],
)
def test_extensions_that_cannot_be_are_told(
    flags: list[str], message: str, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in run_folder.iterdir() if path.is_file()}
    try:
        status: Any = resume(run_folder, *flags)
    except SystemExit as stopped:  # argparse
        status = stopped.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run_folder.iterdir() if path.is_file()} == before


def test_only_a_finished_run_is_extended(
    undisturbed: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", "--extend", "2", data=data) == 2
    assert "--extend must come with --resume and a finished run, got no checkpoint" in told(capsys, "train")
    flags = ["--resume", str(undisturbed / "previous.pt"), "--out", str(tmp_path / "run"), "--extend", "2"]
    assert camvid.main(flags) == 2
    assert "after 4 of 5 iterations; continue it first, with --resume alone." in told(capsys, "train")
    assert not (tmp_path / "run").exists()
