"""The command of the far-context dataset: files, flags, clips; and that attention learns what convolutions cannot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.far_context.runs import Scenes, evaluate, settings_of, train
from ccgpu.train import far_context
from ccgpu.train.data.clips import evaluation_clips, training_clips
from ccgpu.train.data.reading import read_pair
from ccgpu.train.scenes.discs import CLASSES
from tests.train.training import TINY, told

FEW = [*TINY, "--backbone", "local"]


def test_files_hold_the_scenes_of_their_names(tmp_path: Path) -> None:
    far_context.write_scenes(tmp_path / "scenes", {"train": 4, "val": 3}, (64, 96), 5, markers=2, frames=2)
    train, val = (far_context.find_pairs(tmp_path / "scenes", split) for split in ("train", "val"))
    names = [f"scene{number:06d}_f{frame}" for number in (0, 1) for frame in (0, 1)]
    assert [pair.name for pair in train] == [pair.name for pair in val] == names  # val: rounded up to whole videos
    assert [far_context.frame_of(name) for name in names[:3]] == [
        ("scene000000", 0),
        ("scene000000", 1),
        ("scene000001", 0),
    ]
    assert len(training_clips(train, 2, far_context.frame_of)) == 2
    assert [first for _, first in evaluation_clips(val, 2, far_context.frame_of)] == [0, 0]
    for pairs in (train, val):
        for one, other in zip(pairs[::2], pairs[1::2], strict=True):
            _, first = read_pair(one, far_context.LABELS)
            _, second = read_pair(other, far_context.LABELS)
            assert sorted([first.any(), second.any()]) == [False, True]  # the squares' frame has no discs
    with pytest.raises(ValueError, match="frame_of: name must be sceneNUMBER_fNUMBER, got 'scene1'"):
        far_context.frame_of("scene1")


def test_another_variant_is_not_taken_for_the_same_images(tmp_path: Path) -> None:
    far_context.write_scenes(tmp_path / "scenes", {"train": 1}, (64, 64), 0)
    with pytest.raises(ValueError, match="write_synthetic: root must be empty or hold the images"):
        far_context.write_scenes(tmp_path / "scenes", {"train": 1}, (64, 64), 0, markers=2)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--context", "none"],
        ["--context", "nonlocal", "--markers", "4"],
        ["--context", "psp"],
        ["--context", "aspp"],
        ["--recurrence", "3", "--clip", "3"],
    ],
    ids=" ".join,
)
def test_the_command_trains_with_each_context_module(flags: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert far_context.main([*FEW, *flags, "--out", str(out)]) == 0
    saved = json.loads((out / "settings.json").read_text())["settings"]
    assert saved["markers"] == (4 if "--markers" in flags else 1)
    colours = set()
    for path in sorted((out / "scenes" / "images" / "train").iterdir()):
        pixels = np.asarray(Image.open(path)).reshape(-1, 3).astype(int)
        colours |= {name for name, colour in CLASSES if (np.abs(pixels - colour).max(1) < 40).sum() > 100}
    assert len(colours) >= 2
    assert far_context.main(["--resume", "--out", str(out)]) == 0


def test_flags_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ccgpu.train import camvid

    assert far_context.main([*FEW, "--markers", "9", "--out", str(tmp_path / "run")]) == 2
    assert "--markers must be at most 8 for far_context, got 9" in told(capsys, "train")
    assert camvid.main([*TINY, "--markers", "2", "--out", str(tmp_path / "run")]) == 2
    assert "--markers must be 1 for camvid, got 2" in told(capsys, "train")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_attention_learns_what_convolutions_cannot() -> None:
    threads = torch.get_num_threads()
    settings = settings_of("one-square", "rcca-r2", 0)
    scenes = Scenes.draw(settings)
    accuracy = {}
    for context in ("none", "rcca-r2"):
        settings = settings_of("one-square", context, 0)
        accuracy[context] = evaluate(train(settings, scenes)[0], settings, scenes.evaluate)["accuracy"]
    torch.set_num_threads(threads)
    assert accuracy["rcca-r2"] > accuracy["none"] + 0.2
    assert accuracy["rcca-r2"] > 0.75
