"""ccgpu evaluate on mmsegmentation's checkpoints: as their config says, equal to an evaluation in plain torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ccgpu.train import ade20k, cityscapes, convert, evaluate, voc
from ccgpu.train.dataset import Dataset
from tests.models.mmsegmentation_configs import of_0x, of_1x
from tests.models.published_files import AUXILIARY, HEAD, State, mmsegmentation_file, saved
from tests.models.published_networks import mmsegmentation_network

Size = tuple[int, int]
WHOLE = "dict(mode='whole')"


@dataclass(frozen=True)
class Kind:
    """A published configuration, with a tenth of its sizes so that it runs fast on a CPU."""

    config: Callable[..., str]
    source: str  # mmsegmentation's name of the dataset
    dataset: Dataset
    scale: Size  # long side, short side
    window: int | None = None
    stride: int | None = None
    sizes: tuple[Size, ...] = ((64, 128), (50, 90))
    told: str = ""

    @property
    def test_cfg(self) -> str:
        size, step = (self.window, self.window), (self.stride, self.stride)
        return WHOLE if self.window is None else f"dict(mode='slide', crop_size={size}, stride={step})"


KINDS = {
    "cityscapes 512x1024": Kind(
        of_0x,
        "CityscapesDataset",
        cityscapes.DATASET,
        (128, 64),
        told="whole, short side 64, long side 128 at most, scales 1.0, mean of logits (mode, short side, long side as",
    ),
    "cityscapes 769x769": Kind(
        of_1x,
        "CityscapesDataset",
        cityscapes.DATASET,
        (129, 65),
        48,
        32,
        sizes=((64, 128),),
        told="sliding windows of 48x48 every 32x32 pixels, short side 65, long side 129 at most, scales 1.0, mean of "
        "logits (mode, window, stride, short side, long side as in the file)",
    ),
    # Taller than wide; so wide that the long side is the limit.
    "ade20k": Kind(of_1x, "ADE20KDataset", ade20k.DATASET, (128, 48), sizes=((60, 40), (30, 150))),
    "voc": Kind(of_0x, "PascalVOCDataset", voc.DATASET, (128, 48), sizes=((37, 50), (66, 41))),
}
SPELLED = {"bed": "bed ", "television": "television receiver"}  # as in mmsegmentation's ADE20K


@pytest.fixture(scope="module")
def state() -> State:
    return mmsegmentation_file(50)


def published(kind: Kind, state: State, folder: Path) -> tuple[State, Path]:
    """Write the checkpoint of a kind; return its weights and its path."""
    labels, generator = kind.dataset.labels, torch.Generator().manual_seed(5)
    heads = {}
    for head, channels in (("decode_head", HEAD), ("auxiliary_head", AUXILIARY)):
        heads[f"{head}.conv_seg.weight"] = torch.randn(labels.num_classes, channels, 1, 1, generator=generator) * 0.2
        heads[f"{head}.conv_seg.bias"] = torch.randn(labels.num_classes, generator=generator) * 0.1
    names = [SPELLED.get(name, name) for name in labels.names]
    text = kind.config(kind.source, kind.test_cfg, kind.scale, kind.window is not None)
    meta = {"config": text, "CLASSES": names, "PALETTE": labels.colours.tolist()}
    if kind.config is of_1x:
        meta = {"cfg": text, "dataset_meta": {"classes": tuple(names), "palette": labels.colours.tolist()}}
    weights = {**state, **heads}
    return weights, saved({"meta": meta, "state_dict": weights}, folder)


def write_images(kind: Kind, root: Path) -> dict[str, tuple[Path, Path]]:
    """Write images and label files in the dataset's layout; return both by the image's name."""
    generator = np.random.default_rng(3)
    found = {}
    for index, (height, width) in enumerate(kind.sizes):
        name = f"a_{index:06d}_000019"
        image, label = {
            "cityscapes": (f"leftImg8bit/val/a/{name}_leftImg8bit.png", f"gtFine/val/a/{name}_gtFine_labelIds.png"),
            "ade20k": (f"images/validation/{name}.jpg", f"annotations/validation/{name}.png"),
            "voc": (f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png"),
        }[kind.dataset.name]
        coarse = Image.fromarray(generator.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        ids = np.array(kind.dataset.labels.ids, dtype=np.uint8)
        for path, pixels in (
            (root / image, coarse.resize((width, height), Image.Resampling.BICUBIC)),
            (root / label, Image.fromarray(generator.choice(ids, (height, width)))),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels.save(path)
        found[name] = root / image, root / label
    if kind.dataset.name == "voc":
        (root / "ImageSets/Segmentation").mkdir(parents=True)
        (root / "ImageSets/Segmentation/val.txt").write_text("\n".join(found))
    return found


def logits_of(weights: State, kind: Kind, image: Tensor) -> Tensor:
    """Return the logits (1, classes, H, W) of an image (1, 3, H, W) in 0..255, by mmsegmentation's rules in torch."""
    height, width = image.shape[2:]
    ratio = min(max(kind.scale) / max(height, width), min(kind.scale) / min(height, width))
    size = int(height * ratio + 0.5), int(width * ratio + 0.5)
    seen = F.interpolate(image, size, mode="bilinear", antialias=True) if size != (height, width) else image
    if kind.window is None or kind.stride is None:
        logits, _ = mmsegmentation_network(weights, seen, align_corners=False)
        return F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)
    total, count = torch.zeros(1, kind.dataset.labels.num_classes, *size), torch.zeros(1, 1, *size)
    rows, columns = (max(side - kind.window + kind.stride - 1, 0) // kind.stride + 1 for side in size)
    for row in range(rows):
        for column in range(columns):
            bottom, right = (
                min(at * kind.stride + kind.window, side) for at, side in zip((row, column), size, strict=True)
            )
            top, left = max(bottom - kind.window, 0), max(right - kind.window, 0)
            logits, _ = mmsegmentation_network(weights, seen[:, :, top:bottom, left:right], align_corners=True)
            total[:, :, top:bottom, left:right] += logits
            count[:, :, top:bottom, left:right] += 1
    return F.interpolate(total / count, (height, width), mode="bilinear", align_corners=False)


def run(*arguments: Any) -> int:
    return evaluate.main([*map(str, arguments), "--workers", "0", "--device", "cpu"])


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_a_published_checkpoint_is_evaluated_as_its_config_says(
    name: str, state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = KINDS[name]
    labels = kind.dataset.labels
    weights, file = published(kind, state, tmp_path)
    images = write_images(kind, tmp_path / "data")
    flags = ("--data", tmp_path / "data", "--record", tmp_path / "scores.jsonl")
    assert run("--checkpoint", file, *flags, "--save-predictions", tmp_path / "saved") == 0
    out = capsys.readouterr().out
    assert f"mmsegmentation's CCNet: {kind.dataset.name}, {len(images)} images, {kind.told}" in out
    matrix = np.zeros((labels.num_classes, labels.num_classes), dtype=np.int64)
    for image, (source, label) in images.items():
        pixels = torch.from_numpy(np.array(Image.open(source))).permute(2, 0, 1)[None].float()
        logits = logits_of(weights, kind, pixels)[0]
        best, second = logits.topk(2, dim=0).values
        sure = (best - second > 2e-4 * logits.abs().max()).numpy()
        predicted = np.asarray(Image.open(tmp_path / "saved" / f"{image}.png"))
        assert sure.mean() > 0.9
        assert len(np.unique(predicted)) > 2
        assert np.array_equal(predicted[sure], labels.to_file[logits.argmax(0).numpy()][sure])
        truth = labels.to_train[np.asarray(Image.open(label))]
        np.add.at(matrix, (truth, labels.to_train[predicted]), 1)
    records = [json.loads((tmp_path / "scores.jsonl").read_text())]
    assert np.array_equal(records[0]["matrix"], matrix)

    # Converted, it is the same evaluation.
    assert convert.main([str(file), str(tmp_path / "converted.safetensors")]) == 0
    assert run("--checkpoint", tmp_path / "converted.safetensors", *flags) == 0
    records = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert records[1]["matrix"] == records[0]["matrix"]
    for key in ("mode", "window", "stride", "short_side", "long_side", "fit"):
        assert records[1][key] == records[0][key]


def test_flags_are_stronger_than_the_config(state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind = KINDS["cityscapes 769x769"]
    _, file = published(kind, state, tmp_path)
    write_images(kind, tmp_path / "data")
    flags = ("--checkpoint", file, "--data", tmp_path / "data")
    assert run(*flags, "--mode", "whole", "--short-side", 33) == 0
    told = "whole, short side 33, long side 129 at most, scales 1.0, mean of logits (long side as in the file)"
    assert told in capsys.readouterr().out
    assert run(*flags, "--fit", 40, 60, "--stride", 40) == 0
    told = "sliding windows of 48x48 every 40x40 pixels, largest size in (40, 60), scales 1.0, mean of logits "
    assert f"{told}(mode, window as in the file)" in capsys.readouterr().out
    assert run(*flags, "--dataset", "camvid") == 2
    assert "must have the network's 19 classes, got camvid with 11" in capsys.readouterr().err


def test_what_is_not_taken_from_a_config_is_told(
    state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = KINDS["voc"]
    _, file = published(kind, state, tmp_path)
    content = torch.load(file, weights_only=True)
    content["meta"]["config"] = content["meta"]["config"].replace("keep_ratio=True", "keep_ratio=False")
    torch.save(content, file)
    write_images(kind, tmp_path / "data")
    assert run("--checkpoint", file, "--data", tmp_path / "data", "--short-side", 24) == 0
    out = capsys.readouterr().out
    assert "note: the size of the config's images was not taken" in out
    assert "whole, short side 24, scales 1.0, mean of logits (mode as in the file)" in out
