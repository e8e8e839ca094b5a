"""Predictions as label files: ids, atomic writes, and the official Cityscapes evaluation on them."""

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ccgpu.models.labels import Labels
from ccgpu.train.data.submission import save_prediction
from ccgpu.train.metrics import ConfusionMatrix


def table(ids: tuple[int, ...], void: tuple[int, ...] = ()) -> Labels:
    names = tuple(f"class {index}" for index in range(len(ids)))
    return Labels(names, np.zeros((len(ids), 3), dtype=np.uint8), ids, void)


ADE20K = table(tuple(range(1, 151)), void=(0,))


@pytest.mark.parametrize("kind", ["int64 tensor", "uint8 tensor", "int64 array"])
def test_save_prediction_writes_the_ids_of_the_label_files_as_a_grey_image(tmp_path: Path, kind: str) -> None:
    classes = np.arange(150).reshape(10, 15)
    given = {
        "int64 tensor": torch.from_numpy(classes),
        "uint8 tensor": torch.from_numpy(classes.astype(np.uint8)),
        "int64 array": classes,
    }[kind]
    path = save_prediction(tmp_path, "ADE_val_00000001", given, ADE20K)
    assert path == tmp_path / "ADE_val_00000001.png"
    with Image.open(path) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "L", (15, 10))
        assert np.array_equal(np.asarray(image), classes + 1)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_save_prediction_keeps_a_name_with_dots(tmp_path: Path) -> None:
    assert save_prediction(tmp_path, "a.b_0.5", np.zeros((1, 1), dtype=int), ADE20K).name == "a.b_0.5.png"


def test_save_prediction_is_read_back_by_the_labels_own_table(tmp_path: Path) -> None:
    labels = table((7, 0, 255, 31), void=(1, 2))
    classes = np.random.default_rng(0).integers(0, 4, (9, 7))
    with Image.open(save_prediction(tmp_path, "image", classes, labels)) as image:
        assert np.array_equal(labels.to_train[np.asarray(image)], classes)


def test_save_prediction_replaces_a_file_of_the_same_name(tmp_path: Path) -> None:
    first, second = np.zeros((30, 40), dtype=int), np.full((3, 4), 149)
    save_prediction(tmp_path, "image", first, ADE20K)
    with Image.open(save_prediction(tmp_path, "image", second, ADE20K)) as image:
        assert np.array_equal(np.asarray(image), second + 1)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_write_that_fails_leaves_the_former_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_prediction(tmp_path, "image", np.zeros((3, 4), dtype=int), ADE20K)
    before = path.read_bytes()
    written = []

    def full_disk(handle: int) -> None:
        written.extend(entry.name for entry in tmp_path.iterdir())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_prediction(tmp_path, "image", np.ones((3, 4), dtype=int), ADE20K)
    assert sorted(written) == ["image.png", "image.png.partial"]
    assert path.read_bytes() == before


def write_and_hang(folder: Path) -> None:
    save_prediction(folder, "image", np.zeros((3, 4), dtype=int), ADE20K)

    def hang(handle: int) -> None:
        (folder / "hangs").touch()
        time.sleep(600)

    os.fsync = hang
    save_prediction(folder, "image", np.ones((3, 4), dtype=int), ADE20K)


def test_a_killed_run_leaves_the_former_file_and_a_partial_one_that_the_next_run_replaces(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=write_and_hang, args=(tmp_path,))
    process.start()
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "hangs").exists():
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.join()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hangs", "image.png", "image.png.partial"]
    with Image.open(tmp_path / "image.png") as image:
        assert np.array_equal(np.asarray(image), np.ones((3, 4)))
    with Image.open(save_prediction(tmp_path, "image", np.full((2, 2), 5), ADE20K)) as image:
        assert np.array_equal(np.asarray(image), np.full((2, 2), 6))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hangs", "image.png"]


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((1, 2, 3), dtype=int),
        np.zeros((0, 4), dtype=int),
        np.zeros((2, 2)),
        np.zeros((2, 2), dtype=bool),
        np.full((2, 2), 150),
        np.full((2, 2), -1),
        np.full((2, 2), 255, dtype=np.uint8),
    ],
    ids=lambda bad: f"{bad.dtype}{bad.shape}",
)
def test_save_prediction_refuses_other_values_than_classes(tmp_path: Path, bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"save_prediction: classes must be integers \(H, W\) in 0\.\.149, got"):
        save_prediction(tmp_path, "image", bad, ADE20K)
    assert not list(tmp_path.iterdir())


def test_the_official_cityscapes_evaluation_reads_the_files_and_finds_our_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    rows = sorted((row for row in official.labels if row.trainId in range(19)), key=lambda row: row.trainId)
    void = tuple(row.id for row in official.labels if row.id >= 0 and row.trainId == 255)
    labels = table(tuple(row.id for row in rows), void)
    predictions, truths = tmp_path / "predictions", tmp_path / "truths"
    predictions.mkdir()
    truths.mkdir()
    generator = np.random.default_rng(0)
    confusion = ConfusionMatrix(19)
    for image in range(3):
        name = f"synthetic_00000{image}_000019"
        ids = generator.choice(labels.known, (40, 60)).astype(np.uint8)
        truth = labels.to_train[ids]
        classes = np.where(
            (truth != 255) & (generator.random(ids.shape) < 0.6), truth, generator.integers(0, 19, ids.shape)
        )
        confusion.update(torch.from_numpy(classes), torch.from_numpy(truth))
        save_prediction(predictions, name, classes, labels)
        Image.fromarray(ids).save(truths / f"{name}_gtFine_labelIds.png")
    for option, value in {"evalInstLevelScore": False, "JSONOutput": False, "quiet": True}.items():
        monkeypatch.setattr(official.args, option, value)
    monkeypatch.setattr(official.args, "predictionPath", str(predictions))
    monkeypatch.setattr(official.args, "predictionWalk", None)
    files = sorted(str(path) for path in truths.iterdir())
    # The evaluation looks for each prediction by the name of the label file, as on the test server.
    found = [official.getPrediction(official.args, path) for path in files]
    result = official.evaluateImgLists(found, files, official.args)
    for row, iou in zip(rows, confusion.iou().tolist(), strict=True):
        assert iou == pytest.approx(result["classScores"][row.name], abs=1e-12)
    assert confusion.miou() == pytest.approx(result["averageScoreClasses"], abs=1e-12)
    assert 0.3 < confusion.miou() < 0.6
