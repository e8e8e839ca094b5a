"""Files of whole networks: what is read is what was written; damaged, foreign and incomplete files are refused."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from ccgpu.models import checkpoint
from ccgpu.models.ccnet import CCNet
from tests.models.problems import random_images
from tests.models.published_files import State, saved, without


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
    known = {"labels": {"names": ["x"]}, "value_range": (0.0, 4095.0), "source": found.source, "notes": found.notes}
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
    content = {"format": checkpoint.RUN_FORMAT, "iteration": 1, "network": net.config, "model": net.state_dict()}
    torch.save(content, tmp_path / "last.pt")
    assert checkpoint.read(tmp_path / "last.pt").network == net.config
    torch.save({**content, "format": 3, "data_set": "lip"}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=rf"must have format {checkpoint.RUN_FORMAT} .*, got 3; read it with"):
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
        {"ccgpu": {"format": checkpoint.FORMAT, "network": {"backbone": "vgg"}}, "state_dict": {"a": torch.zeros(1)}},
        {"ccgpu": {"format": checkpoint.FORMAT, "network": {"wings": 2}}, "state_dict": {"a": torch.zeros(1)}},
        {
            "ccgpu": {"format": checkpoint.FORMAT, "network": {"backbone": "resnet18"}},
            "state_dict": {"a": torch.zeros(1)},
        },
        {"ccgpu": {"format": checkpoint.FORMAT, "network": {"backbone": "resnet18"}}},
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


def test_files_run_no_code(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    with pytest.raises(ValueError, match="cannot be read as one"):
        CCNet.from_checkpoint(saved({"state_dict": {}, "meta": Payload()}, tmp_path))
    assert not (tmp_path / "ran").exists()


def test_objects_beside_the_weights_are_named(mmsegmentation: State, tmp_path: Path) -> None:
    """Checkpoints that mmsegmentation 1.x writes during training contain such objects."""
    path = saved({"message_hub": Fraction(1, 2), "state_dict": mmsegmentation}, tmp_path)
    with pytest.raises(ValueError, match=r"holds a fractions\.Fraction beside its weights.* save its 'state_dict'"):
        CCNet.from_checkpoint(path)


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
