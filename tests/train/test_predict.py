"""python -m train.predict: from images, folders and videos to masks, overlays, label ids and a contact sheet."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ccgpu.models.ccnet import CCNet
from ccgpu.models.image_files import read_image
from ccgpu.models.prediction import Prediction
from ccgpu.train import camvid, lip, predict
from ccgpu.train.visualise import contact_sheet
from tests.train.networks import write_network

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
K = camvid.LABELS.num_classes


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network") / "net.safetensors"
    write_network(path)
    return path


def image(height: int = 40, width: int = 56, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((8, 8, 1), np.uint8))[:height, :width]


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def run(*arguments: Any) -> int:
    return predict.main([str(argument) for argument in arguments])


def expected_classes(net: CCNet, pixels: np.ndarray) -> np.ndarray:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (net.backbone.mean, net.backbone.std))
    with torch.no_grad():
        return net(((torch.from_numpy(pixels.copy()).permute(2, 0, 1) - mean) / std)[None])[0].argmax(0).numpy()


# The command


def test_files_hold_the_predictions_of_the_network(file: Path, tmp_path: Path) -> None:
    pixels = image()
    source = save(tmp_path / "photos" / "a.png", pixels)
    out = tmp_path / "out"
    assert run("--checkpoint", file, "--out", out, source) == 0
    classes = expected_classes(CCNet.from_checkpoint(file), pixels)
    assert len(np.unique(classes)) > 2, "an image of one class would show nothing"
    labels = camvid.LABELS
    assert np.array_equal(np.asarray(Image.open(out / "ids" / "a.png")), labels.to_file[classes])
    assert np.array_equal(np.asarray(Image.open(out / "masks" / "a.png")), labels.colours[classes])
    overlay = np.asarray(Image.open(out / "overlays" / "a.jpg"), dtype=float)
    assert np.abs(overlay - (0.45 * pixels + 0.55 * labels.colours[classes])).mean() < 12
    (record,) = (json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines())
    assert (record["name"], record["height"], record["width"]) == ("a", 40, 56)
    counts = np.bincount(classes.ravel(), minlength=K)
    assert record["shares"] == {
        labels.names[index]: pytest.approx(counts[index] / counts.sum(), abs=1e-5) for index in np.flatnonzero(counts)
    }
    assert Image.open(out / "sheet.jpg").size[0] >= 56
    assert not list(out.rglob("*.partial"))


def test_a_bad_file_does_not_stop_the_others(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    for name in ("a.png", "deep/b.png"):
        save(photos / name, image())
    (photos / "cut.jpg").write_bytes(save(tmp_path / "whole.jpg", image()).read_bytes()[:300])
    (photos / "text.png").write_text("no image")
    assert run("--checkpoint", file, "--out", tmp_path / "out", photos) == 1
    error = capsys.readouterr().err
    assert "cut.jpg" in error
    assert "text.png" in error
    assert "2 of 4 inputs failed" in error
    assert sorted(
        p.relative_to(tmp_path / "out" / "ids").as_posix() for p in (tmp_path / "out" / "ids").rglob("*.png")
    ) == [
        "a.png",
        "deep/b.png",
    ]


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (37, 3), (16, 16), (129, 65)])
def test_images_of_any_size(size: tuple[int, int], file: Path, tmp_path: Path) -> None:
    source = save(tmp_path / "a.png", image(*size))
    assert run("--checkpoint", file, "--out", tmp_path / "out", source, "--write", "ids") == 0
    assert np.asarray(Image.open(tmp_path / "out" / "ids" / "a.png")).shape == size
    assert not (tmp_path / "out" / "masks").exists()


def test_images_are_turned_upright(file: Path, tmp_path: Path) -> None:
    """A phone stores an image as the sensor lies and the way to turn it in EXIF: the prediction is upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(image(40, 56)).save(tmp_path / "phone.png", exif=exif)
    assert run("--checkpoint", file, "--out", tmp_path / "out", tmp_path / "phone.png") == 0
    ids = np.asarray(Image.open(tmp_path / "out" / "ids" / "phone.png"))
    upright = read_image(tmp_path / "phone.png")
    assert ids.shape == upright.shape[:2] == (56, 40)
    assert np.array_equal(ids, camvid.LABELS.to_file[expected_classes(CCNet.from_checkpoint(file), upright)])


def test_image_size_comes_from_the_checkpoint(tmp_path: Path) -> None:
    prediction = {"short_side": 24, "flip_pairs": [list(pair) for pair in lip.DATASET.flip_pairs]}
    net = write_network(tmp_path / "net.pt", lip.LABELS, num_classes=lip.LABELS.num_classes, prediction=prediction)
    pixels = image(40, 56)
    source = save(tmp_path / "a.png", pixels)
    given = ("--checkpoint", tmp_path / "net.pt", source)
    assert run(*given, "--out", tmp_path / "out", "--ms", "1", "1.5", "--flip") == 0
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (net.backbone.mean, net.backbone.std))
    images = ((torch.from_numpy(pixels.copy()).permute(2, 0, 1) - mean) / std)[None]
    scores = Prediction(scales=(1, 1.5), flip=True, short_side=24, flip_pairs=lip.DATASET.flip_pairs)(net, images)
    ids = np.asarray(Image.open(tmp_path / "out" / "ids" / "a.png"))
    assert np.array_equal(ids, scores[0].argmax(0).numpy())
    assert run(*given, "--out", tmp_path / "own", "--short-side", "40") == 0
    own = np.asarray(Image.open(tmp_path / "own" / "ids" / "a.png"))
    assert np.array_equal(own, expected_classes(net, pixels))


def test_a_network_without_names_has_numbered_classes(tmp_path: Path) -> None:
    write_network(tmp_path / "net.pt", None)
    source = save(tmp_path / "a.png", image())
    assert run("--checkpoint", tmp_path / "net.pt", "--out", tmp_path / "out", source) == 0
    record = json.loads((tmp_path / "out" / "predictions.jsonl").read_text())
    assert set(record["shares"]) <= {f"class {index}" for index in range(K)}
    assert run("--checkpoint", tmp_path / "net.pt", "--out", tmp_path / "named", source, "--dataset", "camvid") == 0
    record = json.loads((tmp_path / "named" / "predictions.jsonl").read_text())
    assert set(record["shares"]) <= set(camvid.LABELS.names)


def test_videos_become_frames_and_a_video(tmp_path: Path, file: Path) -> None:
    pytest.importorskip("av")
    from ccgpu.train.data.video import Video, VideoWriter

    with VideoWriter(tmp_path / "video.mp4", Fraction(10)) as writer:
        for number in range(5):
            writer.add(image(49, 65, seed=number))
    out = tmp_path / "out"
    assert run("--checkpoint", file, "--out", out, tmp_path / "video.mp4", "--every", "2") == 0
    assert sorted(path.name for path in (out / "ids" / "video").iterdir()) == ["000000.png", "000002.png", "000004.png"]
    assert Image.open(out / "ids" / "video" / "000002.png").size == (64, 48)
    with Video(out / "overlays" / "video.mp4") as video:
        assert video.rate == 5
        frames = list(video)
    assert [frame.shape for frame in frames] == [(48, 64, 3)] * 3
    shown = np.asarray(Image.open(out / "overlays" / "video" / "000004.jpg"), dtype=float)
    assert np.abs(frames[2] - shown).mean() < 25
    (tmp_path / "broken.mp4").write_bytes((tmp_path / "video.mp4").read_bytes()[:100])
    (tmp_path / "text.avi").write_text("no video")
    assert run("--checkpoint", file, "--out", out, tmp_path / "broken.mp4", tmp_path / "text.avi") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jpg"], "there is none"),
        (["IMAGE", "--checkpoint", "nowhere.pt"], "nowhere.pt"),
        (["IMAGE", "--window", "-1"], "--window must be 0 or more"),
        (["IMAGE", "--every", "0"], "--every must be 1 or more"),
        (["IMAGE", "--opacity", "2"], "--opacity must be from 0 to 1"),
        (["IMAGE", "--short-side", "0"], "short_side"),
        (["IMAGE", "--ms", "-1"], "scales must be"),
        (["IMAGE", "--dataset", "ade20k"], "must have the network's 11 classes, got ade20k with 150"),
        (["IMAGE", "--device", "cuda"], "cuda"),
    ],
)
def test_errors_are_told_before_anything_is_written(
    arguments: list[str], message: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if message == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    source = str(save(tmp_path / "a.png", image()))
    flags = [source if argument == "IMAGE" else argument for argument in arguments]
    given = [] if "--checkpoint" in arguments else ["--checkpoint", file]
    assert run(*given, "--out", tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_backbone_alone_cannot_predict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ccgpu.models.backbones import build_backbone

    torch.save(build_backbone("resnet18", stem="7x7").state_dict(), tmp_path / "resnet18.pth")
    source = save(tmp_path / "a.png", image())
    assert run("--checkpoint", tmp_path / "resnet18.pth", "--out", tmp_path / "out", source) == 2
    assert "backbone alone" in capsys.readouterr().err


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data with real images")
def test_real_images(file: Path, tmp_path: Path) -> None:
    folder = SHARED / "samples"
    count = sum(path.suffix in (".jpg", ".png") for path in folder.rglob("*"))
    out = tmp_path / "out"
    assert run("--checkpoint", file, "--out", out, folder, "--write", "ids", "--short-side", "64") == 0
    assert len((out / "predictions.jsonl").read_text().splitlines()) == count


# The sheet


def test_contact_sheet_holds_every_cell_and_the_legend() -> None:
    cells = [(f"image number {index}", Image.new("RGB", (40, 30), (index, 0, 255))) for index in range(5)]
    legend = [(f"class {index}", (0, 200, index)) for index in range(12)]
    sheet = np.asarray(contact_sheet(cells, legend, 3))
    for index in range(5):
        assert (sheet == (index, 0, 255)).all(axis=-1).sum() == 40 * 30
    for index in range(12):
        assert (sheet == (0, 200, index)).all(axis=-1).any()
