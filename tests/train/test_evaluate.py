"""ccgpu evaluate: runs, converted networks, images without labels; the errors that it reports."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ccgpu.models import checkpoint
from ccgpu.models.backbones import build_backbone
from ccgpu.models.ccnet import CCNet
from ccgpu.train import camvid, convert, evaluate
from ccgpu.train.runs import records
from ccgpu.train.runs.settings.training import Settings
from tests.train.training import run, told


def test_evaluate_predicts_images_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, data, predictions = tmp_path / "run", tmp_path / "data", tmp_path / "predictions"
    run(camvid, out)
    (data / "test").mkdir(parents=True)
    for number, size in enumerate([(50, 37), (33, 64)]):
        Image.new("RGB", size, (90, 30 * number, 0)).save(data / "test" / f"video_{number}.png")
    flags = ["--checkpoint", str(out / "last.pt"), "--data", str(data), "--split", "test", "--workers", "0"]
    assert evaluate.main(flags) == 2
    assert "label files must lie in" in capsys.readouterr().err
    assert evaluate.main([*flags, "--unlabelled"]) == 2
    assert "--unlabelled must come with --save-predictions" in capsys.readouterr().err
    assert evaluate.main([*flags, "--unlabelled", "--save-predictions", str(predictions)]) == 0
    assert "mIoU" not in capsys.readouterr().out
    assert {path.name: Image.open(path).size for path in predictions.iterdir()} == {
        "video_0.png": (50, 37),
        "video_1.png": (33, 64),
    }


def test_evaluate_takes_a_converted_network(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A converted network has the scores of the run that it comes from, and knows its dataset and how it predicts."""
    network, record = tmp_path / "net.safetensors", tmp_path / "scores.jsonl"
    assert convert.main([str(trained / "last.pt"), str(network)]) == 0
    flags = ["--checkpoint", str(network), "--data", str(trained / "scenes"), "--workers", "0"]
    assert evaluate.main([*flags, "--dataset", "lip"]) == 2
    assert "must have the network's 11 classes, got lip with 20" in capsys.readouterr().err
    assert evaluate.main([*flags, "--record", str(record)]) == 0
    assert "camvid, 3 images, whole, scales 1.0, mean of logits (mode as in the file)" in capsys.readouterr().out
    last = records.read_records(trained / "metrics.jsonl")[-1]
    found = json.loads(record.read_text())
    assert found["iteration"] is None
    assert found["matrix"] == last["matrix"]
    unknown = dataclasses.replace(checkpoint.read(network), dataset=None)
    checkpoint.write(tmp_path / "unknown.pt", unknown)
    assert evaluate.main(["--checkpoint", str(tmp_path / "unknown.pt"), *flags[2:]]) == 2
    assert "--dataset must be given for a file that does not say on what it was" in capsys.readouterr().err


def test_evaluate_shows_a_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(camvid, tmp_path / "run", "--clip", "3", "--scenes", "12", "7", "--context", "none")
    capsys.readouterr()
    assert evaluate.main(["--checkpoint", str(tmp_path / "run" / "last.pt"), "--workers", "0"]) == 0
    shown = capsys.readouterr()
    assert "3 clips of up to 3 images, whole, scales 1.0" in shown.out
    assert "3/3" in shown.err


def test_evaluate_counts_a_split_that_is_named_twice_once(trained: Path, tmp_path: Path) -> None:
    record = tmp_path / "new" / "scores.jsonl"
    flags = ["--checkpoint", str(trained / "last.pt"), "--workers", "0", "--record", str(record)]
    assert evaluate.main([*flags, "--split", "val", "val"]) == 0
    last = records.read_records(trained / "metrics.jsonl")[-1]
    assert records.read_records(record)[0]["matrix"] == last["matrix"]


def test_a_size_that_is_given_replaces_the_other_of_the_run(trained: Path, tmp_path: Path) -> None:
    record = tmp_path / "scores.jsonl"
    flags = ["--checkpoint", str(trained / "last.pt"), "--workers", "0", "--device", "cpu", "--record", str(record)]
    sizes = (["--short-side", "40"], ["--fit", "70"], ["--short-side", "40", "--long-side", "50"], [])
    for given in sizes:
        assert evaluate.main([*flags, *given]) == 0
    read = records.read_records(record)
    assert [(line["short_side"], line["long_side"], line["fit"]) for line in read] == [
        (40, None, None),
        (None, None, [70, 70]),
        (40, 50, None),
        (None, None, None),
    ]
    saved = dataclasses.asdict(Settings(mode="whole", short_side=450, long_side=900))
    for given, sizes in (
        (["--fit", "473"], (None, None, (473, 473))),
        (["--fit", "33", "49"], (None, None, (33, 49))),
        (["--short-side", "500"], (500, 900, None)),
        (["--long-side", "500"], (450, 500, None)),
    ):
        changed = evaluate.evaluation_settings(saved, evaluate.read_flags(["--checkpoint", "a", *given]))
        assert (changed.short_side, changed.long_side, changed.fit) == sizes


# Errors: one line, never a traceback


def test_evaluate_refuses_a_backbone_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(build_backbone("resnet18", stem="7x7").state_dict(), tmp_path / "resnet18.pth")
    assert evaluate.main(["--checkpoint", str(tmp_path / "resnet18.pth"), "--dataset", "camvid"]) == 2
    assert "backbone alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint", "nowhere.pt"], "path must be a file, got 'nowhere.pt'"),
        (["--dataset", "ccgpu.train.engine"], "must be a module with a DATASET, got 'ccgpu.train.engine'"),
        (["--dataset", "no.such.module"], "must be a module that can be imported, got 'no.such.module'"),
        (["--scales", "0"], "--scales must be numbers from 0.01 to 20.0, got 0.0"),
        (["--scales", "1e9"], "--scales must be numbers from 0.01 to 20.0, got 1000000000.0"),
        (["--mode", "sliding", "--window", "100000"], "--window must be at most 32768, got 100000"),
        (["--amp", "fp16", "--device", "cpu"], "--amp fp16 needs a CUDA device, got the CPU"),
        (["--workers", "10000"], "--workers must be from 0 to 256, got 10000"),
        (
            ["--mode", "sliding", "--window", "32", "--stride", "33"],
            "--stride must be at most --window (32, 32), got (33, 33)",
        ),
        (["--window", "1", "2", "3"], "--window must be H W, or N for a square"),
        (["--fit", "1", "2", "3"], "--fit must be H W, or N for a square"),
        (["--short-side", "0"], "--short-side must be from 1 to 32768 pixels, got 0"),
        (["--fit", "99", "99999"], "--fit must be from 1 to 32768 pixels, got [99, 99999]"),
        (["--fit", "99", "--short-side", "9"], "--short-side and --fit must not both be given, got 9 and (99, 99)"),
        (["--long-side", "99"], "--long-side must come with --short-side, got 99 alone"),
        (["--short-side", "99", "--long-side", "98"], "--long-side must be --short-side or more, got 98 for 99"),
        (["--long-side", "0", "--short-side", "9"], "--long-side must be from 1 to 32768 pixels, got 0"),
        (["--workers", "-1"], "--workers must be from 0 to 256, got -1"),
        (["--dataset", ".camvid"], "--dataset must be a module that can be imported, got '.camvid'"),
        (["--dataset", "nosuch"], "--dataset must be a module that can be imported, got 'nosuch'"),
        (["--dataset", "json"], "--dataset must be a module with a DATASET, got 'json'"),
        (["--window", "33"], "--window and --stride must come with sliding windows, got mode whole"),
        (["--unlabelled", "--save-predictions", "new", "--record", "a"], "--record must not come with --unlabelled"),
        (["--record", "file/scores.jsonl"], "file"),
        (["--save-predictions", "file"], "--save-predictions must be a folder, got the file file"),
        (["--split", "train", "val", "--save-predictions", "new"], "must come with images of different names"),
    ],
)
def test_evaluate_names_errors_before_it_begins(
    flags: list[str],
    message: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    given = [] if "--checkpoint" in flags else ["--checkpoint", str(trained / "last.pt")]
    assert evaluate.main([*given, "--workers", "0", *flags]) == 2
    assert message in told(capsys, "evaluate")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("flag", "value", "named"), [("--split", "nowhere", "'nowhere'"), ("--data", "/no", "/no")])
def test_evaluate_names_missing_folders(
    flag: str, value: str, named: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(["--checkpoint", str(trained / "last.pt"), "--workers", "0", flag, value]) == 2
    error = capsys.readouterr().err
    assert error.startswith("evaluate: ")
    assert named in error


def test_predictions_are_replaced_only_when_asked_and_labels_never(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(trained / "scenes", data)
    checkpoint = tmp_path / "last.pt"
    shutil.copy(trained / "last.pt", checkpoint)
    flags = ["--checkpoint", str(checkpoint), "--data", str(data), "--workers", "0", "--save-predictions"]
    assert evaluate.main([*flags, str(out)]) == 0
    first = sorted(out.iterdir())[0]
    first.write_text("kept")
    assert evaluate.main([*flags, str(out)]) == 2
    assert "--save-predictions must be new, got existing results" in told(capsys, "evaluate")
    assert first.read_text() == "kept"
    assert evaluate.main([*flags, str(out), "--overwrite"]) == 0
    assert Image.open(first).mode == "L"
    # The label files of the split have the predictions' names in a folder of their own; so they would be replaced.
    (pair, *_) = camvid.find_pairs(data, "val", True)
    assert pair.label is not None
    before = pair.label.read_bytes()
    name = pair.label.with_name(f"{pair.name}.png")
    if name != pair.label:
        name.symlink_to(pair.label)
    assert evaluate.main([*flags, str(pair.label.parent), "--overwrite"]) == 2
    assert "--save-predictions must not replace what the command reads" in told(capsys, "evaluate")
    assert pair.label.read_bytes() == before
    assert evaluate.main([*flags[:-1], "--record", str(checkpoint)]) == 2
    assert "--record must not replace what the command reads" in told(capsys, "evaluate")
    assert checkpoint.read_bytes() == (trained / "last.pt").read_bytes()


def test_predictions_do_not_lie_beside_the_images(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images are JPEG files here: predictions would replace none, but be taken for images by the next command."""
    data = tmp_path / "data"
    shutil.copytree(trained / "scenes", data)
    before = sorted(data.rglob("*"))
    (pair, *_) = camvid.find_pairs(data, "val", True)
    flags = ["--checkpoint", str(trained / "last.pt"), "--data", str(data), "--workers", "0"]
    for folder in (pair.image.parent, data):
        assert evaluate.main([*flags, "--save-predictions", str(folder), "--overwrite"]) == 2
        assert "--save-predictions must be another folder than the inputs'" in told(capsys, "evaluate")
    assert sorted(data.rglob("*")) == before


@pytest.mark.parametrize("flag", ["--save-predictions", "--record"])
def test_results_that_the_system_refuses_are_named(
    flag: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, **_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    place = tmp_path / "locked" / "place"
    assert evaluate.main(["--checkpoint", str(trained / "last.pt"), "--workers", "0", flag, str(place)]) == 2
    line = told(capsys, "evaluate")
    assert f"{flag} must be a path that can be written, got [Errno 13] Permission denied: " in line
    assert str(place.parent) in line


@pytest.mark.parametrize("flag", ["--save-predictions", "--record"])
def test_results_that_have_no_place_are_named(
    flag: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    flags = ["--checkpoint", str(trained / "last.pt"), "--workers", "0"]
    wrong = {"--save-predictions": tmp_path / "file", "--record": tmp_path}[flag]
    for path in (wrong, tmp_path / "file" / "below"):
        assert evaluate.main([*flags, flag, str(path)]) == 2
        line = told(capsys, "evaluate")
        assert f"{flag} must " in line
        assert str(path) in line
    assert (tmp_path / "file").read_text() == "kept"


def test_evaluate_stops_at_scores_that_are_not_finite(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (first, *_) = camvid.find_pairs(trained / "scenes", "val", True)
    original = CCNet.forward

    def overflow(self: CCNet, images: torch.Tensor) -> Any:
        return original(self, images) * float("inf")

    monkeypatch.setattr(CCNet, "forward", overflow)
    assert evaluate.main(["--checkpoint", str(trained / "last.pt"), "--workers", "0"]) == 1
    line = told(capsys, "evaluate")
    assert f"the network's scores of {first.name} must be finite, got NaN or infinity" in line
    assert "use --amp bf16 or off" in line


def test_evaluate_fails_where_a_prediction_cannot_be_written(
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
