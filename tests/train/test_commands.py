"""Every training command from top to bottom, on synthetic images and on real samples; then `train.evaluate` of it."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ccgpu.models import checkpoint
from ccgpu.models.backbones import build_backbone
from ccgpu.models.ccnet import CCNet
from ccgpu.train import ade20k, camvid, cityscapes, command, convert, evaluate, lip
from ccgpu.train.metrics import SCORES as METRICS
from ccgpu.train.metrics import ConfusionMatrix
from ccgpu.train.runs import checkpoints, records, settings

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
COMMANDS = [ade20k, camvid, cityscapes, lip]
TINY = [
    *("--backbone", "resnet18", "--head-channels", "8", "--crop", "33", "41", "--batch", "2", "--device", "cpu"),
    *("--iterations", "2", "--save-every", "1", "--log-every", "1", "--lr", "1e-3", "--workers", "0"),
    *("--scenes", "6", "3", "--scenes-size", "64", "96", "--eval", "whole", "--no-tensorboard"),
]


# The recipes' sizes of images, brought down to those of the drawn ones.
SMALL = {
    "ade20k": ("--short-sides", "48", "64", "--eval-short-side", "64"),
    "lip": ("--eval-fit", "64", "64"),
    "camvid": (),
    "cityscapes": (),
}


def name_of(module: Any) -> str:
    return module.DATASET.name if isinstance(module, ModuleType) else ""


def run(module: ModuleType, out: Path, *flags: str) -> list[dict[str, Any]]:
    """Run a command and return its records."""
    assert module.main([*TINY, *SMALL[name_of(module)], *flags, "--out", str(out)]) == 0
    lines = records.read_records(out / "metrics.jsonl")
    assert [line["iteration"] for line in lines if line["kind"] == "training"] == [1, 2]
    assert lines[-1]["kind"] == "evaluation"
    return lines


def saved_scores(module: ModuleType, predictions: Path, root: Path, split: str) -> ConfusionMatrix:
    """The matrix of saved prediction files against the label files, read anew."""
    labels = module.DATASET.labels
    confusion = ConfusionMatrix(labels.num_classes)
    for pair in module.find_pairs(root, split):
        predicted = np.asarray(Image.open(predictions / f"{pair.name}.png"))
        assert set(np.unique(predicted)) <= set(labels.ids)
        truth = labels.to_train[np.asarray(Image.open(pair.label))]
        confusion.update(torch.from_numpy(labels.to_train[predicted].astype(int)), torch.from_numpy(truth.astype(int)))
    return confusion


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

    assert evaluate.main([*flags, "--ms", "--flip", "--average", "probabilities"]) == 0
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


def test_a_runs_checkpoint_is_a_network_to_take_along(tiny_checkpoint: Path, tmp_path: Path) -> None:
    saved = checkpoints.read_checkpoint(tiny_checkpoint)
    net = CCNet.from_checkpoint(tiny_checkpoint)
    assert not net.training
    assert all(torch.equal(value, saved["model"][name]) for name, value in net.state_dict().items())
    assert convert.main([str(tiny_checkpoint), str(tmp_path / "net")]) == 0
    found = checkpoint.read(tmp_path / "net.safetensors")
    assert found.labels == camvid.LABELS.as_plain()
    images = torch.randn(1, 3, 33, 49)
    with torch.no_grad():
        assert torch.equal(checkpoint.build(found)(images), net(images))


def test_evaluate_takes_a_network_of_no_run(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Converted, the network has the scores of its run, with the flags that its run had."""
    network, record = tmp_path / "net.safetensors", tmp_path / "scores.jsonl"
    assert convert.main([str(tiny_checkpoint), str(network)]) == 0
    flags = ["--checkpoint", str(network), "--data", str(tiny_checkpoint.parent / "scenes"), "--workers", "0"]
    assert evaluate.main(flags) == 2
    assert "--dataset must be given" in capsys.readouterr().err
    assert evaluate.main([*flags, "--dataset", "lip"]) == 2
    assert "must have the network's 11 classes, got lip with 20" in capsys.readouterr().err
    assert evaluate.main([*flags, "--dataset", "camvid", "--record", str(record)]) == 0
    last = records.read_records(tiny_checkpoint.parent / "metrics.jsonl")[-1]
    found = json.loads(record.read_text())
    assert found["iteration"] is None
    assert found["matrix"] == last["matrix"]


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
        (["--split", "nowhere"], "'nowhere'"),
        (["--data", "/nowhere"], "/nowhere"),
        (["--ms", "0"], "scales must be one or more positive numbers, got (0.0,)"),
        (
            ["--mode", "sliding", "--crop", "32", "--stride", "33"],
            "stride must be in 1..crop, got stride 33 for crop 32",
        ),
        (["--crop", "1", "2", "3"], "--crop must be H W, or N for a square"),
        (["--workers", "-1"], "--workers must be 0 or more"),
    ],
)
def test_evaluate_names_mistakes(
    flags: list[str], message: str, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [] if "--checkpoint" in flags else ["--checkpoint", str(tiny_checkpoint)]
    assert evaluate.main([*given, "--workers", "0", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "run"
    run(camvid, out, "--context", "none")
    return out / "last.pt"


@pytest.mark.parametrize("module", COMMANDS, ids=name_of)
def test_presets_hold_settings_the_command_takes(module: ModuleType) -> None:
    for values in command.presets(module.DATASET).values():
        settings.check_settings(settings.Settings(**values), module.DATASET, 1, torch.device("cpu"))
    assert settings.Settings(**module.DATASET.recipe).preset is None
    assert command.presets(module.DATASET)["demo"].keys() >= {"iterations", "backbone"}
