"""ccgpu predict: from images, folders and videos to masks, overlays, label ids and a contact sheet."""

from __future__ import annotations

import io
import json
import signal
import struct
import tracemalloc
import weakref
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ccgpu.models.ccnet import CCNet
from ccgpu.models.image_files import read_image
from ccgpu.models.legend import draw_legend, entries, text_size
from ccgpu.models.prediction import Prediction
from ccgpu.models.segmentation import Segmentation
from ccgpu.models.segmenter import Segmenter
from ccgpu.train import camvid, lip, predict
from ccgpu.train.data.pairs import Pair
from ccgpu.train.data.reading import read_pair
from ccgpu.train.prediction_files import PredictionFiles
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
    mask = Image.open(out / "masks" / "a.png")
    assert mask.mode == "P"
    assert np.array_equal(np.asarray(mask), labels.to_file[classes])
    assert np.array_equal(np.asarray(mask.convert("RGB")), labels.colours[classes])
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


def test_python_gives_the_same_bits_as_the_command(file: Path, tmp_path: Path) -> None:
    sources = [save(tmp_path / f"{seed}.png", image(90, 80 + seed, seed=seed)) for seed in range(3)]
    for number, (flags, options) in enumerate(
        [
            ((), {}),
            (("--tile", 64), {"tile": 64}),
            (("--scales", 0.5, 1, "--flip", "--short-side", 50), {"scales": (0.5, 1), "flip": True, "short_side": 50}),
        ]
    ):
        out = tmp_path / f"out{number}"
        assert run("--checkpoint", file, "--out", out, *sources, *flags) == 0
        segmenter = Segmenter.load(file)
        for source in sources:
            result = segmenter.predict(source, **options)
            ids = np.asarray(Image.open(out / "ids" / source.name))
            assert np.array_equal(camvid.LABELS.to_file[result.classes], ids)
            written = result.save(tmp_path / "mask.png").read_bytes()
            assert (out / "masks" / source.name).read_bytes() == written
            overlay = Image.open(out / "overlays" / source.with_suffix(".jpg").name)
            buffer = io.BytesIO()
            result.overlay().save(buffer, "JPEG", quality=92)
            assert np.array_equal(np.asarray(overlay), np.asarray(Image.open(buffer)))


def test_masks_are_label_files(file: Path, tmp_path: Path) -> None:
    source = save(tmp_path / "a.png", image())
    assert run("--checkpoint", file, "--out", tmp_path / "out", source) == 0
    pair = Pair(source, tmp_path / "out" / "masks" / "a.png", "a")
    _, classes = read_pair(pair, camvid.LABELS)
    assert np.array_equal(classes, expected_classes(CCNet.from_checkpoint(file), image()))


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
    assert run(*given, "--out", tmp_path / "out", "--scales", "1", "1.5", "--flip") == 0
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
    assert run("--checkpoint", file, "--out", tmp_path / "2", tmp_path / "broken.mp4", tmp_path / "text.avi") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jpg"], "there is none"),
        (["IMAGE", "--checkpoint", "nowhere.pt"], "nowhere.pt"),
        (["IMAGE", "--tile", "-1"], "--tile must be 0, or 32 or more, got -1"),
        (["IMAGE", "--tile", "31"], "--tile must be 0, or 32 or more, got 31"),
        (["IMAGE", "--every", "0"], "--every must be 1 or more"),
        (["IMAGE", "--max-pixels", "0"], "--max-pixels must be 1 or more"),
        (["IMAGE", "--opacity", "2"], "--opacity must be from 0 to 1"),
        (["IMAGE", "--short-side", "0"], "--short-side must be from 1 to 32768 pixels, got 0"),
        (["IMAGE", "--scales", "-1"], "--scales must be numbers from 0.01 to 20.0"),
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


@pytest.mark.parametrize(
    ("prediction", "flags", "told"),
    [
        (
            {},
            (),
            "images: at their own size (--short-side resizes them); those of more than 2 x 1024 x 1024 pixels in tiles "
            "of 1024 x 1024 (--tile)",
        ),
        ({}, ("--tile", 0), "images: at their own size (--short-side resizes them); none is cut (--tile 0)"),
        (
            {"short_side": 24},
            ("--tile", 64),
            "images: resized to a short side of 24 pixels (as in the network's training; --short-side changes it); "
            "those of more than 2 x 64 x 64 pixels are shrunk to so many first (--tile)",
        ),
        (
            {"fit": [24, 32]},
            ("--tile", 0, "--scales", 0.5, 1, "--flip"),
            "images: resized to fit into 24 x 32 pixels (as in the network's training; --short-side changes it), at "
            "the scales 0.5 1, also flipped; none is cut (--tile 0)",
        ),
        (
            {"fit": [24, 32]},
            ("--tile", 0, "--short-side", 30),
            "images: resized to a short side of 30 pixels (--short-side); none is cut (--tile 0)",
        ),
    ],
)
def test_the_size_and_the_classes_are_told(
    prediction: dict[str, Any],
    flags: tuple[Any, ...],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_network(tmp_path / "net.pt", prediction=prediction)
    source = save(tmp_path / "a.png", image())
    monkeypatch.chdir(tmp_path)
    assert run("--checkpoint", "net.pt", source, *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert told in lines
    assert f"classes: 11: {', '.join(camvid.LABELS.names)}" in lines
    assert (tmp_path / "predicted" / "masks" / "a.png").exists(), "the default of --out"


# Legends


def test_overlays_have_a_legend_of_the_classes_that_occur(file: Path, tmp_path: Path) -> None:
    source = save(tmp_path / "a.png", image(80, 100))
    given = ("--checkpoint", file, source, "--opacity", 0)
    assert run(*given, "--out", tmp_path / "plain") == 0
    assert run(*given, "--out", tmp_path / "out", "--legend") == 0
    overlay = np.asarray(Image.open(tmp_path / "out" / "overlays" / "a.jpg")).astype(int)
    plain = np.asarray(Image.open(tmp_path / "plain" / "overlays" / "a.jpg"))
    assert overlay.shape[0] > 80
    assert np.abs(overlay[:72, :96] - plain[:72, :96]).max() < 8, "no pixel is covered"
    occurring = np.unique(expected_classes(CCNet.from_checkpoint(file), image(80, 100)))
    for index, colour in enumerate(camvid.LABELS.colours):
        shown = (np.abs(overlay[80:] - colour).max(axis=-1) < 12).sum() > 60
        assert shown == (index in occurring), camvid.LABELS.names[index]


def test_videos_have_a_legend_of_all_classes(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    from ccgpu.train.data.video import Video, VideoWriter

    with VideoWriter(tmp_path / "video.mp4", Fraction(10)) as writer:
        for number in range(2):
            writer.add(image(48, 64, seed=number))
    out = tmp_path / "out"
    assert run("--checkpoint", file, "--out", out, tmp_path / "video.mp4", "--legend") == 0
    with Video(out / "overlays" / "video.mp4") as video:
        shapes = {frame.shape for frame in video}
    legend = draw_legend(entries(camvid.LABELS), 64, text_size(48, 64))
    frame = Image.open(out / "overlays" / "video" / "000000.jpg")
    assert frame.size == (legend.width, 48 + legend.height)
    assert shapes == {(frame.height // 2 * 2, frame.width // 2 * 2, 3)}
    assert np.abs(np.asarray(frame).astype(int)[48:] - np.asarray(legend)).mean() < 8


# What exists already


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_results_are_replaced_only_when_asked(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = [save(tmp_path / name, image(seed=seed)) for seed, name in enumerate(["a.png", "b.png"])]
    out = tmp_path / "out"
    given = ("--checkpoint", file, "--out", out)
    assert run(*given, *photos) == 0
    before = contents(out)
    assert run(*given, photos[0]) == 2
    error = capsys.readouterr().err
    assert "--out must be new, got existing results" in error
    assert "predictions.jsonl" in error
    assert "--overwrite" in error
    assert contents(out) == before
    # The results of b.png stay, but nothing takes them for results of this run, and they are named.
    assert run(*given, photos[0], "--overwrite", "--opacity", "0.2") == 0
    shown = capsys.readouterr().out
    assert "holds 3 files that this run did not write, such as" in shown
    (record,) = (json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines())
    assert record["name"] == "a"
    assert contents(out)["ids/b.png"] == before["ids/b.png"]
    assert contents(out)["overlays/a.jpg"] != before["overlays/a.jpg"]
    assert contents(out)["sheet.jpg"] != before["sheet.jpg"]
    # A file of one kind alone is a result too.
    (tmp_path / "other" / "ids").mkdir(parents=True)
    (tmp_path / "other" / "ids" / "a.png").write_text("kept")
    assert run("--checkpoint", file, "--out", tmp_path / "other", photos[0]) == 2
    assert contents(tmp_path / "other") == {"ids/a.png": b"kept"}


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_an_input_is_never_replaced(
    overwrite: tuple[str, ...], file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    source = save(out / "masks" / "ok.png", image())
    before = contents(out)
    assert run("--checkpoint", file, source, "--out", out, *overwrite) == 2
    assert "--out must not replace what the command reads, got" in capsys.readouterr().err
    assert run("--checkpoint", file, out, "--out", out, *overwrite) == 2
    assert "--out must be another folder than the inputs'" in capsys.readouterr().err
    assert contents(out) == before
    assert run("--checkpoint", file, source, "--out", source, *overwrite) == 2
    assert "--out must be a folder, got the file" in capsys.readouterr().err


def test_results_inside_the_folder_of_inputs_are_no_inputs(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    save(photos / "a.png", image())
    given = ("--checkpoint", file, photos, "--out", photos / "out", "--overwrite")
    assert run(*given) == 0
    capsys.readouterr()
    assert run(*given) == 0
    assert "the files below --out are results, not inputs: 4 are left out" in capsys.readouterr().out
    assert len((photos / "out" / "predictions.jsonl").read_text().splitlines()) == 1
    assert run("--checkpoint", file, photos / "*" / "ids" / "*", "--out", photos / "out") == 2
    assert "INPUT must name other files than the results in --out" in capsys.readouterr().err


# What is odd


def test_what_is_odd_about_images_is_told(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = image()
    deep = save(tmp_path / "deep.png", pixels[..., 0].astype(np.uint16) << 4)
    clear = save(tmp_path / "clear.png", np.dstack([pixels, pixels[..., :1] // 2]))
    moving = tmp_path / "moving.gif"
    frames = [Image.fromarray(image(seed=seed)) for seed in range(3)]
    frames[0].save(moving, save_all=True, append_images=frames[1:])
    given = ("--checkpoint", file, "--write", "ids")
    assert run(*given, "--out", tmp_path / "out", deep, clear, moving) == 0
    told = capsys.readouterr().out
    assert f"1 images have transparent pixels, read as white, such as {clear}" in told
    assert f"1 images hold several images, of which the first is read, such as {moving}" in told
    assert f"the 1 images of 16 bits, such as {deep}, have no value above 4095" in told
    assert "--value-range 0 4095" in told
    bright = save(tmp_path / "bright.png", pixels[..., 0].astype(np.uint16) << 8)
    assert run(*given, "--out", tmp_path / "mixed", deep, bright) == 0
    assert f"1 of the 2 images of 16 bits, such as {deep}, have no value above 4095" in capsys.readouterr().out
    assert run(*given, "--out", tmp_path / "ranged", "--value-range", 0, 4095, deep) == 0
    assert "warning" not in capsys.readouterr().out
    scaled = np.rint((pixels[..., 0].astype(int) << 4) * (255 / 4095)).astype(np.uint8)
    expected = camvid.LABELS.to_file[expected_classes(CCNet.from_checkpoint(file), np.dstack([scaled] * 3))]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "ranged" / "ids" / "deep.png")), expected)


def test_float_images_are_read_with_the_range_that_the_message_asks_for(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(tmp_path / "heat.tif", image()[..., 0].astype(np.float32))
    given = ("--checkpoint", file, "--out", tmp_path / "out", source)
    assert run(*given) == 1
    assert "--value-range LOW HIGH" in capsys.readouterr().err
    assert run(*given, "--value-range", 0, 255) == 0


# Inputs that fail


def test_nothing_is_said_of_others_where_no_input_was_predicted(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text("no image")
    assert run("--checkpoint", file, "--out", tmp_path / "out", tmp_path / "a.png") == 1
    assert "predict: the input failed, see above" in capsys.readouterr().err
    assert run("--checkpoint", file, "--out", tmp_path / "2", tmp_path / "a.png", tmp_path / "b.png") == 1
    error = capsys.readouterr().err
    assert "predict: all 2 inputs failed, see above" in error
    assert "the others are in" not in error


def test_a_run_without_results_leaves_the_folder_new(file: Path, tmp_path: Path) -> None:
    source = save(tmp_path / "a.png", image())
    given = ("--checkpoint", file, "--out", tmp_path / "out", source)
    assert run(*given, "--max-pixels", 100) == 1
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert run(*given) == 0


def test_files_that_are_damaged_but_decode_fail(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pillow fills the rest of a JPEG file with grey, and compares no checksums of a PNG file's pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    for name in ("cut.jpg", "changed.png"):
        Image.fromarray(noise).save(tmp_path / name, compress_level=0)
    content = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2] + b"\xff\xd9")
    changed = bytearray((tmp_path / "changed.png").read_bytes())
    changed[-13] ^= 1  # of the checksum of the pixels, in front of the closing chunk
    (tmp_path / "changed.png").write_bytes(changed)
    out = tmp_path / "out"
    assert run("--checkpoint", file, "--out", out, tmp_path / "cut.jpg", tmp_path / "changed.png") == 1
    error = capsys.readouterr().err
    assert "cut.jpg, which does not decode (pixels are missing before its end marker); copy" in error
    assert "changed.png, which does not decode (the checksum of a chunk 'IDAT' is wrong); copy" in error
    assert "all 2 inputs failed" in error


@pytest.mark.parametrize(
    ("failure", "told", "traceback"),
    [
        (MemoryError(), "out of memory (MemoryError); use a smaller --tile", False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory (CUDA out of memory. Tried)", False),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate"), "out of memory ([enforce]", False),
        (OSError(36, "File name too long"), "[Errno 36] File name too long", False),
        (struct.error("unpack requires 4 bytes"), "unexpected error: unpack requires 4 bytes; please report", True),
        (TypeError("a mistake"), "unexpected TypeError: a mistake", True),
    ],
)
def test_an_input_that_fails_does_not_stop_the_others(
    failure: Exception,
    told: str,
    traceback: bool,
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in "abc":
        save(tmp_path / "photos" / f"{name}.png", image(8, 4 if name == "b" else 12))
    original = Segmenter.predict_decoded

    def call(self: Segmenter, picture: Image.Image, **options: Any) -> Segmentation:
        if picture.width == 4:
            raise failure
        return original(self, picture, **options)

    monkeypatch.setattr(Segmenter, "predict_decoded", call)
    assert run("--checkpoint", file, "--out", tmp_path / "out", tmp_path / "photos") == 1
    error = capsys.readouterr().err
    assert f"b.png: {told}" in error
    assert ("Traceback" in error) == traceback
    assert "1 of 3 inputs failed" in error
    assert sorted(path.name for path in (tmp_path / "out" / "ids").iterdir()) == ["a.png", "c.png"]


def test_an_image_that_ran_out_of_memory_is_freed_before_the_next(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        save(tmp_path / "photos" / f"{name}.png", image(8, 12))
    held: list[weakref.ref[Image.Image]] = []
    failure = MemoryError()  # kept here, as loggers and debuggers keep exceptions

    def call(self: Segmenter, picture: Image.Image, **options: Any) -> Segmentation:
        assert all(reference() is None for reference in held)
        held.append(weakref.ref(picture))
        raise failure

    monkeypatch.setattr(Segmenter, "predict_decoded", call)
    assert run("--checkpoint", file, "--out", tmp_path / "out", tmp_path / "photos") == 1
    assert len(held) == 2


def test_a_full_disk_stops_the_command(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        save(tmp_path / "photos" / f"{name}.png", image())

    def full_disk(path: Path, content: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("ccgpu.train.data.submission.write_atomically", full_disk)
    assert run("--checkpoint", file, "--out", tmp_path / "out", tmp_path / "photos") == 1
    error = capsys.readouterr().err
    assert error.count("No space left on device") == 1
    assert error.splitlines()[-1].endswith("make room or give access, then run the command again")


def test_scores_that_are_not_finite_fail_their_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Normalised, white is 0 and black -1e38 here: the first convolution of a black image overflows."""
    write_network(tmp_path / "net.pt", mean=(255, 255, 255), std=(1e-36, 1e-36, 1e-36))
    save(tmp_path / "black.png", np.zeros((24, 24, 3), np.uint8))
    save(tmp_path / "white.png", np.full((24, 24, 3), 255, np.uint8))
    out = tmp_path / "out"
    given = ("--checkpoint", tmp_path / "net.pt", tmp_path / "black.png", tmp_path / "white.png")
    assert run(*given, "--out", out) == 1
    error = capsys.readouterr().err
    assert "black.png: the network's scores of an image must be finite" in error
    assert "--amp bf16 or off" in error
    assert [path.name for path in (out / "ids").iterdir()] == ["white.png"]


def test_half_a_video_fails_and_keeps_its_frames(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    av = pytest.importorskip("av")
    whole = tmp_path / "whole.avi"
    with av.open(str(whole), mode="w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        frames = [av.VideoFrame.from_ndarray(image(48, 64, seed=seed), format="rgb24") for seed in range(12)]
        for packet in [*(packet for frame in frames for packet in stream.encode(frame)), *stream.encode()]:
            container.mux(packet)
    content = whole.read_bytes()
    (tmp_path / "half.avi").write_bytes(content[: (content.index(b"movi") + content.index(b"idx1")) // 2])
    save(tmp_path / "a.png", image())
    given = ("--checkpoint", file, tmp_path / "half.avi", tmp_path / "a.png", "--short-side", "24")
    assert run(*given, "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    found = sorted(path.name for path in (tmp_path / "out" / "ids" / "half").iterdir())
    assert f"which ends after {len(found)} of 12 frames" in error
    assert f"The files of {len(found)} frames are in" in error
    assert 0 < len(found) < 12
    assert (tmp_path / "out" / "ids" / "a.png").exists()


def test_ctrl_c_while_the_network_is_read_is_no_error(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "read_network", interrupted)
    source = save(tmp_path / "a.png", image())
    assert run("--checkpoint", file, "--out", tmp_path / "out", source) == 130
    assert capsys.readouterr().err == "predict: stopped\n"
    assert not (tmp_path / "out").exists()


# Large images


def test_max_pixels_is_a_limit_that_the_message_names(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(tmp_path / "a.png", image(40, 56))
    given = ("--checkpoint", file, source)
    assert run(*given, "--out", tmp_path / "1", "--max-pixels", "2239") == 1
    assert "--max-pixels" in capsys.readouterr().err
    assert run(*given, "--out", tmp_path / "2", "--max-pixels", "2240") == 0


def test_tiles_show_their_progress_and_stop_at_ctrl_c(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(tmp_path / "a.png", image(80, 100))
    given = ("--checkpoint", file, source, "--tile", "32")
    assert run(*given, "--out", tmp_path / "1") == 0
    assert "/12 [" in capsys.readouterr().err, "3 x 4 tiles"
    seen = []

    def logits(self: Segmenter, images: torch.Tensor) -> torch.Tensor:
        seen.append(images.shape)
        if len(seen) == 3:
            signal.raise_signal(signal.SIGINT)
        return images

    monkeypatch.setattr(Segmenter, "logits", logits)
    assert run(*given, "--out", tmp_path / "2") == 130
    assert len(seen) == 3
    assert not list((tmp_path / "2" / "ids").iterdir())


def test_ctrl_c_leaves_no_video_that_looks_whole(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av")
    from ccgpu.train.data.video import VideoWriter

    with VideoWriter(tmp_path / "video.mp4", Fraction(10)) as writer:
        for number in range(5):
            writer.add(image(48, 64, seed=number))
    original = Segmenter.predict_decoded
    calls = []

    def call(self: Segmenter, picture: Image.Image, **options: Any) -> Segmentation:
        calls.append(picture.size)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return original(self, picture, **options)

    monkeypatch.setattr(Segmenter, "predict_decoded", call)
    out = tmp_path / "out"
    assert run("--checkpoint", file, "--out", out, tmp_path / "video.mp4") == 130
    assert sorted(path.name for path in (out / "ids" / "video").iterdir()) == ["000000.png", "000001.png"]
    assert [path.name for path in (out / "overlays").iterdir()] == ["video"]


def test_an_overlay_too_wide_for_jpeg_is_a_png(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def one_class(self: Segmenter, picture: Image.Image, **options: Any) -> Segmentation:
        return Segmentation(np.zeros((picture.height, picture.width), np.uint8), self.labels, picture)

    monkeypatch.setattr(Segmenter, "predict_decoded", one_class)
    pixels = np.tile(image(8, 100), (1, 656, 1))
    source = save(tmp_path / "a.png", pixels)
    assert run("--checkpoint", file, "--out", tmp_path / "out", source, "--opacity", "0") == 0
    assert "because JPEG ends at 65500 pixels a side" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out" / "overlays").iterdir()] == ["a.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "overlays" / "a.png")), pixels)


def test_memory_of_a_large_image_is_that_of_its_pixels(tmp_path: Path) -> None:
    """What numpy and zlib take beside Pillow's image; a float32 copy or int64 classes alone are 8 bytes a pixel."""
    height, width = 3000, 3000
    labels = camvid.LABELS
    picture = Image.new("RGB", (width, height), (200, 30, 90))
    classes = np.zeros((height, width), np.uint8)
    classes[: height // 2] = 3
    for kind in predict.KINDS:
        (tmp_path / kind).mkdir()
    tracemalloc.start()
    files = PredictionFiles(tmp_path, predict.KINDS, labels, 0.5)
    files.write("a", "a.jpg", Segmentation(classes, labels, picture))
    files.finish()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * height * width
    assert np.array_equal(np.asarray(Image.open(tmp_path / "masks" / "a.png")), labels.to_file[classes])


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
