"""Every kind of mask and image goes from an unsplit folder to a predicted mask: train, evaluate, predict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ccgpu.models.segmenter import Segmenter
from ccgpu.train import evaluate, folder
from tests.train.folders import COLOURS, TINY, file_in, scene


def palette(classes: np.ndarray) -> Image.Image:
    image = Image.fromarray(classes.astype(np.uint8))
    image.putpalette(COLOURS.tobytes())
    return image


# Kind -> classes (H, W) as a mask's image, and the number of classes that are found.
MASKS: dict[str, tuple[Callable[[np.ndarray], Image.Image], int]] = {
    "8-bit grey": (lambda classes: Image.fromarray(classes.astype(np.uint8)), 3),
    "palette": (palette, 3),
    "1-bit": (lambda classes: Image.fromarray(classes > 0), 2),
    "16-bit grey": (lambda classes: Image.fromarray((1000 * classes).astype(np.uint16)), 3),
    "colours": (lambda classes: Image.fromarray(COLOURS[classes]), 3),
    "0 and 255": (lambda classes: Image.fromarray(255 * (classes > 0).astype(np.uint8)), 2),
}


def train_and_evaluate(data: Path, out: Path) -> Segmenter:
    assert folder.main(["--data", str(data), "--out", str(out), *TINY]) == 0
    assert evaluate.main(["--checkpoint", str(out), "--workers", "0", "--device", "cpu"]) == 0
    return Segmenter.load(out, device="cpu")


@pytest.mark.parametrize("kind", MASKS)
def test_every_kind_of_mask_trains_and_predicts(kind: str, tmp_path: Path) -> None:
    draw, number = MASKS[kind]
    for index in range(4):
        image, classes = scene(index)
        Image.fromarray(image).save(file_in(tmp_path / "data/images", f"{index}.jpg"))
        draw(classes).save(file_in(tmp_path / "data/masks", f"{index}.png"))
    segmenter = train_and_evaluate(tmp_path / "data", tmp_path / "run")
    result = segmenter.predict(tmp_path / "data/images/0.jpg")
    assert len(result.names) == number
    assert result.classes.shape == classes.shape
    if kind in ("palette", "colours"):
        assert sorted(result.colours.tolist()) == sorted(COLOURS.tolist())


@pytest.mark.parametrize(("channels", "dtype"), [(1, "uint8"), (2, "uint16"), (4, "uint8"), (5, "uint16")])
def test_every_kind_of_image_trains_and_predicts(channels: int, dtype: str, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    pixels = []
    for index in range(4):
        image, classes = scene(index)
        values = np.resize(image, (*classes.shape, channels)).astype(dtype) * (100 if dtype == "uint16" else 1)
        pixels.append(values)
        path = file_in(tmp_path / "data/images", f"{index}.tif")
        planar = None if channels == 1 else "contig"
        tifffile.imwrite(path, values.squeeze(), photometric="minisblack", planarconfig=planar)
        palette(classes).save(file_in(tmp_path / "data/masks", f"{index}.png"))
    segmenter = train_and_evaluate(tmp_path / "data", tmp_path / "run")
    net = segmenter.net
    assert net.config["in_channels"] == channels
    used = torch.load(tmp_path / "run/last.pt", weights_only=True)["folder"]["split"]["names"]["train"]
    measured = np.stack([pixels[int(name)] for name in used]).reshape(-1, channels).mean(axis=0)
    assert net.backbone.mean == pytest.approx(measured.tolist())
    assert segmenter.predict(tmp_path / "data/images/0.tif").classes.shape == classes.shape
