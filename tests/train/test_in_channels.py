"""A dataset of images of five channels of 16 bits, from its files to predictions and an exported network."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from ccgpu.models import checkpoint
from ccgpu.models.ccnet import CCNet
from ccgpu.models.image_format import ImageFormat
from ccgpu.models.labels import Labels
from ccgpu.train import attention, command, evaluate, export, inspect, predict
from ccgpu.train.data.channels import channels_of
from ccgpu.train.data.facts import facts_of
from ccgpu.train.data.pairs import Pair, find_by_name
from ccgpu.train.dataset import Dataset
from ccgpu.train.runs import records
from tests.train.networks import write_network
from tests.train.training import TINY

SIZE = (48, 64)
CLASSES = 2
MODULE = "fields_of_five_bands"
DEVICE = ("--device", "cpu")


def scene(seed: int, channels: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Return an image of values around 1000 to 5000 and its classes, which its last channel shows."""
    generator = np.random.default_rng(seed)
    classes = np.zeros(SIZE, np.uint8)
    top, left = generator.integers(0, 24, size=2)
    classes[top : top + 20, left : left + 30] = 1
    pixels = generator.normal(1000.0 * np.arange(1, channels + 1), 50.0, size=(*SIZE, channels))
    pixels[..., -1] += 2000.0 * classes
    return pixels.clip(0, 65535).astype(np.uint16), classes


def write_tiff(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig", compression="deflate")


def find_pairs(root: Path, split: str, labelled: bool = True) -> list[Pair]:
    return find_by_name("find_pairs", root / split / "images", root / split / "labels" if labelled else None)


def dataset(root: Path) -> Dataset:
    """Return the dataset in root, whose images are read and normalised as its training images say."""
    paths = sorted((root / "train" / "images").iterdir())
    found = channels_of({path: facts_of(path, is_label=False) for path in paths})
    return Dataset(
        name=MODULE,
        labels=Labels(("soil", "crop"), np.array([[120, 80, 40], [40, 160, 40]], np.uint8), ids=(0, 1)),
        layout="train and val.",
        find_pairs=find_pairs,
        recipe={},
        source="The recipe is ours.",
        scores=("miou",),
        images=found.images,
        mean=found.mean,
        std=found.std,
    )


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of images, whose DATASET is the module `MODULE`."""
    for index in range(6):
        pixels, classes = scene(index)
        split = tmp_path / "data" / ("val" if index > 3 else "train")
        write_tiff(split / "images" / f"{index}.tif", pixels)
        (split / "labels").mkdir(parents=True, exist_ok=True)
        Image.fromarray(classes).save(split / "labels" / f"{index}.png")
    (tmp_path / f"{MODULE}.py").write_text(
        "from pathlib import Path\nfrom tests.train.test_in_channels import dataset\n"
        f"DATASET = dataset(Path({str(tmp_path / 'data')!r}))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    return tmp_path / "data"


def train(root: Path, out: Path, *flags: str) -> int:
    places = ("--data", str(root), "--train-split", "train", "--val-split", "val", "--out", str(out))
    return command.main(dataset(root), [*TINY, *places, *flags])


def test_train_resume_evaluate_predict_and_attention(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, resumed = tmp_path / "out", tmp_path / "resumed"
    weights = ("--imagenet", "package", "--backbone", "efficientnet-lite0", "--check")
    assert train(root, out, *weights) == 0
    assert "the weights were trained on RGB; each of the 5 channels begins with" in capsys.readouterr().out
    found = checkpoint.read(out / "last.pt")
    assert found.images == ImageFormat(5, raw=True, dtype="uint16")
    assert tuple(found.network["mean"]) == dataset(root).mean
    assert Image.open(out / "images" / "4.png").size[0] > 3 * SIZE[1]

    # Resumed where the images have changed: mean and std stay those of the network.
    shutil.copytree(out, resumed)
    (resumed / "last.pt").unlink()
    mean = dataset(root).mean
    for name in ("0.tif", "1.tif"):
        path = root / "train" / "images" / name
        write_tiff(path, scene(7)[0])
    assert dataset(root).mean != mean
    assert train(root, resumed, "--resume", *weights) == 0
    again = checkpoint.read(resumed / "last.pt")
    assert tuple(again.network["mean"]) == mean
    capsys.readouterr()

    scores = tmp_path / "scores.jsonl"
    network = ("--checkpoint", str(out / "last.pt"))
    assert evaluate.main([*network, "--record", str(scores), "--workers", "0", *DEVICE]) == 0
    last = [line for line in records.read_records(out / "metrics.jsonl") if line["kind"] == "evaluation"][-1]
    assert records.read_records(scores)[0]["matrix"] == last["matrix"]

    image = root / "val" / "images" / "4.tif"
    predicted = tmp_path / "predicted"
    assert predict.main([str(image), *network, "--out", str(predicted), *DEVICE]) == 0
    shown = np.asarray(Image.open(predicted / "overlays" / "4.jpg"))
    assert shown.shape == (*SIZE, 3)
    net = checkpoint.build(found)
    mean_, std = (torch.tensor(values).view(1, 5, 1, 1) for values in (net.backbone.mean, net.backbone.std))
    pixels = torch.from_numpy(scene(4)[0].astype(np.float32)).permute(2, 0, 1)[None]
    with torch.no_grad():
        classes = net((pixels - mean_) / std)[0].argmax(dim=0).numpy()
    assert np.array_equal(np.asarray(Image.open(predicted / "ids" / "4.png")), classes)

    maps = tmp_path / "maps.png"
    assert attention.main([str(image), *network, "--out", str(maps), "--device", "cpu"]) == 0
    assert Image.open(maps).mode == "RGB"


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["given", "exported"])
def test_a_network_for_such_images_is_exported_with_their_format(
    root: Path, tmp_path: Path, real: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is handed to torch's exporter; and what torch makes of it, which takes long."""
    mean, std = dataset(root).mean, dataset(root).std
    assert mean is not None
    assert std is not None
    images, options = ImageFormat(5, raw=True, dtype="uint16"), {"in_channels": 5, "mean": mean, "std": std}
    net = write_network(tmp_path / "net.pt", dataset(root).labels, None, images, num_classes=CLASSES, **options)
    exported, given = tmp_path / "net.pt2", []

    def write(module: torch.nn.Module, path: Path, information: dict[str, Any]) -> torch.nn.Module:
        path.touch()
        given[:] = module, information
        return module

    if not real:
        monkeypatch.setitem(export.WRITERS, "torch-export", write)
    arguments = ("--checkpoint", str(tmp_path / "net.pt"), "--to", "torch-export", "--pixels", "--out", str(exported))
    assert export.main([*arguments]) == 0
    if real:
        files = {"ccgpu.json": ""}
        program = torch.export.load(exported, extra_files=files).module()
        information = json.loads(files["ccgpu.json"])
    else:
        program, information = given
    pixels = torch.from_numpy(scene(4)[0].astype(np.float32)).permute(2, 0, 1)[None]
    with torch.no_grad():
        logits = net((pixels - torch.tensor(mean).view(1, 5, 1, 1)) / torch.tensor(std).view(1, 5, 1, 1))
        torch.testing.assert_close(program(pixels), logits, rtol=0, atol=1e-4 * logits.abs().max().item())
    assert information["images"] == {"channels": 5, "raw": True, "dtype": "uint16"}


@pytest.mark.parametrize("channels", [3, 4])
def test_predict_refuses_images_of_other_channels_by_name(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], channels: int
) -> None:
    images = ImageFormat(5, raw=True, dtype="uint16")
    net = CCNet("resnet18", CLASSES, in_channels=5, mean=[0.0] * 5, std=[1.0] * 5, head_channels=8)
    checkpoint.write(tmp_path / "net.pt", checkpoint.Checkpoint(net.config, net.state_dict(), images=images))
    write_tiff(tmp_path / "other.tif", scene(0, channels)[0])
    flags = ("--checkpoint", str(tmp_path / "net.pt"), "--out", str(tmp_path / "predicted"), *DEVICE)
    assert predict.main([str(tmp_path / "other.tif"), *flags]) == 1
    text = capsys.readouterr().err
    assert f"other.tif with {channels} channels of uint16" in text
    assert "must have 5 channels of uint16" in text


def test_a_resumed_run_refuses_images_of_another_format(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(root, tmp_path / "out") == 0
    for path in root.glob("*/images/*.tif"):
        write_tiff(path, scene(0, channels=4)[0])
    assert train(root, tmp_path / "out", "--resume") == 2
    assert "must go on with images of 5 channels of uint16" in capsys.readouterr().err


def test_a_range_of_values_is_refused(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(root, tmp_path / "out", "--value-range", "0", "4095") == 2
    assert "--value-range must be left out for images of 5 channels of uint16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [({"mean": None}, "mean must be 5"), ({"std": (1.0,) * 4}, "std must be 5"), ({"std": (0.0,) * 5}, "positive")],
)
def test_a_dataset_has_mean_and_std_of_its_channels(root: Path, values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(dataset(root), **values)  # type: ignore[arg-type]


def test_images_of_other_kinds_are_refused_by_name(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = dataset(root)
    write_tiff(root / "train" / "images" / "0.tif", scene(0, channels=4)[0])
    pixels = scene(1)[0].astype(np.float32)
    pixels[3, 4, 2] = np.nan
    write_tiff(root / "train" / "images" / "1.tif", pixels)
    places = ("--data", str(root), "--train-split", "train", "--val-split", "val", "--out", str(tmp_path / "out"))
    assert command.main(good, [*TINY, *places]) == 2
    text = capsys.readouterr().err
    assert "0.tif: 4 channels of uint16, not 5 channels of uint16" in text
    assert "1.tif: 1 values are NaN or infinite" in text
    assert not (tmp_path / "out").exists()


def test_a_folder_of_such_images_is_inspected(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root.parent)
    assert inspect.main([str(root)]) == 0
    assert "5 channels of uint16 as stored, mean and std" in capsys.readouterr().out
    pixels = scene(1)[0].astype(np.float32)
    pixels[3, 4, 2] = np.nan
    write_tiff(root / "train" / "images" / "1.tif", pixels)
    assert inspect.main([str(root)]) == 1
    text = capsys.readouterr().out
    assert "1.tif: 1 values are NaN or infinite" in text
    assert "1 with 5 channels of float32" in text
