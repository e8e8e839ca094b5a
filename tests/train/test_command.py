"""Every training command from top to bottom: on synthetic images, real samples and clips; the errors it reports."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from ccgpu.models import checkpoint
from ccgpu.models.ccnet import CCNet
from ccgpu.models.checkpoint import Checkpoint
from ccgpu.train import ade20k, camvid, cityscapes, command, distributed, evaluate, lip
from ccgpu.train.metrics import SCORES as METRICS
from ccgpu.train.runs import setup
from ccgpu.train.runs.settings import training as settings
from tests.train.training import COMMANDS, TINY, name_of, run, saved_scores, told

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.parametrize("module", COMMANDS, ids=name_of)
def test_a_command_trains_on_synthetic_images_and_its_checkpoint_is_evaluated(
    module: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, predictions = tmp_path / "run", tmp_path / "predictions"
    dataset = module.DATASET
    trained = run(module, out)[-1]
    report = (out / "results.txt").read_text()
    shown = report.partition("trained network: ")[2]
    assert METRICS[dataset.scores[0]][0] == shown[: shown.index(" %")].rpartition(" ")[0]
    assert len(shown.splitlines()[0].split(", ")) == len(dataset.scores)
    assert len(list((out / "images").iterdir())) == 4

    record = tmp_path / "scores.jsonl"
    flags = ["--checkpoint", str(out / "last.pt"), "--workers", "0", "--record", str(record), "--device", "cpu"]
    assert evaluate.main([*flags, "--save-predictions", str(predictions)]) == 0
    split = settings.Settings(**dataset.recipe).val_split[0]
    again = json.loads(record.read_text())
    assert again["matrix"] == trained["matrix"]
    confusion = saved_scores(module, predictions, out / "scenes", split)
    assert confusion.matrix.tolist() == trained["matrix"]
    assert f"mIoU {100 * confusion.miou():.2f} %" in capsys.readouterr().out

    assert evaluate.main([*flags, "--scales", "--flip", "--average", "probabilities"]) == 0
    better = json.loads(record.read_text().splitlines()[-1])
    assert (better["scales"], better["flip"], better["average"]) == ([0.75, 1.0, 1.25], True, "probabilities")
    assert better["matrix"] != again["matrix"]
    assert np.sum(better["matrix"], axis=1).tolist() == np.sum(again["matrix"], axis=1).tolist()


@pytest.mark.parametrize(
    ("module", "folder", "splits"),
    [
        (ade20k, "samples/ade20k/ADEChallengeData2016", ("training", "validation")),
        (lip, "samples/lip", ("train", "val")),
    ],
    ids=name_of,
)
def test_a_command_trains_on_real_samples(
    module: ModuleType, folder: str, splits: tuple[str, str], tmp_path: Path
) -> None:
    root = SHARED / folder
    if not root.is_dir():
        pytest.skip(f"the real samples are not here: {root}")
    last = run(module, tmp_path / "run", "--data", str(root), "--ohem", "0.7", "100000", "--ccl")[-1]
    sizes = [Image.open(pair.label).size for pair in module.find_pairs(root, splits[1])]
    assert 0 < np.sum(last["matrix"]) <= sum(width * height for width, height in sizes)


def test_clips_train_and_are_evaluated_frame_by_frame(tmp_path: Path) -> None:
    lines = run(camvid, tmp_path / "run", "--clip", "3", "--scenes", "12", "7", "--ccl", "--context", "rcca")
    assert {"main", "auxiliary", "variance", "distance", "regularity"} <= set(lines[0])
    root = tmp_path / "run" / "scenes"
    counted = sum(
        int((camvid.DATASET.labels.to_train[np.asarray(Image.open(pair.label))] != 255).sum())
        for pair in camvid.find_pairs(root, "val")
    )
    assert np.sum(lines[-1]["matrix"]) == counted  # every frame once
    predictions = tmp_path / "predictions"
    flags = [
        "--checkpoint",
        str(tmp_path / "run" / "last.pt"),
        "--workers",
        "0",
        "--save-predictions",
        str(predictions),
    ]
    assert evaluate.main(flags) == 0
    assert saved_scores(camvid, predictions, root, "val").matrix.tolist() == lines[-1]["matrix"]


def test_frames_of_two_sizes_are_told_before_the_first_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = camvid.write_videos(tmp_path / "data", {"train": 6, "val": 3}, (64, 96), 0)
    pair = camvid.find_pairs(data, "train")[4]
    for path in (pair.image, pair.label):
        Image.open(path).crop((0, 0, 90, 60)).save(path)
    flags = [*TINY, "--data", str(data), "--out", str(tmp_path / "run")]
    assert camvid.main([*flags, "--clip", "3"]) == 2
    assert "f00120.jpg: 90x60 pixels, but " in capsys.readouterr().err
    assert camvid.main(flags) == 0


def test_fine_and_coarse_labels_are_trained_on_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits = {"train": 2, "train_coarse": 2, "train_extra": 3, "val": 1}
    data = cityscapes.write_scenes(tmp_path / "data", splits, (64, 96), 0)
    flags = ["--data", str(data), "--train-split", "train", "train_coarse", "train_extra"]
    run(cityscapes, tmp_path / "run", *flags)
    shown = "".join(capsys.readouterr())
    assert ", 7 images for training, 1 images for evaluation" in shown
    assert "note: 2 images are trained on with two label files each, as train train_coarse train_extra have" in shown
    evaluated = ["--checkpoint", str(tmp_path / "run"), "--workers", "0", "--device", "cpu"]
    assert evaluate.main([*evaluated, "--split", "val_coarse"]) == 2
    assert "label files must lie in" in capsys.readouterr().err
    assert evaluate.main([*evaluated, "--split", "train_coarse"]) == 0


def test_a_relative_data_folder_is_found_from_another_folder(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_data.parent)
    out = tmp_path / "run"
    assert cityscapes.main([*TINY, "--data", tiny_data.name, "--out", str(out)]) == 0
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(["--checkpoint", "run/last.pt", "--workers", "0", "--device", "cpu"]) == 0
    assert cityscapes.main(["--resume", "--out", "run"]) == 0


def test_evaluation_due() -> None:
    s = settings.Settings(iterations=10, eval_every=4)
    assert [i for i in range(11) if command.evaluation_due(s, i)] == [4, 8, 10]
    s = settings.Settings(iterations=10, eval_every=0, baselines=True)
    assert [i for i in range(11) if command.evaluation_due(s, i)] == [0, 10]


# Errors: one line, never a traceback


def test_a_run_of_another_dataset_is_not_continued(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert cityscapes.main(["--resume", str(trained / "last.pt"), "--out", str(out)]) == 2
    assert f"--resume must name a run of cityscapes, got one of camvid in {trained / 'last.pt'}" in told(
        capsys, "train"
    )
    assert not out.exists()


def test_a_run_does_not_write_into_its_dataset(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(tiny_data)
    before = sorted(tiny_data.rglob("*"))
    for out in (tiny_data, tmp_path / "link"):
        for resume in ([], ["--resume"]):
            assert cityscapes.main([*TINY, "--data", str(tiny_data), "--out", str(out), *resume]) == 2
            assert f"--out must be a new or empty folder, got {out}" in told(capsys, "train")
    assert sorted(tiny_data.rglob("*")) == before


def test_a_dataset_without_a_demo_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = dataclasses.replace(camvid.DATASET, presets={})
    assert command.main(dataset, ["--preset", "demo", "--out", str(tmp_path / "run")]) == 2
    expected = "--preset must be left out for camvid, which has no presets, got demo, a preset of cityscapes, ade20k, "
    assert expected in told(capsys, "train")
    assert command.main(camvid.DATASET, ["--preset", "mmseg-ade20k", "--out", str(tmp_path / "run")]) == 2
    expected = "--preset must be one of demo, cpu, paper for camvid, got mmseg-ade20k, a preset of ade20k"
    assert expected in told(capsys, "train")


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
    message = "timm must be importable for 'timm:resnet18', got RuntimeError: operator"
    assert message in told(capsys, "train")
    path = tmp_path / "net.pt"
    net = CCNet("resnet18", 19, head_channels=8)
    checkpoint.write(path, Checkpoint(net.config, net.state_dict()))
    content = torch.load(path, weights_only=True)
    content["ccgpu"]["network"]["backbone"] = "timm:resnet18"
    torch.save(content, path)
    given = [*TINY, "--data", str(tiny_data), "--out", str(out)]
    assert cityscapes.main([*given, "--init", str(path)]) == 2
    assert message in told(capsys, "train")
    assert cityscapes.main([*given, "--imagenet", str(path)]) == 2
    assert f"load_imagenet: {str(path)!r}" in capsys.readouterr().err
    assert evaluate.main(["--checkpoint", str(path)]) == 2
    assert message in told(capsys, "evaluate")
    assert not out.exists()


def test_an_image_that_vanishes_in_a_loaders_process_is_named(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(tiny_data, data)
    monkeypatch.setattr(setup, "check_data", lambda *_: shutil.rmtree(data / "leftImg8bit" / "train"))
    assert cityscapes.main([*TINY, "--data", str(data), "--workers", "1", "--out", str(out)]) == 1
    line = told(capsys, "train")
    assert line.startswith("train: read_image: path must be an image, got no file ")
    assert line.endswith(f"put it back or name another. Then continue with ccgpu train cityscapes --resume --out {out}")


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ((0, "images"), "start at the same iteration, got 5 on rank 0 and 0 on rank 1"),
        ((5, "others"), "train on the same images, got others on rank 1"),
    ],
)
def test_processes_that_would_train_apart_are_told(monkeypatch, theirs, message):
    monkeypatch.setattr(distributed, "gather_values", lambda own: [own, theirs])
    with pytest.raises(ValueError, match=message):
        command.check_same_start(5, "images")


def test_processes_that_agree_train(monkeypatch):
    monkeypatch.setattr(distributed, "gather_values", lambda own: [own, own])
    command.check_same_start(5, "images")
