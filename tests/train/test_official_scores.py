"""Our scores beside the rules of the datasets' own evaluations, written out as loops over saved prediction files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ccgpu.train import ade20k, camvid, lip
from ccgpu.train.data.submission import save_prediction
from ccgpu.train.dataset import Dataset
from ccgpu.train.metrics import SCORES, ConfusionMatrix

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
def test_scores_are_those_of_the_official_evaluation(dataset: Dataset, rule: object, tmp_path: Path) -> None:
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
