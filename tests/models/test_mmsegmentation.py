"""Configs of mmsegmentation: what they say of the evaluation, and that nothing of them is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ccgpu.models.mmsegmentation import ConfigEvaluation, read_evaluation
from tests.models.mmsegmentation_configs import KINDS, WANTED, of_0x, of_1x

WHOLE = "dict(mode='whole')"
NO_SIZE = "the size of the config's images was not taken"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", [of_0x, of_1x])
def test_the_published_kinds(kind: str, version: Any) -> None:
    dataset, prediction = WANTED[kind]
    assert read_evaluation(version(*KINDS[kind])) == ConfigEvaluation(prediction, dataset)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: f"# configs/ccnet.py\n_base_ = ['../_base_/models/ccnet.py']\n{text}",
        lambda text: text.replace("train_cfg=dict()", "train_cfg=dict(_delete_=True, frozen=None)"),
        lambda text: text.replace("CityscapesDataset", "mmseg.CityscapesDataset"),
        lambda text: text.replace("(2048, 1024)", "(1024, 2048)").replace("(1024, 2048)", "[1024, 2048]", 1),
        # Code between the values: what it would give is not known, and it is not run.
        lambda text: f"import os\nroot = os.environ['DATA'] + '/x'\n{text}\nfor i in range(3):\n    model = i\n",
    ],
    ids=["base", "delete", "scope", "order", "code"],
)
@pytest.mark.parametrize("version", [of_0x, of_1x])
def test_other_ways_to_write_a_config(change: Any, version: Any) -> None:
    dataset, prediction = WANTED["cityscapes 512x1024"]
    assert read_evaluation(change(version(*KINDS["cityscapes 512x1024"]))) == ConfigEvaluation(prediction, dataset)


def test_a_config_printed_as_a_dictionary() -> None:
    wanted = ConfigEvaluation({"mode": "whole", "short_side": 512, "long_side": 2048}, "ade20k")
    step = {"type": "Resize", "scale": (2048, 512), "keep_ratio": True}
    inner = {"type": "ADE20KDataset", "pipeline": [step]}
    tested = {"dataset": {"type": "RepeatDataset", "times": 1, "dataset": inner}}
    values = {"model": {"test_cfg": {"mode": "whole"}}, "test_dataloader": tested}
    assert read_evaluation(str(values)) == wanted
    assert read_evaluation(f"Config (path: configs/ccnet (1).py): {values}") == wanted
    tested = {"type": "ConcatDataset", "datasets": [inner, {"type": "Other"}]}
    assert read_evaluation(str({**values, "test_dataloader": {"dataset": tested}})) == wanted


def test_names_stand_for_what_was_assigned_before() -> None:
    text = f"""size = (2048, 512)
base = dict(type='Resize', scale=(1, 1), keep_ratio=True)
test_pipeline = [dict(type='LoadImageFromFile'), dict(base, scale=size), dict(**base)]
pipeline = [{{**base, 'scale': size}}]
test_dataloader = dict(dataset=dict(pipeline=pipeline, type=kind))
model = dict(test_cfg={WHOLE})
"""
    assert read_evaluation(text).prediction == {"mode": "whole", "short_side": 512, "long_side": 2048}


@pytest.mark.parametrize(
    ("test_cfg", "pipeline", "prediction", "note"),
    [
        (WHOLE, "[dict(type='ResizeShortestEdge', scale=6, max_size=25)]", {"short_side": 6, "long_side": 25}, ""),
        (WHOLE, "[]", {}, ""),
        (WHOLE, "made()", {}, ""),
        (WHOLE, "[dict(type='Resize', scale=(9, 9))]", {}, "keeps the ratio: {'scale': [9, 9], 'type': 'Resize'}"),
        (WHOLE, "[dict(type='Resize', scale=(9, 9), keep_ratio=False)]", {}, NO_SIZE),
        (WHOLE, "[dict(type='Resize', scale_factor=0.5, keep_ratio=True)]", {}, NO_SIZE),
        (WHOLE, "[dict(type='Resize', scale=(9, 0), keep_ratio=True)]", {}, "'short_side': 0"),
        (
            WHOLE,
            "[dict(type='MultiScaleFlipAug', img_scale=[(9, 9), (7, 7)], transforms=[dict(type='Resize')])]",
            {},
            NO_SIZE,
        ),
        (
            WHOLE,
            "[dict(type='MultiScaleFlipAug', img_scale=[(9, 8)], flip=True, transforms=[dict(type='Resize')])]",
            {"short_side": 8, "long_side": 9},
            "--scales and --flip do that",
        ),
        (
            WHOLE,
            "[dict(type='Resize', scale=(9, 8), keep_ratio=True), dict(type='ResizeToMultiple', size_divisor=32)]",
            {"short_side": 8, "long_side": 9},
            "left out, which changes sizes: ResizeToMultiple",
        ),
        ("dict(mode='tiles')", "[]", None, "test_cfg was not taken, which is no mode of ours: {'mode': 'tiles'}"),
        ("dict(mode='slide')", "[]", None, "test_cfg was not taken"),
        ("dict(mode='slide', crop_size=(4, 4), stride=(5, 5))", "[]", None, "test_cfg was not taken"),
        ("dict(mode='slide', crop_size=4, stride=3)", "[]", None, "test_cfg was not taken"),
        ("dict()", "[]", None, ""),
    ],
)
def test_what_is_not_taken_is_told(test_cfg: str, pipeline: str, prediction: Any, note: str) -> None:
    found = read_evaluation(f"test_pipeline = {pipeline}\nmodel = dict(test_cfg={test_cfg})")
    assert found.prediction == ({} if prediction is None else {"mode": "whole", **prediction})
    assert len(found.notes) == bool(note)
    assert note in "".join(found.notes)
    assert found.dataset is None


@pytest.mark.parametrize("text", ["model = dict(", "a\0b", "(" * 5000, "not python", f"x = {'-' * 100000}1"])
def test_a_text_that_is_no_python_is_told(text: str) -> None:
    found = read_evaluation(text)
    assert (found.prediction, found.dataset, len(found.notes)) == ({}, None, 1)
    assert "no Python text" in found.notes[0]


def test_no_text_is_no_config() -> None:
    assert read_evaluation(" \n") == ConfigEvaluation()


def test_nothing_of_a_config_is_run(tmp_path: Path) -> None:
    target = tmp_path / "made"
    attack = f"__import__('pathlib').Path({str(target)!r}).touch()"
    text = f"model = dict(test_cfg=dict(mode={attack}))\ntest_pipeline = [{attack}]\n{attack}\n"
    assert read_evaluation(text).prediction == {}
    assert read_evaluation(f"{{'model': {attack}}}").prediction == {}
    assert not target.exists()


def test_values_that_grow_at_each_line_are_read_at_once() -> None:
    lines = ["a = dict(mode='x', b=[1, 1])", *("a = dict(mode='x', b=[a, a])" for _ in range(200)), "test_cfg = a"]
    assert len(read_evaluation("\n".join(lines)).notes[0]) < 500


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["test_cfg", "mode", "type", "scale", "dataset", "pipeline"]), inner)
        ),
        max_leaves=20,
    )
)
def test_no_value_is_unexpected(value: Any) -> None:
    names = ("model", "test_cfg", "test_dataloader", "test_pipeline", "data", "dataset_type")
    text = "\n".join(f"{name} = {value!r}" for name in names)
    assert isinstance(read_evaluation(text), ConfigEvaluation)
