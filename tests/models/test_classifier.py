"""Networks for other classes than their file's: rows of the same classes are the file's, the others are drawn."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ccgpu.models import checkpoint
from ccgpu.models.ccnet import CCNet
from ccgpu.models.checkpoint import Checkpoint, with_classes
from ccgpu.models.labels import Labels, same_classes
from tests.models.published_files import HEAD, State, config_text, saved

NAMES = ("road", "traffic light", "Sky", "left arm", "right-arm")
HEADS = ("head.bottleneck.3", "auxiliary_head.3")


@pytest.fixture(scope="module")
def found() -> Checkpoint:
    """A network for the classes of `NAMES`."""
    net = CCNet("resnet18", len(NAMES), head_channels=16)
    return Checkpoint(
        net.config,
        net.state_dict(),
        {"names": list(NAMES), "colours": Labels.numbered(len(NAMES)).colours.tolist(), "ids": [7, 8, 9, 10, 11]},
        {"short_side": 96, "flip_pairs": [[3, 4]]},
    )


def assert_rows(found: Checkpoint, changed: Checkpoint, sources: list[int | None]) -> None:
    """Compare every entry with the file's: rows of both heads by their sources, all others to the bit."""
    for name, value in changed.weights.items():
        old = found.weights[name]
        if name.rpartition(".")[0] not in HEADS:
            assert value is old
            continue
        assert value.shape == (len(sources), *old.shape[1:])
        assert value.dtype == old.dtype
        for row, source in zip(value, sources, strict=True):
            if source is None:
                assert not any(torch.equal(row, other) for other in old)
                assert row.abs().max() <= 1 / 16**0.5
            else:
                assert torch.equal(row, old[source])
    assert changed.weights.keys() == found.weights.keys()


def test_classes_of_the_same_name_keep_their_rows(found: Checkpoint) -> None:
    names = ["sky", "light", "right arm", "ROAD", "left arm", "grass"]
    changed, kept, drawn = with_classes(found, names, 6)
    assert_rows(found, changed, [2, None, 4, 0, 3, None])
    assert (kept, drawn) == (["sky", "right arm", "ROAD", "left arm"], ["light", "grass"])
    assert changed.labels == {"names": names, "colours": Labels.numbered(6).colours.tolist()}
    assert changed.network == {**found.network, "num_classes": 6}
    # The classes of a flip pair have new places.
    assert changed.prediction == {"short_side": 96, "flip_pairs": [[4, 2]]}
    assert checkpoint.build(changed).config["num_classes"] == 6


def test_a_flip_pair_goes_with_either_of_its_classes(found: Checkpoint) -> None:
    changed, _, _ = with_classes(found, ["left arm", "leg"], 2)
    assert_rows(found, changed, [3, None])
    assert changed.prediction == {"short_side": 96}


def test_classes_without_names_are_compared_by_their_number(found: Checkpoint) -> None:
    assert with_classes(found, None, 5) == (found, [*NAMES], [])
    changed, kept, drawn = with_classes(found, None, 3)
    assert_rows(found, changed, [None] * 3)
    assert (kept, drawn, changed.labels) == ([], ["class 0", "class 1", "class 2"], None)
    unnamed = Checkpoint(found.network, found.weights)
    changed, kept, drawn = with_classes(unnamed, ["a", "b", "c", "d", "e"], 5)
    assert_rows(found, changed, [0, 1, 2, 3, 4])
    assert (kept, drawn) == (["a", "b", "c", "d", "e"], [])
    changed, kept, drawn = with_classes(unnamed, ["road", "sky"], 2)
    assert_rows(found, changed, [None, None])
    assert (kept, drawn) == ([], ["road", "sky"])


def test_names_that_are_not_those_of_the_rows_are_not_used(found: Checkpoint) -> None:
    """A published file's classes may be those of its data set alone: fewer or more than its network has."""
    fewer = Checkpoint(found.network, found.weights, {"names": ["sky"], "colours": [[0, 0, 0]]})
    changed, kept, _ = with_classes(fewer, ["sky", "road"], 2)
    assert_rows(found, changed, [None, None])
    assert kept == []


def test_a_network_without_auxiliary_head_has_one_classifier() -> None:
    net = CCNet("resnet18", 2, head_channels=16, auxiliary=False, dims=3)
    old = Checkpoint(net.config, net.state_dict(), {"names": ["a", "b"], "colours": [[0, 0, 0]] * 2})
    changed, _, _ = with_classes(old, ["b", "c", "d"], 3)
    assert_rows(old, changed, [1, None, None])
    assert checkpoint.build(changed).config["num_classes"] == 3


@pytest.mark.parametrize(
    ("names", "number", "message"),
    [
        (["a", "b"], 3, "num_classes must be the number of classes, 1 or more, got 3 for 2 names"),
        (None, 0, "num_classes must be the number of classes, 1 or more, got 0"),
        (["a", "a"], 2, "names must be 1..255 different names"),
    ],
)
def test_classes_that_do_not_fit_are_refused(
    names: list[str] | None, number: int, message: str, found: Checkpoint
) -> None:
    with pytest.raises(ValueError, match=message):
        with_classes(found, names, number)


@pytest.mark.parametrize(
    ("theirs", "ours", "places"),
    [
        (["a", "b"], ["b", "a", "c"], [1, 0, None]),
        (["Motor-bike", "dog"], ["dog", "motor bike"], [1, 0]),
        # The same list but for its spelling: a name with a word more is the same class at its own place alone.
        (["bed ", "television receiver"], ["bed", "television"], [0, 1]),
        (["television receiver", "bed"], ["bed", "television"], [1, None]),
        # Which of two is meant cannot be told.
        (["a-b", "a b", "c"], ["c", "A B"], [2, None]),
        (["c", "a b"], ["a-b", "A B", "a b"], [None, None, 1]),
    ],
)
def test_same_classes(theirs: list[str], ours: list[str], places: list[int | None]) -> None:
    labels = Labels(tuple(ours), Labels.numbered(len(ours)).colours, tuple(range(len(ours))))
    assert same_classes(theirs, labels) == places


# By CCNet.from_checkpoint, for every layout


def layouts(authors: State, mmsegmentation: State) -> dict[str, Any]:
    names = ("road", "sky", "a", "b", "c", "d", "e")
    meta = {"config": config_text(True, 2), "CLASSES": names, "PALETTE": [[1, 2, 3]] * len(names)}
    return {"authors": authors, "mmsegmentation": {"meta": meta, "state_dict": mmsegmentation}}


@pytest.mark.parametrize("layout", ["authors", "mmsegmentation"])
def test_from_checkpoint_takes_another_number_of_classes(
    layout: str, authors: State, mmsegmentation: State, tmp_path: Path
) -> None:
    path = saved(layouts(authors, mmsegmentation)[layout], tmp_path)
    whole = CCNet.from_checkpoint(path)
    with pytest.warns(UserWarning, match=r"rows of 5 of 5 classes are randomly initialised \(class 0, .*train them"):
        net = CCNet.from_checkpoint(path, num_classes=5)
    assert net.config == {**whole.config, "num_classes": 5}
    state = net.state_dict()
    for name, value in whole.state_dict().items():
        if name.rpartition(".")[0] in HEADS:
            assert state[name].shape == (5, *value.shape[1:])
        else:
            assert torch.equal(state[name], value)
    assert state["head.bottleneck.3.weight"].shape[1] == HEAD


def test_from_checkpoint_takes_classes(mmsegmentation: State, tmp_path: Path) -> None:
    path = saved(layouts({}, mmsegmentation)["mmsegmentation"], tmp_path)
    told = r"rows of 1 of 3 classes are randomly initialised \(grass\), those of 2 are the file's \(sky, road\)"
    with pytest.warns(UserWarning, match=told):
        net = CCNet.from_checkpoint(path, classes=("sky", "grass", "road"))
    old = mmsegmentation["decode_head.conv_seg.bias"]
    assert torch.equal(net.state_dict()["head.bottleneck.3.bias"][[0, 2]], old[[1, 0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CCNet.from_checkpoint(path, classes=["e", "b", "sky"]).config["num_classes"] == 3
        assert CCNet.from_checkpoint(path, num_classes=7).config["num_classes"] == 7
    with pytest.raises(ValueError, match="got 2 for 1 names"):
        CCNet.from_checkpoint(path, num_classes=2, classes=["sky"])
    with pytest.raises(ValueError, match="num_classes must be 1 or more, got 0"):
        CCNet.from_checkpoint(path, classes=[])
    with pytest.raises(TypeError, match="classes must be several names, got 'sky'"):
        CCNet.from_checkpoint(path, classes="sky")
    with pytest.raises(TypeError, match=r"classes must be several names, got \[1, 2\]"):
        CCNet.from_checkpoint(path, classes=[1, 2])  # type: ignore[list-item]
    names: Any = np.array(["road", "sky"])
    for given in (names, iter(names)):
        assert CCNet.from_checkpoint(path, classes=given).config["num_classes"] == 2
