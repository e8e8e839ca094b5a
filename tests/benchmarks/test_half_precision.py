"""Half precision gives a trained network's classes, and the command that measures it counts what differs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import half_precision
from ccgpu.models.ccnet import CCNet
from ccgpu.models.precision import Precision
from ccgpu.models.segmenter import Segmenter
from ccgpu.train import camvid
from ccgpu.train.runs import records


def blocks(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An image of blocks in three classes' colours with noise, and its label."""
    generator = np.random.default_rng(seed)
    classes = np.kron(generator.integers(0, 3, (4, 6)), np.ones((16, 16), np.uint8)).astype(np.uint8)
    pixels = camvid.LABELS.colours[classes] * 0.8 + generator.integers(0, 50, (64, 96, 1))
    return pixels.astype(np.uint8), classes


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on such images, with its data beside it."""
    root = tmp_path_factory.mktemp("trained")
    for split, seeds in (("train", range(8)), ("val", range(8, 12))):
        for seed in seeds:
            for folder, pixels in zip((split, f"{split}annot"), blocks(seed), strict=True):
                (root / "data" / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(root / "data" / folder / f"video_{seed}.png")
    flags = [
        "--backbone",
        "local",
        "--head-channels",
        "16",
        "--gamma",
        "1",
        "--crop",
        "49",
        "--batch",
        "4",
        "--lr",
        "0.03",
    ]
    flags += ["--iterations", "50", "--random-scale", "1", "1", "--workers", "0", "--device", "cpu", "--no-tensorboard"]
    assert camvid.main([*flags, "--data", str(root / "data"), "--out", str(root / "run")]) == 0
    return root


def test_a_trained_network_keeps_its_classes_in_half_precision(trained: Path, tmp_path: Path) -> None:
    scores = records.read_records(trained / "run" / "metrics.jsonl")[-1]
    assert scores["pixel_accuracy"] > 0.7, "the network must have learnt something"
    record = tmp_path / "record.jsonl"
    flags = ["--checkpoint", str(trained / "run" / "last.pt"), "--device", "cpu", "--record", str(record)]
    assert half_precision.main([*flags, str(trained / "data" / "val")]) == 0
    (line,) = records.read_records(record)
    assert line["images"] == 4
    assert set(line["kept"]) == {"bf16", "fp16"}
    assert min(line["kept"].values()) >= 0.995


@pytest.mark.parametrize("dims", [2, 3])
def test_images_are_predicted_as_the_command_does_it(dims: int) -> None:
    segmenter = Segmenter(CCNet("resnet18", 3, dims=dims, head_channels=8), device="cpu")
    image = Image.fromarray(blocks(0)[0])
    predict = half_precision.predictor(segmenter, Precision(torch.device("cpu")))
    assert np.array_equal(predict(image), segmenter.predict(image).classes)


def test_what_differs_is_counted() -> None:
    images = [Image.new("RGB", (5, 2)), Image.new("RGB", (1, 10))]

    def predictor(wrong: int) -> object:
        return lambda image: np.arange(image.width * image.height).reshape(image.height, image.width) < wrong

    predictors = {"off": predictor(0), "bf16": predictor(3), "fp16": predictor(1)}
    assert half_precision.kept_shares(predictors, images) == {"bf16": 14 / 20, "fp16": 18 / 20}  # type: ignore[arg-type]
