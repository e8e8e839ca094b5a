"""Files of whole networks: what is read is what was written; damaged, foreign and incomplete files are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ccgpu.models import checkpoint
from ccgpu.models.ccnet import CCNet
from ccgpu.models.checkpoint_keys import FORMAT, RUN_FORMAT
from ccgpu.models.image_format import ImageFormat
from ccgpu.models.labels import Labels
from ccgpu.models.weights import safetensors_bytes
from tests.models.problems import random_images
from tests.models.published_files import State, saved, without


def run_checkpoint(net: CCNet, **changes: Any) -> dict[str, Any]:
    """Return the content of a run's checkpoint of a network."""
    content: dict[str, Any] = {
        **{"format": RUN_FORMAT, "iteration": 1, "position": 2, "dataset": "lip", "network": net.config},
        **{
            "labels": None,
            "prediction": {},
            "value_range": None,
            "images": ImageFormat().as_plain(),
            "settings": {},
            "lengths": [1],
            "data": "",
            "folder": None,
            "class_weights": None,
            "model": net.state_dict(),
            "average": None,
        },
        **{"optimiser": {}, "scaler": {}, "random": {}},
    }
    return {**content, **changes}


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
@pytest.mark.parametrize("layout", ["authors", "mmsegmentation"])
def test_converted_file_is_the_same_network(
    layout: str, ending: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    state = request.getfixturevalue(layout)
    original = saved(state, tmp_path)
    target = tmp_path / f"converted{ending}"
    found = checkpoint.read(original)
    net = checkpoint.build(found)
    labels = Labels.numbered(net.config["num_classes"]).as_plain()
    known = {"labels": labels, "value_range": (0.0, 4095.0), "source": found.source, "notes": found.notes}
    checkpoint.write(target, checkpoint.Checkpoint(net.config, net.state_dict(), **known))
    again = checkpoint.read(target)
    assert {name: getattr(again, name) for name in known} == known
    other = CCNet.from_checkpoint(target)
    assert other.config == net.config
    images = random_images(24, 33)
    with torch.no_grad():
        assert torch.equal(other(images), net(images))


def test_a_run_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    """Its keys had other names: read as today's, it would have no dataset."""
    net = CCNet("resnet18", 3, head_channels=16)
    content = run_checkpoint(net)
    torch.save(content, tmp_path / "last.pt")
    assert checkpoint.read(tmp_path / "last.pt").network == net.config
    torch.save({**content, "format": 3, "data_set": "lip"}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=rf"must have format {RUN_FORMAT} .*, got 3; read it with"):
        checkpoint.read(tmp_path / "last.pt")


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"weight": torch.zeros(3)},
        {"state_dict": {"weight": torch.zeros(3)}},
        {"state_dict": 3},
        [torch.zeros(3)],
        {"ccgpu": {"format": 99}, "state_dict": {}},
        {"ccgpu": 3, "state_dict": {}},
        {"ccgpu": {"format": FORMAT, "network": {"backbone": "vgg"}}, "state_dict": {"a": torch.zeros(1)}},
        {"ccgpu": {"format": FORMAT, "network": {"wings": 2}}, "state_dict": {"a": torch.zeros(1)}},
        {
            "ccgpu": {"format": FORMAT, "network": {"backbone": "resnet18"}},
            "state_dict": {"a": torch.zeros(1)},
        },
        {"ccgpu": {"format": FORMAT, "network": {"backbone": "resnet18"}}},
    ],
)
def test_other_files_are_refused_with_a_reason(content: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"CCNet.from_checkpoint: .*file\.pth.* must"):
        CCNet.from_checkpoint(saved(content, tmp_path))


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_files_cut_short_are_refused(ending: str, share: float, tmp_path: Path) -> None:
    net = CCNet("resnet18", 2, head_channels=8, auxiliary=False)
    path = tmp_path / f"net{ending}"
    checkpoint.write(path, checkpoint.Checkpoint(net.config, net.state_dict()))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="cannot be read as one"):
        CCNet.from_checkpoint(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iteration": "7"}, "got iteration of type str"),
        ({"iteration": -7}, "got iteration -7"),
        ({"settings": ["lr"], "dataset": None}, "got dataset of type NoneType; settings of type list"),
        ({"labels": {"names": 3}}, "got labels {'names': 3}"),
        ({"labels": {"names": ["a"], "ids": None}}, "got labels {'names'"),
        ({"value_range": [1]}, r"got value_range \[1\]"),
        ({"value_range": [5, 1]}, r"got value_range \[5, 1\]"),
        ({"value_range": [float("nan")] * 2}, r"got value_range \[nan, nan\]"),
        ({"value_range": [0, 10**400]}, r"got value_range \[0, 1000"),
        ({"wings": 2}, "got a key 'wings'"),
        ({"model": [1, 2]}, "got model of type list"),
        ({"average": [1, 2]}, "got average of type list"),
        ({"average": {"a": torch.zeros(2)}}, "must fit it entry by entry"),
        ({"network": {"backbone": 5, "num_classes": 2}}, "build_backbone: name must be one of .*, got 5"),
        ({"labels": {"names": ["a", "b"]}}, "must hold the classes of its network, got Labels: values must have names"),
        (
            {"labels": {"names": ["a"], "colours": [[1, 2, 3]]}},
            "got names of 1 classes for a network of 2; the",
        ),
        ({"labels": {"names": ["a", "a"], "colours": [[1, 2, 3]] * 2}}, "got Labels: names must be 1..255 different"),
        ({"labels": {"names": ["a", "b"], "colours": [[1, 2, 300]] * 2}}, "got Labels: values must have names and"),
        ({"model": {"a": torch.zeros(2).to_sparse()}}, "must map names to tensors and nothing else, got other entries"),
        ({"model": {"a": 3}}, "must map names to tensors and nothing else, got other entries: a"),
    ],
)
def test_a_run_checkpoint_with_values_of_wrong_types_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    net = CCNet("resnet18", 2, head_channels=8, auxiliary=False)
    with pytest.raises(ValueError, match=message):
        checkpoint.read(saved(run_checkpoint(net, **changes), tmp_path, "last.pt"))


@pytest.mark.parametrize(
    "header",
    ["", "{", "3", "{}", '{"format": 3}', '{"format": 5, "network": 2}', "[" * 100_000, '{"format": ' + "9" * 5000],
    ids=lambda header: header[:30],
)
def test_a_safetensors_file_with_another_header_is_refused(header: str, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(safetensors_bytes({"a": torch.zeros(2)}, {"ccgpu": header}))
    with pytest.raises(ValueError, match=rf"net\.safetensors' must have format {FORMAT} with a network's arguments"):
        checkpoint.read(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["run", "average", "file", "safetensors", "mmsegmentation"])
def test_weights_that_are_not_finite_are_refused(
    kind: str, value: float, mmsegmentation: State, tmp_path: Path
) -> None:
    """Whoever reads such a file gets NaN for every image, and classes of NaN are class 0."""
    net = CCNet("resnet18", 2, head_channels=8, auxiliary=False)
    names = ["head.bottleneck.3.bias", "backbone.bn1.running_var"]
    with torch.no_grad():
        for name in names:
            net.state_dict()[name][0] = value
    if kind == "run":
        path = saved(run_checkpoint(net), tmp_path, "last.pt")
    elif kind == "average":
        whole = CCNet("resnet18", 2, head_channels=8, auxiliary=False).state_dict()
        path = saved(run_checkpoint(net, model=whole, average=net.state_dict()), tmp_path, "last.pt")
    elif kind == "mmsegmentation":
        broken = {**mmsegmentation, "decode_head.conv_seg.bias": torch.tensor([0.0, value, *[1.0] * 5])}
        path, names = saved({"state_dict": broken}, tmp_path, "mm.pth"), ["head.bottleneck.3.bias"]
    else:
        path = tmp_path / ("net.pt" if kind == "file" else "net.safetensors")
        checkpoint.write(path, checkpoint.Checkpoint(net.config, net.state_dict()))
    with pytest.raises(ValueError, match="must hold finite weights, got") as caught:
        CCNet.from_checkpoint(path)
    assert all(f"{name} has 1 of " in str(caught.value) for name in names)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CCNet.from_checkpoint(tmp_path / "nowhere.pth")


def test_incomplete_weights_are_not_written(tmp_path: Path) -> None:
    net = CCNet("resnet18", 2, head_channels=8, auxiliary=False)
    weights = without(net.state_dict(), "head.bottleneck.3.bias")
    with pytest.raises(ValueError, match=r"missing: head\.bottleneck\.3\.bias"):
        checkpoint.write(tmp_path / "net.pt", checkpoint.Checkpoint(net.config, weights))
    with pytest.raises(ValueError, match=r"must end in \.safetensors, \.pt or \.pth"):
        checkpoint.write(tmp_path / "net.onnx", checkpoint.Checkpoint(net.config, net.state_dict()))
    assert not list(tmp_path.iterdir())
