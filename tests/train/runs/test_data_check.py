"""The check of a dataset before a command computes: one error for all files, the census, the cache, --no-check."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ccgpu.models.labels import Labels
from ccgpu.train import command, convert, evaluate
from ccgpu.train.data.facts import Facts, facts_of
from ccgpu.train.data.pairs import Pair, find_by_name
from ccgpu.train.data.reading import Reading
from ccgpu.train.dataset import Dataset
from ccgpu.train.runs import data_check, records
from ccgpu.train.runs.data_check import check_data
from tests.train.training import TINY, told

SIZE = (40, 48)


def find_pairs(root: Path, split: str, labelled: bool = True) -> list[Pair]:
    return find_by_name("find_pairs", root / split / "images", root / split / "labels" if labelled else None)


def ponds(names: tuple[str, ...] = ("ground", "water"), ids: tuple[int, ...] = (1, 2)) -> Dataset:
    colours = np.zeros((len(names), 3), dtype=np.uint8)
    labels = Labels(names, colours, ids, void=(255,), hint="take the files of labels/")
    return Dataset("ponds", labels, "a folder.", find_pairs, {"batch": 2}, "Ours.", ("miou",))


DATASET = ponds()
"""For `train.evaluate --dataset`, which looks for this name."""


def write(root: Path, values: tuple[int, ...] = (1, 2), number: int = 6, orientation: int = 1) -> Path:
    """Write a dataset whose label files hold these values: images of noise for training and two for evaluation."""
    generator = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for split, count in (("train", number), ("val", 2)):
        for index in range(count):
            for kind, pixels in (
                ("images", generator.integers(0, 256, (*SIZE, 3), dtype=np.uint8)),
                ("labels", np.resize(np.repeat(np.array(values, dtype=np.uint8), 48), SIZE)),
            ):
                (root / split / kind).mkdir(parents=True, exist_ok=True)
                more = {"exif": exif} if kind == "images" and orientation != 1 else {}
                Image.fromarray(pixels).save(root / split / kind / f"{index}.png", **more)
    return root


def tiff(path: Path) -> bytes:
    """Return an image file as a TIFF file, with its EXIF orientation."""
    file = io.BytesIO()
    image = Image.open(path)
    image.save(file, "TIFF", exif=image.getexif())
    return file.getvalue()


def damage(path: Path) -> bytes:
    """Change a byte in the middle of a file's pixels and return the whole content."""
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    return whole


def train(root: Path, out: Path, *flags: str, dataset: Dataset = DATASET) -> int:
    return command.main(dataset, [*TINY, "--data", str(root), "--out", str(out), *flags])


def check(root: Path, reading: Reading | None = None, labels: Labels = DATASET.labels) -> None:
    how = Reading() if reading is None else reading
    check_data(root, find_pairs(root, "train"), find_pairs(root, "val"), labels, how, in_processes=False)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that a check decodes."""
    found: list[Path] = []

    def watched(path: Path, **options: Any) -> Facts:
        found.append(path)
        return facts_of(path, **options)

    monkeypatch.setattr(data_check, "facts_of", watched)
    return found


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of caches, in which even a small dataset is cached."""
    monkeypatch.setenv("CCGPU_CACHE_DIR", str(tmp_path / "caches"))
    monkeypatch.setattr(data_check, "_WORTH_CACHING", 0.0)
    return tmp_path / "caches" / "datasets"


def test_all_problems_of_all_splits_are_one_error_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = write(tmp_path / "data"), tmp_path / "run"
    damage(root / "train/images/1.png")
    damage(root / "val/labels/0.png")
    (root / "val/images/1.png").write_bytes(b"")
    Image.fromarray(np.full(SIZE, 7, dtype=np.uint8)).save(root / "train/labels/5.png")
    assert train(root, out) == 2
    text = capsys.readouterr().err
    assert "got 4 problems in 8 pairs" in text
    for path, problem in (
        ("train/images/1.png", "damaged PNG file (the checksum of a chunk 'IDAT' is wrong)"),
        ("val/labels/0.png", "damaged PNG file"),
        ("val/images/1.png", "empty file"),
        ("train/labels/5.png", "holds the values 7, but the ids are 1..2, 255"),
    ):
        assert any(line.startswith(f"  {root / path}: ") and problem in line for line in text.splitlines()), path
    assert text.endswith("label files: take the files of labels/.\n")
    assert not out.exists()


def test_a_training_command_prints_the_census(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path / "data")
    check(root, labels=ponds(("ground", "water", "reed"), (1, 2, 3)).labels)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["class", "training", "%", "files", "evaluation", "%", "files"]
    assert lines[1] == ["ground", "50.00", "6", "50.00", "2"]
    assert lines[3] == ["reed", "0.00", "0", "0.00", "0"]
    assert " ".join(lines[5]) == "warning: no label file for training holds reed (1 of 3 classes)"
    assert " ".join(lines[6]) == "warning: no label file for evaluation holds reed (1 of 3 classes)"


@pytest.mark.parametrize(
    ("names", "ids", "values", "message"),
    [
        (("pond",), (1,), (1,), "labels must have 2 classes or more, got 'pond' alone"),
        (("ground", "pond"), (0, 1), (0, 255), "in masks of 0 and 255 the 255 is a class"),
        (("ground", "pond"), (0, 1), (255,), "label files for training must hold pixels of the classes, got none"),
        (("ground", "pond"), (0, 1), (1,), "got pixels of 'pond' alone; the files hold the values 1, declared are"),
    ],
)
def test_labels_that_teach_nothing_are_refused(
    tmp_path: Path,
    names: tuple[str, ...],
    ids: tuple[int, ...],
    values: tuple[int, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = write(tmp_path / "data", values)
    assert train(root, tmp_path / "run", dataset=ponds(names, ids)) == 2
    assert message in told(capsys, "train")
    assert not (tmp_path / "run").exists()


def test_frames_that_are_in_no_clip_are_told_and_not_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The class of the two frames of video b, which are too few for a clip of three, would never be trained on."""
    root = tmp_path / "data"
    for name, value in [("a_1", 1), ("a_2", 1), ("a_3", 1), ("b_1", 2), ("b_2", 2)]:
        for split in ("train", "val"):
            for kind, pixels in (
                ("images", np.zeros((*SIZE, 3), np.uint8)),
                ("labels", np.full(SIZE, value, np.uint8)),
            ):
                (root / split / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(root / split / kind / f"{name}.png")
    videos = dataclasses.replace(ponds(), frame_of=lambda name: (name[0], int(name[2:])))
    assert train(root, tmp_path / "run", "--clip", "3", dataset=videos) == 2
    output = capsys.readouterr()
    assert "note: 2 of 5 images for training are left out, because fewer than 3 of them follow" in output.out
    assert "label files for training must hold 2 classes or more, got pixels of 'ground' alone" in output.err


def test_label_files_whose_values_were_renumbered_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path / "data")
    folder = root / "train" / "labels"
    colours = [0, 0, 0, 10, 20, 30, 40, 50, 60]
    for name in ("1.png", "2.png", "3.png"):
        label = Image.open(folder / name)
        label.putpalette(colours)
        label.save(folder / name)
    check(root)
    assert "palette" not in capsys.readouterr().out
    renumbered = Image.fromarray(np.array([0, 2, 1], dtype=np.uint8)[np.asarray(Image.open(folder / "3.png"))])
    renumbered.putpalette([0, 0, 0, *colours[6:9], *colours[3:6]])
    renumbered.save(folder / "3.png")
    check(root)
    assert capsys.readouterr().out.splitlines()[0] == (
        "warning: 2 values have different colours in the palettes of label files, such as 1 is #0a141e in "
        f"{folder}/1.png and #28323c in {folder}/3.png; values that a program renumbered are no ids"
    )


def test_copies_of_images_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path / "data")
    check(root)
    assert "cop" not in capsys.readouterr().out
    images = {name: root / name / "images" for name in ("train", "val")}
    (images["train"] / "5.png").write_bytes((images["train"] / "3.png").read_bytes())
    (images["val"] / "1.png").unlink()
    (images["val"] / "1.png").symlink_to(images["train"] / "2.png")
    check(root)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        f"note: 1 images for training are copies of others, such as {images['train']}/5.png of {images['train']}/3.png",
        f"warning: 1 of 2 images for evaluation are copies of training images, such as {images['val']}/1.png of "
        f"{images['train']}/2.png: the scores do not tell how well other images are predicted",
    ]
    pairs = find_pairs(root, "train")
    check_data(root, pairs, pairs[:2], DATASET.labels, Reading(), False)  # train.command tells of these
    assert "warning" not in capsys.readouterr().out


def test_orientations_without_a_choice_are_one_error_that_says_which_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write(tmp_path / "data", orientation=6)
    assert train(root, tmp_path / "run") == 2
    text = capsys.readouterr().err
    assert "got 8 problems in 8 pairs" in text
    assert f"got 6 in {root}/train/images/0.png, while {root}/train/labels/0.png has none" in text
    assert "--exif upright if they were drawn" in text
    assert text.endswith("(8 label files have the size for stored).\n")
    check(root, Reading("stored"))
    with pytest.raises(ValueError, match="48x40 pixels, but the image has 40x48"):
        check(root, Reading("upright"))
    for path in root.rglob("images/*.png"):  # Pillow turns TIFF files when it opens them
        path.with_suffix(".tif").write_bytes(tiff(path))
        path.unlink()
    check(root, Reading("stored"))
    with pytest.raises(ValueError, match=r"(?s)got 8 problems .*8 label files have the size for stored"):
        check(root)
    square = write(tmp_path / "square", orientation=3)
    with pytest.raises(ValueError, match=r"got 8 problems in 8 pairs(?s:.*)as a viewer shows them\.$"):
        check(square)
    check(square, Reading("upright"))


def test_exif_flags_reach_training_and_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = write(tmp_path / "data", orientation=6), tmp_path / "run"
    assert train(root, out, "--exif", "stored") == 0
    flags = ["--checkpoint", str(out / "last.pt"), "--dataset", __name__, "--workers", "0", "--device", "cpu"]
    assert evaluate.main(flags) == 0
    capsys.readouterr()
    assert evaluate.main([*flags, "--exif", "upright"]) == 2
    assert "48x40 pixels, but the image has 40x48" in capsys.readouterr().err
    for more, message in (
        (("--value-range", "5", "5"), "--value-range must be LOW HIGH with LOW < HIGH, got 5 5"),
        (("--value-range", "0", "inf"), "--value-range must be LOW HIGH with LOW < HIGH, got 0 inf"),
        (("--max-pixels", "0"), "--max-pixels must be 1 or more, got 0"),
        (("--max-pixels", "100"), "48x40 pixels, more than 100; allow more with --max-pixels"),
    ):
        assert evaluate.main([*flags, *more]) == 2
        assert message in capsys.readouterr().err


def test_transparent_pixels_and_unused_bits_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path / "data")
    pixels = np.full((*SIZE, 4), 255, dtype=np.uint8)
    for split, index, alpha in (("train", 0, 255), ("train", 1, 254), ("val", 0, 0)):
        pixels[3, 4, 3] = alpha
        Image.fromarray(pixels).save(root / split / "images" / f"{index}.png")
    deep = np.full(SIZE, 1024, dtype=np.uint16)
    deep[0, 0] = 4095
    for index in (2, 3):
        Image.fromarray(deep).save(root / "train/images" / f"{index}.png")
    check(root)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"note: 2 images have transparent pixels, read as white, such as {root}/train/images/1.png"
    assert lines[1].startswith(
        f"warning: the 2 images of 16 bits, such as {root}/train/images/2.png, have no value above 4095"
    )
    assert lines[1].endswith("read as 0..15 of 255; name their range with --value-range 0 4095")
    check(root, Reading(value_range=(0.0, 4095.0)))
    assert "16 bits" not in capsys.readouterr().out
    deep[0, 0] = 40000
    Image.fromarray(deep).save(root / "train/images/2.png")
    check(root)
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith(
        f"note: 1 of the 2 images of 16 bits, such as {root}/train/images/3.png, have no value above"
    )
    Image.fromarray(deep).save(root / "train/images/3.png")
    check(root)
    assert "16 bits" not in capsys.readouterr().out


def test_values_of_unknown_range_are_refused_without_one(tmp_path: Path) -> None:
    root = write(tmp_path / "data")
    Image.fromarray(np.full(SIZE, 0.5, dtype=np.float32)).save(root / "train/images/0.tif")
    (root / "train/images/0.png").unlink()
    with pytest.raises(
        ValueError, match=r"0\.tif: values of 32 bits, whose range is unknown; name it with --value-range"
    ):
        check(root)
    check(root, Reading(value_range=(0.0, 1.0)))
    with pytest.raises(ValueError, match=r"48x40 pixels, more than 1919; allow more with --max-pixels"):
        check(root, Reading(max_pixels=1919))


def test_the_second_check_decodes_what_changed_alone(
    tmp_path: Path, cached: Path, decoded: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = write(tmp_path / "data")
    check(root)
    first = capsys.readouterr().out
    assert len(decoded) == 16
    decoded.clear()
    check(root)
    assert decoded == []
    assert capsys.readouterr().out == first
    Image.fromarray(np.full(SIZE, 2, dtype=np.uint8)).save(root / "val/labels/1.png")
    check(root)
    assert decoded == [root / "val/labels/1.png"]
    assert "25.00" in capsys.readouterr().out
    decoded.clear()
    damage(root / "train/images/0.png")
    for _ in range(2):  # a problem is not cached
        with pytest.raises(ValueError, match="1 problem"):
            check(root)
    assert decoded == [root / "train/images/0.png"] * 2
    assert len(list(cached.iterdir())) == 1


def test_a_small_dataset_is_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CCGPU_CACHE_DIR", str(tmp_path / "caches"))
    check(write(tmp_path / "data"))
    assert not (tmp_path / "caches").exists()


def test_a_cache_that_cannot_be_used_is_told_in_a_line(
    tmp_path: Path, cached: Path, decoded: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = write(tmp_path / "data")
    check(root)
    (file,) = cached.iterdir()
    file.write_text("damaged")
    check(root)
    assert f"note: the cache of {root} cannot be read (damaged" in capsys.readouterr().out
    assert len(decoded) == 32
    file.unlink()
    cached.rmdir()
    cached.write_text("a file where the folder should be")
    check(root)
    out = capsys.readouterr().out
    assert "cannot be read" in out
    assert "cannot be written" in out
    assert "CCGPU_CACHE_DIR" in out


def test_processes_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "data")
    files = [(path, path.parent.name == "labels") for path in sorted(root.rglob("*.png"))]
    damage(files[3][0])
    alone = dict(data_check._decode(files, 10_000, in_processes=False))
    assert alone[files[3]].problem
    monkeypatch.setattr(data_check, "_ALONE", 0.0)
    monkeypatch.setattr(data_check, "_WORTH_PROCESSES", -1.0)
    monkeypatch.setattr(data_check, "_MOST_PROCESSES", 1)
    assert dict(data_check._decode(files, 10_000, in_processes=True)) == alone


def test_no_check_opens_nothing_and_says_so(
    tmp_path: Path, decoded: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = write(tmp_path / "data"), tmp_path / "run"
    damage(root / "val/labels/0.png")
    assert train(root, out, "--no-check", "--eval-every", "0", "--save-every", "5") == 1
    shown = capsys.readouterr()
    assert decoded == []
    assert "files are not checked (--no-check)" in shown.out
    assert "class " not in shown.out
    assert f"got {root}/val/labels/0.png, which does not decode" in shown.err
    assert torch.load(out / "last.pt", weights_only=True)["iteration"] == 2  # saved before it was evaluated
    flags = ["--checkpoint", str(out / "last.pt"), "--dataset", __name__, "--workers", "0", "--device", "cpu"]
    assert evaluate.main([*flags, "--check"]) == 2
    assert "got 1 problem in 2 pairs" in capsys.readouterr().err
    assert evaluate.main([*flags, "--no-check"]) == 1


def test_no_check_refuses_a_conflict_of_orientations_when_its_turn_comes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write(tmp_path / "data", orientation=3)
    assert train(root, tmp_path / "run", "--no-check") == 1
    assert "EXIF orientation must be that of the label file, got 3 in" in told(capsys, "train")


def comparable(out: Path) -> list[dict[str, Any]]:
    lines = records.read_records(out / records.METRICS)
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


STEPS = ("--iterations", "5", "--save-every", "4", "--eval-every", "0", "--dropout", "0.5")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dataset and the folder of a run of 5 steps on it, whose checkpoint is due after step 4."""
    folder = tmp_path_factory.mktemp("undisturbed")
    root = write(folder / "data", number=10)
    assert train(root, folder / "run", *STEPS) == 0
    return root, folder / "run"


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_file_that_went_bad_costs_no_step(
    undisturbed: tuple[Path, Path], tmp_path: Path, workers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fourth step meets a damaged file. It is mended, and the run ends with the bits of an undisturbed one."""
    root, alone = undisturbed
    out = tmp_path / "run"
    order = np.random.default_rng((0, 0, 1)).permutation(10)  # of the first epoch; see TrainStream
    path = find_pairs(root, "train")[order[7]].image
    whole = damage(path)
    assert train(root, out, *STEPS, "--no-check", "--workers", workers) == 1
    path.write_bytes(whole)
    shown = capsys.readouterr()
    assert "saved the state after step 3" in shown.out
    assert f"got {path}, which does not decode" in shown.err
    assert torch.load(out / "last.pt", weights_only=True)["iteration"] == 3
    assert command.main(DATASET, ["--resume", "--out", str(out), "--workers", "0"]) == 0
    one, other = (torch.load(folder / "last.pt", weights_only=True) for folder in (alone, out))
    assert other["iteration"] == 5
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name
    for index, state in one["optimiser"]["state"].items():
        assert torch.equal(state["momentum_buffer"], other["optimiser"]["state"][index]["momentum_buffer"])
    assert torch.equal(one["random"]["torch"], other["random"]["torch"])
    assert comparable(out) == comparable(alone)


def test_a_dataset_may_say_its_range(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = write(tmp_path / "data"), tmp_path / "run"
    for path in root.rglob("images/*.png"):
        Image.fromarray(np.full(SIZE, 2000, dtype=np.uint16)).save(path)
    dataset = dataclasses.replace(DATASET, recipe={**DATASET.recipe, "value_range": (0.0, 4095.0)})
    assert train(root, out, dataset=dataset) == 0
    saved = torch.load(out / "last.pt", weights_only=True)
    assert saved["settings"]["value_range"] == (0.0, 4095.0)
    # A file without settings, evaluated by a dataset that does not say the range.
    assert convert.main([str(out / "last.pt"), str(tmp_path / "net.safetensors")]) == 0
    record = tmp_path / "scores.jsonl"
    flags = ["--checkpoint", str(tmp_path / "net.safetensors"), "--dataset", __name__, "--data", str(root)]
    capsys.readouterr()
    assert evaluate.main([*flags, "--workers", "0", "--device", "cpu", "--mode", "whole", "--record", str(record)]) == 0
    assert "16 bits" not in capsys.readouterr().out
    trained = comparable(out)[-1]["matrix"]
    assert json.loads(record.read_text())["matrix"] == trained
