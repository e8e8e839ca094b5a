import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ccgpu.train import ade20k, camvid, lip
from ccgpu.train.data.cityscapes_labels import CITYSCAPES, LABELS
from ccgpu.train.data.submission import save_prediction
from ccgpu.train.dataset import Dataset
from ccgpu.train.metrics import SCORES, ConfusionMatrix, results_table, scores_line


def hand_made() -> ConfusionMatrix:
    """Class 0: 3 of 4 right; class 1: 1 of 2 right; class 2: predicted once, never true; class 3: nowhere."""
    confusion = ConfusionMatrix(4)
    confusion.update(torch.tensor([[0, 0, 0, 1], [1, 2, 3, 3]]), torch.tensor([[0, 0, 0, 0], [1, 1, 255, 255]]))
    return confusion


def test_confusion_matrix_counts_labels_in_rows_and_predictions_in_columns() -> None:
    assert hand_made().matrix.tolist() == [[3, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert hand_made().matrix.dtype == torch.int64


def test_scores_of_a_hand_made_matrix() -> None:
    confusion = hand_made()
    iou = confusion.iou()
    assert iou.dtype == torch.float64
    assert iou[:3].tolist() == [3 / 4, 1 / 3, 0.0]
    assert math.isnan(iou[3])
    assert confusion.miou() == pytest.approx((3 / 4 + 1 / 3 + 0) / 3, abs=1e-15)
    assert confusion.pixel_accuracy() == 4 / 6
    assert confusion.class_accuracy()[:2].tolist() == [3 / 4, 1 / 2]
    assert confusion.class_accuracy()[2:].isnan().all()
    assert confusion.mean_accuracy() == (3 / 4 + 1 / 2) / 2


def test_scores_of_nothing_are_nan() -> None:
    confusion = ConfusionMatrix(3)
    confusion.update(torch.zeros(0, 4, 4, dtype=torch.int64), torch.zeros(0, 4, 4, dtype=torch.int64))
    confusion.update(torch.zeros(1, 2, 2, dtype=torch.int64), torch.full((1, 2, 2), 255))
    assert confusion.iou().isnan().all()
    assert all(map(math.isnan, (confusion.miou(), confusion.pixel_accuracy(), confusion.mean_accuracy())))


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(0, 40),
    st.integers(0, 2**32 - 1),
    st.sampled_from([torch.uint8, torch.int64]),
)
def test_confusion_matrix_equals_a_plain_loop(classes: int, pixels: int, seed: int, dtype: torch.dtype) -> None:
    generator = np.random.default_rng(seed)
    expected = np.zeros((classes, classes), dtype=np.int64)
    confusion = ConfusionMatrix(classes)
    for _ in range(2):
        prediction = generator.integers(0, classes, pixels)
        label = np.where(generator.random(pixels) < 0.3, 255, generator.integers(0, classes, pixels))
        for was, true in zip(prediction, label, strict=True):
            if true != 255:
                expected[true, was] += 1
        confusion.update(torch.from_numpy(prediction).to(dtype), torch.from_numpy(label).to(dtype))
    assert np.array_equal(confusion.matrix.numpy(), expected)
    for index, iou in enumerate(confusion.iou().tolist()):
        union = expected[index].sum() + expected[:, index].sum() - expected[index, index]
        assert iou == expected[index, index] / union if union else math.isnan(iou)


def test_matrices_of_parts_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randint(0, 5, (4, 8, 8), generator=generator)
    label = torch.randint(0, 5, (4, 8, 8), generator=generator)
    whole, first, second = ConfusionMatrix(5), ConfusionMatrix(5), ConfusionMatrix(5)
    whole.update(prediction, label)
    first.update(prediction[:3], label[:3])
    second.update(prediction[3:], label[3:])
    assert torch.equal(first.matrix + second.matrix, whole.matrix)


@pytest.mark.parametrize(
    ("prediction", "label", "error", "message"),
    [
        (
            torch.zeros(2, 2),
            torch.zeros(2, 2, dtype=torch.int64),
            TypeError,
            "prediction must be of an integer dtype",
        ),
        (
            torch.zeros(2, 2, dtype=torch.int64),
            torch.zeros(2, 2),
            TypeError,
            "label must be of an integer dtype",
        ),
        (
            torch.zeros(2, 3, dtype=torch.int64),
            torch.zeros(2, 2, dtype=torch.int64),
            ValueError,
            r"shape \(2, 2\)",
        ),
        (torch.tensor([3]), torch.tensor([0]), ValueError, "prediction must hold values in 0..2, got 3..3"),
        (
            torch.tensor([-1]),
            torch.tensor([255]),
            ValueError,
            "prediction must hold values in 0..2, got -1..-1",
        ),
        (
            torch.tensor([0]),
            torch.tensor([254]),
            ValueError,
            "label must hold values in 0..2 or 255, got 254..254",
        ),
        (
            torch.tensor([0]),
            torch.tensor([-1]),
            ValueError,
            "label must hold values in 0..2 or 255, got -1..-1",
        ),
    ],
)
def test_update_refuses_what_it_cannot_count(
    prediction: torch.Tensor, label: torch.Tensor, error: type[Exception], message: str
) -> None:
    confusion = ConfusionMatrix(3)
    with pytest.raises(error, match=message):
        confusion.update(prediction, label)
    assert confusion.matrix.sum() == 0


@pytest.mark.parametrize("classes", [0, 256])
def test_confusion_matrix_refuses_a_number_of_classes(classes: int) -> None:
    with pytest.raises(ValueError, match=f"num_classes must be in 1..255, got {classes}"):
        ConfusionMatrix(classes)


def test_results_table_shows_each_class_and_the_means() -> None:
    lines = results_table(hand_made(), ["road", "car", "pole", "sky"]).splitlines()
    assert [line.split() for line in lines if not line.startswith("-")] == [
        ["class", "IoU", "%", "acc", "%", "pixels", "%"],
        ["road", "75.00", "75.00", "66.67"],
        ["car", "33.33", "50.00", "33.33"],
        ["pole", "0.00", "-", "0.00"],
        ["sky", "-", "-", "0.00"],
        ["mean", "36.11", "62.50"],
        ["pixel", "accuracy", "66.67"],
    ]
    assert len({len(line) for line in lines if line.startswith("-")}) == 1
    with pytest.raises(ValueError, match="names must hold 4 names, one per class, got 2"):
        results_table(hand_made(), ["road", "car"])


def test_scores_of_cityscapes_are_those_of_its_scripts(tmp_path: Path) -> None:
    official = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    generator = np.random.default_rng(0)
    # Wall and train occur nowhere, truck only in predictions, bus only in labels; ignored ids lie everywhere.
    ids = [row.id for row in LABELS if row.id >= 0 and row.name not in ("wall", "train", "truck")]
    classes = [index for index, name in enumerate(CITYSCAPES.names) if name not in ("wall", "train", "bus")]
    confusion = ConfusionMatrix(19)
    predictions, truths = [], []
    for image in range(3):
        truth = generator.choice(ids, (40, 60)).astype(np.uint8)
        right = CITYSCAPES.to_train[truth]
        usable = np.isin(right, classes) & (generator.random(truth.shape) < 0.6)
        prediction = np.where(usable, right, generator.choice(classes, truth.shape)).astype(np.uint8)
        confusion.update(torch.from_numpy(prediction), torch.from_numpy(right))
        predictions.append(str(tmp_path / f"synthetic_00000{image}_000019_pred.png"))
        truths.append(str(tmp_path / f"synthetic_00000{image}_000019_gtFine_labelIds.png"))
        Image.fromarray(CITYSCAPES.to_file[prediction]).save(predictions[-1])
        Image.fromarray(truth).save(truths[-1])
    official.args.evalInstLevelScore = False
    official.args.JSONOutput = False
    official.args.quiet = True
    result = official.evaluateImgLists(predictions, truths, official.args)
    ours = dict(zip(CITYSCAPES.names, confusion.iou().tolist(), strict=True))
    for name, iou in ours.items():
        assert iou == pytest.approx(result["classScores"][name], abs=1e-12, nan_ok=True)
    assert confusion.miou() == pytest.approx(result["averageScoreClasses"], abs=1e-12)
    assert [name for name, iou in ours.items() if math.isnan(iou)] == ["wall", "train"]
    assert ours["truck"] == ours["bus"] == 0.0


def test_scores_line_has_no_number_where_nothing_was_counted() -> None:
    confusion = ConfusionMatrix(2)
    assert scores_line(confusion, ("miou", "pixel_accuracy")) == "mIoU -, pixel accuracy -"
    confusion.update(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 255]))
    assert scores_line(confusion, ("miou", "pixel_accuracy")) == "mIoU 25.00 %, pixel accuracy 50.00 %"


# The rules of the datasets' own evaluations, as loops over saved prediction files

Files = list[tuple[np.ndarray, np.ndarray]]


def ade20k_rule(files: Files) -> dict[str, float]:
    """SceneParsing's evaluationCode (CSAIL): pixelAccuracy and intersectionAndUnion; label 0 is not scored."""
    correct, labelled = 0, 0
    intersection, union = np.zeros(150), np.zeros(150)
    for prediction, label in files:
        correct += ((prediction == label) & (label > 0)).sum()
        labelled += (label > 0).sum()
        prediction = prediction * (label > 0)
        for k in range(150):
            predicted, true = prediction == k + 1, label == k + 1
            intersection[k] += (predicted & true).sum()
            union[k] += predicted.sum() + true.sum() - (predicted & true).sum()
    return {"miou": (intersection / union).mean(), "pixel_accuracy": correct / labelled}


def lip_rule(files: Files) -> dict[str, float]:
    """CE2P's utils/miou.py: the histogram of labels and predictions; label 255 is not scored."""
    histogram = np.zeros((20, 20))
    for prediction, label in files:
        for true, predicted in zip(label.ravel(), prediction.ravel(), strict=True):
            if true != 255:
                histogram[true, predicted] += 1
    true, predicted, hits = histogram.sum(1), histogram.sum(0), np.diag(histogram)
    return {
        "miou": (hits / np.maximum(1.0, true + predicted - hits)).mean(),
        "pixel_accuracy": hits.sum() / true.sum(),
        "mean_accuracy": (hits / np.maximum(1.0, true)).mean(),
    }


def camvid_rule(files: Files) -> dict[str, float]:
    """SegNet-Tutorial's compute_test_results.m: global and class average accuracy, IoU; label 11 is not scored."""
    points, hits = 0, 0
    true, right, false = np.zeros(11), np.zeros(11), np.zeros(11)
    for prediction, label in files:
        scored = label != 11
        points += scored.sum()
        hits += ((prediction == label) & scored).sum()
        for k in range(11):
            true[k] += (label == k).sum()
            right[k] += ((label == k) & (prediction == k)).sum()
            false[k] += (scored & (label != k) & (prediction == k)).sum()
    return {
        "miou": (right / (true + false)).mean(),
        "pixel_accuracy": hits / points,
        "mean_accuracy": (right / true).mean(),
    }


@pytest.mark.parametrize(
    ("dataset", "rule"),
    [(ade20k.DATASET, ade20k_rule), (lip.DATASET, lip_rule), (camvid.DATASET, camvid_rule)],
    ids=["ade20k", "lip", "camvid"],
)
def test_scores_are_those_of_the_rule_of_the_dataset(dataset: Dataset, rule: object, tmp_path: Path) -> None:
    """Every class occurs: where one does not, the official rules count 0 for it, or nothing at all, as we do."""
    labels, generator = dataset.labels, np.random.default_rng(1)
    confusion = ConfusionMatrix(labels.num_classes)
    files: Files = []
    for index in range(2):
        label = generator.choice(labels.known, (40, 50 + index)).astype(np.uint8)
        truth = labels.to_train[label].astype(int)
        others = generator.integers(0, labels.num_classes, label.shape)
        classes = np.where((truth != 255) & (generator.random(label.shape) < 0.6), truth, others)
        confusion.update(torch.from_numpy(classes), torch.from_numpy(truth))
        with Image.open(save_prediction(tmp_path, f"image {index}", classes, labels)) as image:
            files.append((np.asarray(image).astype(int), label.astype(int)))
    official = rule(files)  # type: ignore[operator]
    assert set(official) == set(dataset.scores)
    for name, value in official.items():
        assert SCORES[name][1](confusion) == pytest.approx(value, abs=1e-12)
        assert 0.3 < value < 0.7
