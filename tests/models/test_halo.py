"""Layers and a network on shards of maps, on three gloo processes that `tests/models/shards.py` runs."""

import pickle

import pytest
import torch
from torch import nn

from ccgpu.models.attention import RCCA, attention_map
from ccgpu.models.ccnet import CCNet
from ccgpu.models.context import ASPP, NonLocal, PyramidPooling
from ccgpu.models.efficientnet import SameConv2d
from ccgpu.models.halo import HaloConv2d, HaloMaxPool2d, convert_to_shards
from ccgpu.models.insertion import insert_before
from tests.models.shards import CASES, IMAGE, PHOTO, RANKS, backbone, data_of, network, run
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


def test_the_backbone_is_that_of_the_whole_map(saved):
    check([rank["backbone"] for rank in saved], run(backbone(), data_of(PHOTO)), -2)


def test_a_mistake_is_an_error_on_all_ranks(saved):
    errors = [rank["errors"] for rank in saved]
    for name, text in {
        "no outputs": "every rank must have outputs along the sharded axis, got none on rank 1 for shards of [1, 1, 1]",
        "width": "the size that is not sharded must be equal on all ranks, got 2 on rank 0 and 3 on rank 1",
        "other layer": "padding must be equal on all ranks, got 2 on rank 0 and 1 on rank 1",
        "out_channels": "out_channels must be equal on all ranks, got 2 on rank 0 and 4 on rank 1",
        "groups": "groups must be equal on all ranks, got 1 on rank 0 and 2 on rank 1",
    }.items():
        assert all(error[name].startswith(f"ValueError: HaloConv2d: {text}") for error in errors)
    for name, text in {
        "no batch": "ValueError: HaloConv2d: x must be (B, C, H, W), got shape (2, 1, 3)",
        "no tensor": "TypeError: HaloConv2d: x must be a tensor, got NoneType",
        "meta": "ValueError: HaloConv2d: x must be a dense tensor on a CPU or CUDA device, got torch.strided on meta",
        "dtype": "TypeError: HaloConv2d: x must have the dtype of the weights, torch.float32, got torch.float64",
        "channels": "ValueError: RCCA: x must have 2 channels",
        "attention, meta": "ValueError: distributed.cca: q, k and v must be dense tensors on a CPU or CUDA device, got",
        "attention, sparse": "",
    }.items():
        assert errors[0][name].startswith(text)
        assert all("got an error on rank 0" in error[name] for error in errors[1:])


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}, {"dim": 1}])
def test_layers_refuse_what_they_do_not_compute(options):
    with pytest.raises(ValueError, match=r"HaloConv2d: (padding|dim) must be"):
        HaloConv2d(1, 1, 3, **options)


def test_pooling_refuses_indices():
    with pytest.raises(ValueError, match="return_indices must be False"):
        HaloMaxPool2d(2, return_indices=True)


WHOLE = {
    "ConvTranspose2d": nn.ConvTranspose2d(1, 1, 3),
    "AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d(1),
    "AvgPool2d": nn.AvgPool2d(2),
    "LPPool2d": nn.LPPool2d(2, 2),
    "FractionalMaxPool2d": nn.FractionalMaxPool2d(2, output_size=2),
    "GroupNorm": nn.GroupNorm(1, 2),
    "InstanceNorm2d": nn.InstanceNorm2d(2),
    "LayerNorm": nn.LayerNorm((4, 4)),
    "Upsample": nn.Upsample(scale_factor=2, mode="bilinear"),
    "Softmax": nn.Softmax(2),
    "ReflectionPad2d": nn.ReflectionPad2d(1),
    "ZeroPad2d": nn.ZeroPad2d(1),
    "Unfold": nn.Unfold(3),
    "Flatten": nn.Flatten(),
    "MultiheadAttention": nn.MultiheadAttention(4, 1),
    "NonLocal": NonLocal(8),
    "PyramidPooling": PyramidPooling(8),
    "ASPP": ASPP(8),
    "CCNet": CCNet("local", 2, head_channels=8),
    "SameConv2d": SameConv2d(1, 1, 3),
}


@pytest.mark.parametrize("name", WHOLE)
def test_conversion_refuses_layers_that_would_read_a_shard_alone(name):
    first = nn.Conv2d(1, 1, 3)
    net = nn.ModuleDict({"first": first, "inner": nn.Sequential(WHOLE[name])})
    with pytest.raises(TypeError, match=f"got {name} at inner.0; it would read a shard alone"):
        convert_to_shards(net, object())
    assert type(first) is nn.Conv2d  # nothing is converted
    with pytest.raises(TypeError, match=f"got {name} at the network itself"):
        convert_to_shards(WHOLE[name], object())


def test_conversion_leaves_layers_that_read_one_position():
    layers = [nn.ReLU(), nn.PReLU(), nn.Softmax(1), nn.GLU(-3), nn.Dropout2d(), nn.BatchNorm2d(2), nn.Linear(3, 3)]
    layers += [nn.Identity(), nn.LayerNorm(3), nn.Upsample(scale_factor=2), nn.PixelShuffle(2), nn.Conv2d(2, 2, 1)]
    kinds = [type(layer) for layer in layers]
    assert [type(layer) for layer in convert_to_shards(nn.Sequential(*layers), object())] == kinds


@pytest.mark.parametrize("layer", [nn.Conv2d(1, 1, 3), nn.MaxPool2d(2), RCCA(8)])
def test_a_layer_by_itself_is_converted(layer):
    group = object()
    assert convert_to_shards(layer, group) is layer
    assert isinstance(layer, (HaloConv2d, HaloMaxPool2d, RCCA))
    assert layer.group is group


def test_a_layer_of_two_names_is_one_layer_afterwards_too():
    layer = nn.Conv2d(1, 1, 3, padding=1)
    net = convert_to_shards(nn.Sequential(layer, nn.ReLU(), layer), object())
    assert net[0] is net[2] is layer
    assert type(layer) is HaloConv2d


def test_conversion_keeps_hooks_and_submodules():
    calls = []
    layer = nn.Conv2d(1, 8, 1, stride=2)
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    insert_before(layer, RCCA(1, gamma=1.0), "rcca")
    names = [*layer.state_dict()]
    convert_to_shards(layer, None)
    assert [*layer.state_dict()] == names
    assert layer.rcca.sharded_dim == -2
    layer.__class__ = nn.Conv2d
    layer(torch.zeros(1, 1, 3, 3))
    assert calls == ["before"]


def test_groups_are_asked_for_after_a_network_comes_from_a_file():
    net = pickle.loads(pickle.dumps(convert_to_shards(nn.Sequential(nn.Conv2d(8, 8, 3), RCCA(8)), object())))
    for module in net:
        with pytest.raises(RuntimeError, match=f"{type(module).__name__}: group must be set again"):
            module(torch.zeros(1, 8, 4, 4))
    assert "sharded_dim=-2" in repr(net)
    again = pickle.loads(pickle.dumps(net))
    with pytest.raises(RuntimeError, match="group must be set again"):
        _ = again[1].group
    group = object()
    convert_to_shards(net, group, -1)
    assert net[0].group is net[1].group is group
    assert (net[0].axis, net[1].sharded_dim) == (1, -1)


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
