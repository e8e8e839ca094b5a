"""Layers and a network on shards of maps, on three gloo processes that `tests/models/shards.py` runs."""

import pytest
import torch
from torch import nn

from ccgpu.models.attention import RCCA, attention_map
from ccgpu.models.halo import HaloConv2d, HaloMaxPool2d, convert_to_shards
from tests.models.shards import CASES, IMAGE, RANKS, data_of, network, run
from tests.processes import run_ranks


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What the ranks saved, rank by rank."""
    folder = tmp_path_factory.mktemp("shards")
    for status, errors in run_ranks("tests.models.shards", RANKS, str(folder)):
        assert status == 0, errors
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def check(shards, truth, dim):
    """Raise unless out and the map's gradient are the shards in a row, and the weights' gradients sum to the whole."""
    for number, (parts, whole) in enumerate(zip(zip(*shards, strict=True), truth, strict=True)):
        ours = torch.cat(parts, dim) if number < 2 else torch.stack(parts).sum(0)
        torch.testing.assert_close(ours, whole)


@pytest.mark.parametrize("name", CASES)
def test_layers_are_those_of_the_whole_map(saved, name):
    case = CASES[name]
    check([rank["cases"][name] for rank in saved], run(case.layer, data_of(case)), case.dim)


def test_a_network_is_that_of_the_whole_map(saved):
    net = network()
    truth = run(net, data_of(IMAGE))
    check([rank["network"] for rank in saved], truth, -2)
    for rank in saved:
        assert rank["state"].keys() == net.state_dict().keys()
        for name, value in net.state_dict().items():
            torch.testing.assert_close(rank["state"][name], value)


def test_a_mistake_is_an_error_on_all_ranks(saved):
    errors = [rank["errors"] for rank in saved]
    for name, text in {
        "no outputs": "every rank must have outputs along the sharded axis, got none on rank 1 for shards of [1, 1, 1]",
        "width": "the size that is not sharded must be equal on all ranks, got 2 on rank 0 and 3 on rank 1",
        "other layer": "padding must be equal on all ranks, got 2 on rank 0 and 1 on rank 1",
    }.items():
        assert all(error[name].startswith(f"ValueError: HaloConv2d: {text}") for error in errors)
    assert errors[0]["no batch"].startswith("ValueError: HaloConv2d: x must be (B, C, H, W), got shape (2, 1, 3)")
    assert all("got an error on rank 0" in error["no batch"] for error in errors[1:])


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}, {"dim": 1}])
def test_layers_refuse_what_they_do_not_compute(options):
    with pytest.raises(ValueError, match=r"HaloConv2d: (padding|dim) must be"):
        HaloConv2d(1, 1, 3, **options)


def test_pooling_refuses_indices():
    with pytest.raises(ValueError, match="return_indices must be False"):
        HaloMaxPool2d(2, return_indices=True)


@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(1, 1, 3), nn.AdaptiveAvgPool2d(1), nn.AvgPool2d(2)])
def test_conversion_refuses_layers_that_would_read_a_shard_alone(layer):
    with pytest.raises(TypeError, match=f"got {type(layer).__name__} at inner.0; it would read a shard alone"):
        convert_to_shards(nn.ModuleDict({"inner": nn.Sequential(layer)}), object())


def test_conversion_keeps_parameters_and_1x1_convolutions():
    inner, outer = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 1)
    net = convert_to_shards(nn.Sequential(inner, outer, RCCA(2)).eval(), object(), -1)
    assert type(net[0]) is HaloConv2d
    assert net[0].weight is inner.weight
    assert net[0].bias is inner.bias
    assert not net[0].training
    assert net[1] is outer
    assert net[2].sharded_dim == -1
    assert "sharded_dim=-1" in repr(net[2])


def test_attention_maps_need_whole_maps():
    with pytest.raises(ValueError, match="attention_map: module must attend within a whole map"):
        attention_map(RCCA(4, group=object()), torch.zeros(1, 4, 2, 2), (0, 0))
