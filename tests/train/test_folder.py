"""A folder of images and masks is a dataset: train, resume, evaluate, predict; and what has changed in it since."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ccgpu.models import checkpoint
from ccgpu.models.labels import Labels
from ccgpu.train import evaluate, folder, predict
from ccgpu.train.data.pairs import Pair
from ccgpu.train.data.reading import read_pair
from ccgpu.train.runs import checkpoints, records
from tests.train.folders import COLOURS, TINY, file_in, scene, write_folder
from tests.train.training import told

ROOT = Path(__file__).resolve().parents[2]
IDS = np.array([3, 7, 1], dtype=np.uint8)


def train(data: Path, out: Path, *flags: str) -> int:
    return folder.main([*TINY, "--data", str(data), "--out", str(out), *flags])


def saved(out: Path) -> dict[str, Any]:
    return dict(checkpoints.read_checkpoint(out / "last.pt"))


@pytest.fixture(scope="module")
def ponds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of 10 images with masks of colours, and a finished run on it; tests change copies."""
    root = tmp_path_factory.mktemp("ponds")
    data = write_folder(root / "data", 10)
    assert train(data, root / "run", "--save-every", "1") == 0
    return data, root / "run"


@pytest.fixture
def copied(ponds: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """Copies of the folder and of a run on it, to be changed."""
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(ponds[0], data)
    shutil.copytree(ponds[1], out)
    return data, out


def test_what_a_folder_was_taken_for_is_saved_with_the_run(ponds: tuple[Path, Path]) -> None:
    data, out = ponds
    content = saved(out)
    assert content["dataset"] == "folder"
    assert content["labels"]["coding"] == "colours"
    assert content["labels"]["ids"] == [0x000000, 0x1EA03C, 0xC81E1E]
    names = content["folder"]["split"]["names"]
    assert (len(names["train"]), len(names["val"])) == (8, 2)
    report = (out / "dataset.txt").read_text()
    assert report.strip() == content["folder"]["report"]
    for line in (f"{data}: images/ with masks/", "images: 10 of 56x40 pixels, 8-bit RGB", "split: 8 to train on, 2 to"):
        assert line in report
    assert "class 1  #1ea03c" in report
    assert "--mode whole" in report
    assert "--crop" not in report  # a flag gave it
    (pair,) = [Pair(data / "images" / "p00.jpg", data / "masks" / "p00.png", "p00")]
    classes = read_pair(pair, Labels.from_plain(content["labels"]))[1]
    assert np.array_equal(classes, np.array([0, 2, 1])[scene(0)[1]])


def test_a_run_is_evaluated_predicted_with_and_its_predictions_are_masks(
    ponds: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = ponds
    record, masks = tmp_path / "scores.jsonl", tmp_path / "masks"
    flags = ["--checkpoint", str(out / "last.pt"), "--workers", "0", "--record", str(record)]
    assert evaluate.main([*flags, "--save-predictions", str(masks)]) == 0
    assert records.read_records(record)[0]["matrix"] == records.read_records(out / "metrics.jsonl")[-1]["matrix"]
    names = saved(out)["folder"]["split"]["names"]["val"]
    assert sorted(path.stem for path in masks.iterdir()) == names
    # The predictions with the images are a folder of this kind.
    shutil.copytree(data / "images", tmp_path / "again" / "images")
    for path in (tmp_path / "again/images").iterdir():
        if path.stem not in names:
            path.unlink()
    shutil.copytree(masks, tmp_path / "again" / "masks")
    capsys.readouterr()
    assert evaluate.main([*flags, "--data", str(tmp_path / "again")]) == 0
    text = capsys.readouterr().out
    assert "another folder than the run's: evaluated is all of it, because it has no val split" in text
    assert "pixel accuracy 100.00 %" in text
    predicted = ["--checkpoint", str(out / "last.pt"), str(data / "images"), "--out", str(tmp_path / "predicted")]
    assert predict.main([*predicted, "--device", "cpu"]) == 0
    with Image.open(tmp_path / "predicted/ids/p00.png") as image:
        assert {colour for _, colour in image.convert("RGB").getcolors()} <= {tuple(c) for c in COLOURS.tolist()}


def test_resume_goes_on_with_the_split_and_leaves_new_images_out(
    ponds: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(ponds[0], data)
    out = tmp_path / "run"
    assert train(data, out, "--iterations", "2", "--save-every", "1", "--eval-every", "1") == 0
    shutil.copy(out / "previous.pt", tmp_path / "one.pt")
    half = tmp_path / "half"
    half.mkdir()
    shutil.copy(tmp_path / "one.pt", half / "last.pt")
    write_folder(data, 30, first=10)
    capsys.readouterr()
    assert folder.main(["--resume", str(half / "last.pt"), "--out", str(tmp_path / "other"), "--device", "cpu"]) == 0
    assert "note: 30 images are new in " in capsys.readouterr().out
    one, other = saved(out), saved(tmp_path / "other")
    assert one["folder"] == other["folder"]
    assert one["iteration"] == other["iteration"] == 2
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])


def test_a_run_without_a_checkpoint_begins_anew_with_the_recipe_that_it_had(
    copied: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = copied[1]
    before = saved(out)
    for path in (*out.glob("*.pt"), out / "results.txt"):
        path.unlink()
    assert folder.main(["--resume", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "no checkpoint in" in shown
    for wrong in ("--backbone", "--crop", "--batch", "--iterations", "depart from the recipe"):
        assert wrong not in shown
    after = saved(out)
    assert (after["folder"]["recipe"], after["settings"]) == (before["folder"]["recipe"], before["settings"])
    assert all(torch.equal(value, after["model"][name]) for name, value in before["model"].items())


def test_images_of_the_split_that_are_gone_are_told(
    copied: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = copied
    name = saved(out)["folder"]["split"]["names"]["val"][0]
    (data / "masks" / f"{name}.png").unlink()
    flags = ["--checkpoint", str(out / "last.pt"), "--data", str(data), "--workers", "0"]
    assert folder.main(["--resume", "--out", str(out), "--data", str(data)]) == 2
    assert "got 1 of 2 for val missing; put them back" in capsys.readouterr().err
    assert evaluate.main(flags) == 2
    assert "missing" in capsys.readouterr().err


def test_a_moved_folder_is_recognised(copied: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    data, out = copied
    assert evaluate.main(["--checkpoint", str(out / "last.pt"), "--data", str(data), "--workers", "0"]) == 0
    text = capsys.readouterr().out
    assert "is taken for its folder at another place" in text
    assert "folder, 2 images" in text


def classes_csv(data: Path) -> None:
    (data / "classes.csv").write_text("name,colour\nmud,#000000\nreed,#1ea03c\nwater,#c81e1e\n")


def other_mask(data: Path) -> None:
    for path in (data / "masks").iterdir():
        Image.new("RGB", (56, 40), (1, 2, 3)).save(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (classes_csv, "got 3 classes (mud #000000, reed #1ea03c, water #c81e1e) instead of 3 classes (class 0 #000000"),
        (other_mask, "holds the colours #010203, but the colours are #000000, #1ea03c, #c81e1e"),
    ],
)
def test_other_classes_and_other_masks_are_refused(
    change: Callable[[Path], None],
    message: str,
    copied: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, out = copied
    change(data)
    assert folder.main(["--resume", "--out", str(out), "--data", str(data)]) == 2
    assert message in capsys.readouterr().err
    assert evaluate.main(["--checkpoint", str(out / "last.pt"), "--data", str(data), "--workers", "0"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_ids_with_names_and_a_split_of_their_own(suffix: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_folder(data, 4, images="images/train", masks="labels/train", suffix=suffix, values=IDS)
    write_folder(data, 2, images="images/val", masks="labels/val", suffix=suffix, values=IDS, first=4)
    assert train(data, tmp_path / "run", "--classes", "mud", "reed", "water") == 0
    content = saved(tmp_path / "run")
    assert content["labels"]["names"] == ["mud", "reed", "water"]
    assert content["labels"]["ids"] == [1, 3, 7]
    assert "1 is mud, 3 is reed, 7 is water" in content["folder"]["report"]
    flags = ["--checkpoint", str(tmp_path / "run/last.pt"), "--workers", "0"]
    assert evaluate.main([*flags, "--split", "train", "--save-predictions", str(tmp_path / "out")]) == 0
    assert len([*(tmp_path / "out").iterdir()]) == 4
    assert folder.main(["--resume", "--out", str(tmp_path / "run"), "--classes", "a", "b", "c"]) == 2


def test_subfolders_keep_their_names(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for place in ("a", "b"):
        write_folder(data, 3, images=f"images/{place}", masks=f"masks/{place}")
    assert train(data, tmp_path / "run") == 0
    names = saved(tmp_path / "run")["folder"]["split"]["names"]
    assert sorted([*names["train"], *names["val"]]) == [f"{place}/p0{index}" for place in "ab" for index in range(3)]
    flags = ["--checkpoint", str(tmp_path / "run/last.pt"), "--workers", "0"]
    assert evaluate.main([*flags, "--save-predictions", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / f"{names['val'][0]}.png").is_file()


def soften(data: Path) -> None:
    for path in (data / "masks").iterdir():
        Image.open(path).rotate(10, Image.Resampling.BICUBIC).save(path)


def as_jpeg(data: Path) -> None:
    for path in (data / "masks").iterdir():
        Image.open(path).save(path, format="JPEG")


def named_jpeg(data: Path) -> None:
    for path in (data / "masks").iterdir():
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()


def mixed(data: Path) -> None:
    Image.fromarray(IDS[scene(0)[1]]).save(data / "masks/p00.png")


def damaged(data: Path) -> None:
    path = data / "images/p01.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    Image.new("L", (9, 9)).save(data / "masks/p02.png")


def unmatched(data: Path) -> None:
    (data / "masks/p01.png").rename(data / "masks/q01.png")


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (soften, ["must hold at most 64 colours, got", "resized or drawn with soft edges"]),
        (as_jpeg, ["got 10 problems in 10 pairs", "a JPEG file, which changes values where it compresses"]),
        (named_jpeg, ["got 10 problems in 10 pairs", "a JPEG file, which changes values where it compresses"]),
        (mixed, ["got 9 of colours, such as", "and 1 of grey or with a palette"]),
        (damaged, ["got 2 problems", "p01.jpg: truncated", "p02.png: 9x9 pixels, but the image has 56x40"]),
        (unmatched, ["got 2 of 11 without", "p01.jpg has no label file", "q01.png has no image"]),
        (lambda data: shutil.rmtree(data / "masks"), ["got images alone; add a folder of masks"]),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_before_anything_is_written(
    change: Callable[[Path], None],
    messages: list[str],
    ponds: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "data"
    shutil.copytree(ponds[0], data)
    change(data)
    assert train(data, tmp_path / "run") == 2
    text = capsys.readouterr().err
    assert [message for message in messages if message not in text] == []
    assert not (tmp_path / "run").exists()


def test_the_run_folder_is_named_after_the_folder(tmp_path: Path) -> None:
    assert folder.default_out({"data": str(tmp_path / "my ponds!")}) == Path("runs/my-ponds")
    assert folder.default_out({"data": str(tmp_path / "ponds") + "/"}) == Path("runs/ponds")
    # Trained on from its own run, which lies in runs/ponds.
    given = {"data": str(tmp_path / "ponds"), "init": str(tmp_path / "runs" / "ponds" / "best.pt")}
    assert folder.default_out(given) == Path("runs/ponds-from-ponds")


def test_a_run_folder_among_the_images_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "ponds")
    monkeypatch.chdir(tmp_path / "ponds" / "images")
    assert folder.main(["--data", "..", *TINY]) == 2
    assert "--out must lie outside of the images and masks, got runs/ponds" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("flags", "message"), [((), "--data must name"), (("--val-share", "1"), "--val-share must be")]
)
def test_flags_are_checked(
    flags: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(write_folder(tmp_path / "data", 2))] if flags else []
    assert folder.main([*TINY, *data, *flags, "--out", str(tmp_path / "run")]) == 2
    assert message in told(capsys, "train")


def test_two_processes_open_a_folder_and_take_the_same_for_it(ponds: tuple[Path, Path], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "tests.train.narrow",
        "train",
    ]
    words = [str(ponds[0]), "--out", str(tmp_path / "run"), *TINY, "--save-every", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("images: 10 of 56x40 pixels") == 1
    one, two = saved(ponds[1]), saved(tmp_path / "run")
    assert one["folder"] == two["folder"]
    close = {"rtol": 1e-3, "atol": 1e-4}
    assert all(
        torch.allclose(one["model"][name].double(), two["model"][name].double(), **close) for name in one["model"]
    )
    file_in(tmp_path / "bad", "images/a.jpg").touch()
    words[0], words[2] = str(tmp_path / "bad"), str(tmp_path / "other")
    done = subprocess.run([*command, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.count("got images alone; add a folder of masks") == 1


def test_checkpoints_without_the_key_are_told(ponds: tuple[Path, Path], tmp_path: Path) -> None:
    content = saved(ponds[1])
    del content["folder"]
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="no folder"):
        checkpoint.read(tmp_path / "last.pt")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (("folder", "labels"), 0),
        (("folder", "images"), [1.0]),
        (("folder", "images", "channels"), 3.5),
        (("folder", "split", "parts", "train"), [1, 2]),
        (("folder", "split", "names", "val"), 3.5),
        (("folder", "recipe"), 3.5),
        (("folder", "recipe", "crop"), -1),
        (("folder", "mean"), 1),
        (("network", "std"), -1),
    ],
    ids=str,
)
def test_a_checkpoint_that_was_changed_is_told(
    key: tuple[str, ...], value: Any, copied: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    content = part = saved(copied[1])
    for name in key[:-1]:
        part = part[name]
    part[key[-1]] = value
    torch.save(content, copied[1] / "last.pt")
    assert folder.main(["--resume", "--out", str(copied[1])]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("train: ")
    assert "--checkpoint must say what the run's folder was taken for" in line or f"{key[-1]} {value}" in line


def test_grey_images_of_16_bits_are_read_as_they_are(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", 5, values=IDS)
    for path in (data / "images").iterdir():
        deep = np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 100
        path.unlink()
        Image.fromarray(deep).save(path.with_suffix(".png"))
    assert train(data, tmp_path / "run") == 0
    content = saved(tmp_path / "run")
    assert content["images"] == {"channels": 1, "raw": True, "dtype": "uint16"}
    mean = np.mean(
        [
            np.asarray(Image.open(data / "images" / f"{name}.png"))
            for name in content["folder"]["split"]["names"]["train"]
        ]
    )
    assert content["folder"]["mean"] == [pytest.approx(mean)]
    assert evaluate.main(["--checkpoint", str(tmp_path / "run/last.pt"), "--workers", "0"]) == 0
