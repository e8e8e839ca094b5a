"""Our attention behind mmsegmentation's CCHead: in a rendering of it, and in the installed one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from ccgpu.models.attention import RCCA, CrissCrossAttention
from ccgpu.models.context import NonLocal
from ccgpu.models.mmcv_attention import MMCVCrissCrossAttention, to_mmcv
from tests.models.openmmlab import openmmlab
from tests.models.problems import features, gradients, make
from tests.models.published_files import CLASSES, HEAD, State
from tests.models.published_networks import criss_cross, mmsegmentation_head
from tests.torchvision_operators import import_torchvision

NAMES = ["gamma.scale", *(f"{part}_conv.{entry}" for part in ("query", "key", "value") for entry in ("weight", "bias"))]


@pytest.fixture
def mmcv(tmp_path: Path) -> Iterator[Callable[[int], nn.Module]]:
    """mmcv's CrissCrossAttention, rendered."""
    with openmmlab(tmp_path, operators=True):
        yield importlib.import_module("mmcv.ops").CrissCrossAttention


def theirs(mmcv: Callable[[int], nn.Module], channels: int) -> Any:
    torch.manual_seed(3)
    module = mmcv(channels).double()
    nn.init.constant_(module.gamma.scale, 0.7)
    return module


# State dicts, both ways


def test_the_rendering_of_mmcv_is_criss_cross_attention(mmcv: Callable[[int], nn.Module]) -> None:
    module, x = theirs(mmcv, 16), features(2, 16)
    state = {f"cca.{name}": value for name, value in module.named_parameters()}
    torch.testing.assert_close(module(x), criss_cross(state, x, "cca", module.gamma.scale))


def test_the_state_dict_has_mmcvs_spelling(mmcv: Callable[[int], nn.Module]) -> None:
    expected = theirs(mmcv, 16).state_dict()
    assert set(expected) == set(NAMES)
    for state in (MMCVCrissCrossAttention(16).state_dict(), to_mmcv(CrissCrossAttention(16).state_dict())):
        assert {name: value.shape for name, value in state.items()} == {
            name: value.shape for name, value in expected.items()
        }


def test_weights_go_both_ways_with_the_same_outputs_and_gradients(mmcv: Callable[[int], nn.Module]) -> None:
    module, x = theirs(mmcv, 16), features(2, 16).requires_grad_()
    expected = module(x)
    for ours in (MMCVCrissCrossAttention(16).double(), CrissCrossAttention(16).double()):
        ours.load_state_dict(module.state_dict())
        torch.testing.assert_close(ours(x), expected)
        other = mmcv(16).double()
        other.load_state_dict(to_mmcv(ours.state_dict()))
        assert torch.equal(other(x), expected)
    wanted = dict(
        zip(["x", *(name for name, _ in module.named_parameters())], gradients(expected, x, module), strict=True)
    )
    found = dict(zip(["x", *(name for name, _ in ours.named_parameters())], gradients(ours(x), x, ours), strict=True))
    found["gamma.scale"] = found.pop("gamma").reshape(())
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9)


def test_every_attention_of_a_network_is_translated_and_nothing_else() -> None:
    net = nn.ModuleDict({"a": RCCA(16, gamma=0.5), "b": nn.Sequential(NonLocal(8), nn.Linear(2, 2))})
    net.register_parameter("gamma", nn.Parameter(torch.zeros(3)))
    net["b"].register_buffer("my_query_conv", torch.zeros(1))
    state = net.state_dict()
    found = to_mmcv(state)
    renamed = {"a.gamma": "a.gamma.scale", "b.0.gamma": "b.0.gamma.scale"}
    assert list(found) == [renamed.get(name, name) for name in state]
    assert found["a.gamma.scale"].shape == ()
    assert found["a.gamma.scale"] == 0.5
    assert all(found[renamed.get(name, name)].data_ptr() == value.data_ptr() for name, value in state.items())
    assert to_mmcv(found) == found
    assert "a.gamma" in state


def test_a_name_that_only_ends_like_an_attentions_is_left_alone() -> None:
    state = {"my_query_conv.weight": torch.zeros(1), "my_gamma": torch.zeros(1), "gamma": torch.zeros(2)}
    assert to_mmcv(state) == state


def test_a_gamma_of_another_shape_is_refused() -> None:
    state = {**CrissCrossAttention(8).state_dict(), "gamma": torch.zeros(8)}
    with pytest.raises(ValueError, match=r"to_mmcv: gamma must be of shape \(1,\), got \(8,\)"):
        to_mmcv(state)


def test_channels_that_mmcv_has_no_queries_for_are_refused() -> None:
    with pytest.raises(ValueError, match="MMCVCrissCrossAttention: in_channels must be 8 or more, got 7"):
        MMCVCrissCrossAttention(7)


def test_parameters_saved_in_place_stay_the_modules_own() -> None:
    """Averaged weights are written through the tensors of a state dict."""
    module = make(MMCVCrissCrossAttention, 8)
    module.state_dict()["gamma.scale"].fill_(0.25)
    assert module.gamma.item() == 0.25


# Behind mmsegmentation's head


def head_of(registry: ModuleType) -> nn.Module:
    sizes = {"in_channels": 2048, "channels": HEAD, "num_classes": CLASSES}
    return registry.MODELS.build({"type": "CCHead", **sizes, "recurrence": 2, "norm_cfg": {"type": "BN"}})


def entries(state: State) -> State:
    return {
        name.removeprefix("decode_head."): value for name, value in state.items() if name.startswith("decode_head.")
    }


def check_head(head: nn.Module, state: State) -> None:
    """Load a published file's head strictly; compare logits, and the state dict it writes, with the file."""
    assert type(head.cca) is MMCVCrissCrossAttention
    head.load_state_dict(entries(state))
    x = torch.randn(2, 2048, 6, 5, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits, expected = head.eval()([x]), mmsegmentation_head(state, x)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    written = head.state_dict()
    assert written.keys() == entries(state).keys()
    assert all(torch.equal(written[name], value) for name, value in entries(state).items())


def register() -> None:
    """The three lines of docs/coming-from.md."""
    cc_head = importlib.import_module("mmseg.models.decode_heads.cc_head")
    cc_head.CrissCrossAttention = MMCVCrissCrossAttention


def test_a_published_head_runs_on_our_attention(mmsegmentation: State, tmp_path: Path) -> None:
    with openmmlab(tmp_path, operators=True):
        registry = importlib.import_module("mmseg.registry")
        importlib.import_module("mmseg.models")
        plain = head_of(registry)
        register()
        head = head_of(registry)
    check_head(head, mmsegmentation)
    plain.load_state_dict(head.state_dict())  # mmsegmentation with mmcv's own module
    x = torch.randn(1, 2048, 4, 3)
    with torch.no_grad():
        torch.testing.assert_close(head([x]), plain.eval()([x]), rtol=1e-4, atol=1e-4)


def stand_in_for_operators() -> ModuleType:
    """The module of docs/coming-from.md for a mmcv without operators."""
    ops = ModuleType("mmcv.ops")
    ops.CrissCrossAttention = MMCVCrissCrossAttention  # type: ignore[attr-defined]
    ops.point_sample = ops.sigmoid_focal_loss = ops.PSAMask = None  # type: ignore[attr-defined]
    return ops


def test_a_published_head_runs_without_mmcvs_operators(mmsegmentation: State, tmp_path: Path) -> None:
    with openmmlab(tmp_path, operators=False):
        with pytest.raises(ModuleNotFoundError, match=r"mmcv\._ext"):
            importlib.import_module("mmseg.models")
        sys.modules["mmcv.ops"] = stand_in_for_operators()
        importlib.import_module("mmseg.models")
        head = head_of(importlib.import_module("mmseg.registry"))
    check_head(head, mmsegmentation)


def test_mmsegmentation_itself_runs_on_our_attention(mmsegmentation: State, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("mmseg") is None:
        pytest.skip("mmsegmentation is not installed")
    import_torchvision()
    try:
        importlib.import_module("mmcv.ops")
    except ModuleNotFoundError:
        monkeypatch.setitem(sys.modules, "mmcv.ops", stand_in_for_operators())
    importlib.import_module("mmseg.models")
    register()
    check_head(head_of(importlib.import_module("mmseg.registry")), mmsegmentation)


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (RCCA(8), r"state must be a state dict, got RCCA; pass what its state_dict\(\) returns"),
        ({"meta": {}, "state_dict": RCCA(8).state_dict()}, "got a mapping with another one at 'meta'; pass that one"),
    ],
)
def test_to_mmcv_refuses_what_is_no_state_dict(state, text):
    with pytest.raises(TypeError, match=text):
        to_mmcv(state)
