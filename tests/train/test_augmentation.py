"""The flags of the augmentation: they reach the training images, and what cannot work is told before anything runs."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from ccgpu.models.image_format import ImageFormat
from ccgpu.models.normalisation import Normalise
from ccgpu.train import cityscapes, command
from ccgpu.train.data.clips import training_clips
from ccgpu.train.data.samples import TrainStream
from ccgpu.train.data.transforms import TrainTransform
from ccgpu.train.runs import setup
from ccgpu.train.runs.settings.training import Settings
from tests.train.training import TINY, told

FLAGS = {
    "random_short_sides": (48, 64),
    "random_long_side": 90,
    "random_scale": (0.7, 2.1),
    "random_scale_step": 0.1,
    "cat_max_ratio": 0.75,
    "random_rotation": 10.0,
    "random_flip": False,
    "photometric": True,
}
WORDS = [
    *("--random-short-sides", "48", "64", "--random-long-side", "90", "--random-scale", "0.7", "2.1"),
    *("--random-scale-step", "0.1", "--cat-max-ratio", "0.75", "--random-rotation", "10", "--photometric"),
]


@pytest.mark.parametrize("name", [*FLAGS])
def test_each_setting_reaches_the_training_images(name: str, tiny_data: Path) -> None:
    pairs = cityscapes.find_pairs(tiny_data, "train")
    chosen: dict[str, Any] = {name: FLAGS[name]}
    if name == "random_scale_step":
        chosen["random_scale"] = FLAGS["random_scale"]
    settings = Settings(crop=(24, 32), workers=0, **chosen)
    clips = training_clips(pairs, 1, None)
    batches = setup.load_training(settings, cityscapes.DATASET, clips, Normalise(), 0, torch.device("cpu"))
    assert isinstance(batches.dataset, TrainStream)
    transform, plain = batches.dataset.transform, TrainTransform((24, 32))
    assert isinstance(transform, TrainTransform)
    for field in dataclasses.fields(TrainTransform):
        if field.name not in ("normalise", "exchange"):
            assert getattr(transform, field.name) == chosen.get(field.name, getattr(plain, field.name))


def test_a_resumed_run_with_every_augmentation_ends_like_an_undisturbed_one(tiny_data: Path, tmp_path: Path) -> None:
    alone, out = tmp_path / "alone", tmp_path / "run"
    arguments = [*TINY, "--context", "none", *WORDS, "--data", str(tiny_data)]
    assert cityscapes.main([*arguments, "--out", str(alone)]) == 0
    assert cityscapes.main(["--resume", str(alone / "previous.pt"), "--out", str(out)]) == 0
    before, one, other = (
        torch.load(path, weights_only=True) for path in (alone / "previous.pt", alone / "last.pt", out / "last.pt")
    )
    assert [saved["iteration"] for saved in (before, one, other)] == [1, 2, 2]
    assert {name: one["settings"][name] for name in FLAGS} == {**FLAGS, "random_flip": True}
    assert any(not torch.equal(value, before["model"][name]) for name, value in one["model"].items())
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--random-scale-step", "0.4"), "--random-scale-step must lead from 0.75 to 2.0 of --random-scale in whole"),
        (("--random-scale-step", "-1"), "--random-scale-step must be 0.0 or more, got -1.0"),
        (("--cat-max-ratio", "75"), "--cat-max-ratio must be at most 1.0, got 75.0"),
        (("--cat-max-ratio", "0"), "--cat-max-ratio must be 0.01 or more, got 0.0"),
        (("--random-rotation", "200"), "--random-rotation must be at most 180.0, got 200.0"),
        (("--random-long-side", "3"), "--random-long-side must be 16 or more, got 3"),
    ],
)
def test_what_cannot_work_is_told(
    flags: tuple[str, ...], message: str, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert cityscapes.main([*TINY, "--data", str(tiny_data), *flags, "--out", str(out)]) == 2
    assert message in told(capsys, "train")
    assert not out.exists()


def test_colours_of_images_that_are_not_8_bit_rgb_are_not_distorted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    infrared = ImageFormat(4, raw=True, dtype="uint16")
    dataset = dataclasses.replace(cityscapes.DATASET, images=infrared, mean=(1000.0,) * 4, std=(500.0,) * 4)
    assert command.main(dataset, [*TINY, "--photometric", "--out", str(tmp_path / "run")]) == 2
    line = told(capsys, "train")
    assert "--photometric must be left out for images of 4 channels of uint16, because it is defined for 8-bit" in line
    assert not (tmp_path / "run").exists()
