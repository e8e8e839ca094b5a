"""Fixtures for the documentation's reader: synthetic datasets, a published checkpoint, images, a video."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ccgpu.models.resnet import V1C_STEM
from ccgpu.train import ade20k, camvid, cityscapes, lip, voc
from ccgpu.train.data.video import VideoWriter
from ccgpu.train.scenes import streets
from tests.docs.reader import ROOT
from tests.models.published_files import config_text, mmsegmentation_file
from tests.train import narrow
from tests.train.browser import browser  # noqa: F401  # for the tests of pages
from tests.train.folders import write_folder
from tests.train.narrow import NARROW, narrow_backbone  # noqa: F401  # for all tests of this folder

SIZE = (64, 96)  # height and width of the synthetic images


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the folder of a small synthetic dataset by its name; writes it at the first request."""
    root = tmp_path_factory.mktemp("data")
    written: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in written:
            written[name] = root / name
            if name == "ponds":
                write_ponds(root / name)
            else:
                module = {"ade20k": ade20k, "camvid": camvid, "cityscapes": cityscapes, "lip": lip, "voc": voc}[name]
                number = 7 if name == "camvid" else 4  # camvid: videos longer than the pages' clips of 5
                others = {"ade20k": ("training", "validation"), "voc": ("train", "aug", "val")}
                splits = dict.fromkeys(others.get(name, ("train", "val", "test")), number)
                write_synthetic = module.DATASET.write_synthetic
                assert write_synthetic is not None
                write_synthetic(root / name, splits, SIZE, 0)
        return written[name]

    return folder


def write_ponds(root: Path) -> None:
    """The dataset of docs/own-data.md."""
    for seed, split in enumerate(("train", "val")):
        generator = np.random.default_rng(seed)
        for kind in ("images", "labels"):
            (root / split / kind).mkdir(parents=True)
        for name in "abcdef":
            ids = np.kron(generator.integers(0, 4, (5, 7)), np.ones((9, 9))).astype(np.uint8)
            Image.fromarray(np.stack([60 * ids, 255 - 60 * ids, ids], axis=-1)).save(
                root / split / "images" / f"{name}.jpg"
            )
            Image.fromarray(ids).save(root / split / "labels" / f"{name}.png")


def v1c_file() -> dict[str, torch.Tensor]:
    """ImageNet weights of a ResNet of mmsegmentation, under the names of its files."""
    entries = {}
    for name, value in narrow.build(NARROW, stem="v1c").state_dict().items():
        ours = next((prefix for prefix in V1C_STEM if name.startswith(prefix)), "")
        entries[V1C_STEM.get(ours, "") + name.removeprefix(ours)] = value
    return entries


@pytest.fixture(scope="session")
def handed_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every reader's folder holds: a published checkpoint, ImageNet weights, images and their masks, a video."""
    pytest.importorskip("av")
    root = tmp_path_factory.mktemp("handed_out")
    state = mmsegmentation_file(50, classes=19)
    file = {"meta": {"config": config_text(True, 2), "epoch": 1}, "state_dict": state}
    torch.save(file, root / "ccnet_r50-d8_769x769.pth")
    torch.manual_seed(0)
    torch.save(narrow.build(NARROW).state_dict(), root / "resnet101.pth")
    torch.save(v1c_file(), root / "resnet50_v1c.pth")
    frames = [streets.draw_scene(SIZE, np.random.default_rng(index), index)[0] for index in range(3)]
    for name, frame in zip(("photos/street.jpg", "photos/park.png", "more/a.png"), frames, strict=True):
        (root / name).parent.mkdir(exist_ok=True)
        Image.fromarray(frame).save(root / name)
    write_folder(root / "lakes", 6)
    write_folder(root / "my-images", 20)
    with VideoWriter(root / "holiday.mp4", Fraction(10)) as video:
        for frame in frames:
            video.add(frame)
    return root


@pytest.fixture
def folder(handed_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's folder. The checkpoint, 100 MB that no page changes, is linked; all else is copied."""

    def link_or_copy(source: str, target: str) -> None:
        (os.link if source.endswith(".pth") else shutil.copy2)(source, target)

    shutil.copytree(handed_out, tmp_path, copy_function=link_or_copy, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))  # for torchrun's processes
    return tmp_path
