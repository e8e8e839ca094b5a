"""The synthetic dataset of each command: found, checked and read back in the layout of the real one."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ccgpu.models.labels import IGNORE
from ccgpu.train import ade20k, camvid, cityscapes, far_context, lip, voc
from ccgpu.train.data.clips import training_clips
from ccgpu.train.data.pairs import Pair
from ccgpu.train.data.reading import read_pair
from tests.train.dataset_files import check

MODULES = [ade20k, camvid, cityscapes, far_context, lip, voc]


SMALL = (64, 96)


def name_of(module: Any) -> str:
    return module.DATASET.name if isinstance(module, ModuleType) else ""


def synthetic_pairs(module: ModuleType, root: Path, number: int, size: tuple[int, int] = SMALL) -> list[Pair]:
    """Write a synthetic split and return its images, checked."""
    split = module.DATASET.recipe.get("train_split", ("train",))[0]
    pairs = module.find_pairs(module.DATASET.write_synthetic(root, {split: number}, size, 3), split)
    check(pairs, module.DATASET.labels)
    assert len(pairs) == number
    return pairs


def shares(module: ModuleType, pairs: list[Pair]) -> dict[str, float]:
    """Return the share of each class in the label maps of pairs, having decoded all images."""
    labels = module.DATASET.labels
    counts = np.zeros(256)
    for pair in pairs:
        image, label = read_pair(pair, labels)
        assert image.shape == (*label.shape, 3)
        assert image.std() > 10
        counts += np.bincount(label.ravel(), minlength=256)
    assert counts[IGNORE] < 0.3 * counts.sum()
    return dict(zip(labels.names, counts[: labels.num_classes] / counts.sum(), strict=True))


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_synthetic_data_is_read_back_and_determined_by_the_seed(module: ModuleType, tmp_path: Path) -> None:
    pairs = synthetic_pairs(module, tmp_path / "first", 2)
    again = synthetic_pairs(module, tmp_path / "again", 2)
    split = module.DATASET.recipe.get("train_split", ("train",))[0]
    other = module.find_pairs(module.DATASET.write_synthetic(tmp_path / "other", {split: 2}, SMALL, 4), split)
    for pair, same, different in zip(pairs, again, other, strict=True):
        assert pair.label is not None
        assert same.label is not None
        assert pair.image.read_bytes() == same.image.read_bytes()
        assert pair.label.read_bytes() == same.label.read_bytes()
        assert pair.image.read_bytes() != different.image.read_bytes()
    unlabelled = module.find_pairs(tmp_path / "first", split, False)
    assert [(pair.image, pair.label) for pair in unlabelled] == [(pair.image, None) for pair in pairs]


def test_synthetic_ade20k_has_many_classes_and_images_of_many_sizes(tmp_path: Path) -> None:
    pairs = synthetic_pairs(ade20k, tmp_path / "synthetic", 12, (128, 192))
    found = {name for name, share in shares(ade20k, pairs).items() if share > 2e-4}
    assert len(found) >= 20
    assert {"streetlight", "plant", "skyscraper", "van", "minibike", "signboard", "box"} <= found
    assert len({Image.open(pair.image).size for pair in pairs}) > 8
    assert {pair.image.suffix for pair in pairs} == {".jpg"}


def test_synthetic_camvid_is_videos_with_gaps_and_has_all_classes(tmp_path: Path) -> None:
    pairs = synthetic_pairs(camvid, tmp_path / "synthetic", 14)
    assert min(shares(camvid, pairs).values()) > 5e-4
    videos: dict[str, list[int]] = {}
    for pair in pairs:
        name, frame = camvid.frame_of(pair.name)
        videos.setdefault(name, []).append(frame)
        label = Image.open(pair.label)  # type: ignore[arg-type]
        assert (label.mode, label.getpalette()[:33]) == ("P", camvid.LABELS.colours.ravel().tolist())
    assert videos == {
        "synthetic00": [0, 30, 60, 90, 120, 150, 240, 270, 300, 330],
        "synthetic01": [0, 30, 60, 90],
    }
    assert len(training_clips(pairs, 4, camvid.frame_of)) == 3 + 1 + 1  # no clip across the gap


def test_synthetic_lip_has_all_parts_and_grey_images(tmp_path: Path) -> None:
    pairs = synthetic_pairs(lip, tmp_path / "synthetic", 30, (128, 80))
    found = shares(lip, pairs)
    assert {name: share for name, share in found.items() if share < 5e-4} == {}
    assert 0.4 < found["background"] < 0.8
    modes = [Image.open(pair.image).mode for pair in pairs]
    assert 1 <= modes.count("L") <= 10
    assert set(modes) == {"L", "RGB"}


def test_synthetic_coarse_labels_are_the_fine_ones_without_borders(tmp_path: Path) -> None:
    splits = {"train": 2, "train_coarse": 2, "train_extra": 1}
    root = cityscapes.write_scenes(tmp_path / "synthetic", splits, SMALL, 3)
    fine, coarse, extra = (cityscapes.find_pairs(root, split) for split in splits)
    assert [pair.image for pair in fine] == [pair.image for pair in coarse]
    for one, other in zip(fine, coarse, strict=True):
        labels, fewer = (read_pair(pair, cityscapes.DATASET.labels)[1] for pair in (one, other))
        assert 0.05 < (fewer != labels).mean() < 0.9
        assert (fewer[fewer != labels] == IGNORE).all()
    assert len(extra) == 1
    assert extra[0].image.read_bytes() != fine[0].image.read_bytes()
