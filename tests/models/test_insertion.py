"""Modules inserted into built networks: values, gradients, checkpoints, and Mask R-CNN of torchvision."""

from __future__ import annotations

import copy
import pickle
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ccgpu.models.attention import RCCA
from ccgpu.models.insertion import insert_before
from tests.models.problems import features, gradients, make
from tests.torchvision_operators import import_torchvision


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return (factor * self.norm(self.conv(x)) + x).relu()


def stage(channels: int = 8, blocks: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(channels) for _ in range(blocks))).double()


@pytest.mark.parametrize("place", [0, 1, -1])
def test_the_block_computes_on_the_modules_output(place: int) -> None:
    net, other, rcca = stage(), stage(), make(RCCA, 8)
    insert_before(net[place], rcca)
    blocks = list(other)
    position = place % len(blocks)
    expected_net = nn.Sequential(*blocks[:position], copy.deepcopy(rcca), *blocks[position:])
    x = features(2).requires_grad_()
    out, expected = net(x), expected_net(x)
    assert torch.equal(out, expected)
    assert not torch.allclose(expected, other(x))
    ours = dict(zip(["x", *(name for name, _ in net.named_parameters())], gradients(out, x, net), strict=True))
    theirs = dict(
        zip(
            ["x", *(name for name, _ in expected_net.named_parameters())],
            gradients(expected, x, expected_net),
            strict=True,
        )
    )
    assert torch.equal(ours["x"], theirs["x"])
    for name, gradient in ours.items():
        if "rcca" in name:
            assert gradient.abs().sum() > 0, name
            assert torch.equal(gradient, theirs[f"{position}.{name.partition('rcca.')[2]}"])


def test_gamma_of_zero_changes_no_bit_and_has_a_gradient() -> None:
    net, x = stage(), features(2)
    before = net(x)
    insert_before(net[-1], RCCA(8).double())
    out = net(x)
    assert torch.equal(out, before)
    out.square().sum().backward()
    assert net[-1].rcca.gamma.grad.abs() > 0


def test_other_arguments_of_the_block_stay() -> None:
    block, x = Block(8).double().eval(), features(2)
    expected = block(make(RCCA, 8)(x), 0.5)
    insert_before(block, make(RCCA, 8))
    assert torch.equal(block(x, 0.5), expected)


# Checkpoints


def test_no_key_changes_and_checkpoints_from_before_load() -> None:
    pretrained = stage().state_dict()
    net = stage()
    for value in net.state_dict().values():
        value.zero_()
    rcca = make(RCCA, 8)
    insert_before(net[-1], rcca)
    assert [name for name in net.state_dict() if "rcca" not in name] == list(pretrained)
    assert {name for name in net.state_dict() if "rcca" in name} == {f"2.rcca.{name}" for name in rcca.state_dict()}
    own = {name: value.clone() for name, value in rcca.state_dict().items()}
    assert str(net.load_state_dict(pretrained)) == "<All keys matched successfully>"
    assert all(torch.equal(net.state_dict()[name], value) for name, value in pretrained.items())
    assert all(torch.equal(rcca.state_dict()[name], value) for name, value in own.items())
    assert not any("rcca" in name for name in pretrained), "the caller's state dict is not changed"


def test_checkpoints_from_after_the_insertion_load_whole_or_are_refused() -> None:
    net, other, plain = stage(), stage(), stage()
    insert_before(net[1], make(RCCA, 8))
    insert_before(other[1], RCCA(8).double())
    saved = net.state_dict()
    other.load_state_dict(saved)
    x = features(2)
    assert torch.equal(other(x), net(x))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*1\.rcca\.gamma"):
        plain.load_state_dict(saved)
    with pytest.raises(RuntimeError, match=r'Missing key.*"1\.rcca\.gamma"'):
        other.load_state_dict({name: value for name, value in saved.items() if name != "1.rcca.gamma"})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_have_their_own_module(copied: Any) -> None:
    net, x = stage().eval(), features(2)
    pretrained = net.state_dict()
    insert_before(net[-1], make(RCCA, 8))
    expected, other = net(x), copied(net)
    nn.init.zeros_(net[-1].rcca.gamma)
    assert torch.equal(other(x), expected)
    assert not torch.equal(net(x), expected)
    other.load_state_dict(pretrained)
    assert torch.equal(other(x), expected)


def test_the_network_compiles_and_exports() -> None:
    net, x = stage().eval(), features(2)
    insert_before(net[-1], make(RCCA, 8))
    expected = net(x)
    assert torch.equal(torch.compile(net, backend="eager", fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), expected)


# Errors


@pytest.mark.parametrize(
    ("insert", "error", "message"),
    [
        (lambda: insert_before("layer3", RCCA(8)), TypeError, "block must be a torch.nn.Module, got str"),
        (lambda: insert_before(Block(8), RCCA), TypeError, "module must be a torch.nn.Module, got ABCMeta"),
        (lambda: insert_before(Block(8), RCCA(8), "conv"), ValueError, "that Block does not use yet.*got 'conv'"),
        (lambda: insert_before(Block(8), RCCA(8), "a.b"), ValueError, r"without a dot, got 'a\.b'"),
        (lambda: insert_before(Block(8), RCCA(8), ""), ValueError, "got ''"),
        (lambda: insert_before(stage(), RCCA(8)), ValueError, r"no container.*got Sequential; .* such as block\[0\]"),
    ],
)
def test_mistakes_are_named(insert: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"insert_before: .*{message}"):
        insert()


def test_a_second_insertion_needs_another_name() -> None:
    block, x = Block(8).double().eval(), features(2)
    expected = block(make(RCCA, 8, 1)(make(RCCA, 8, 2)(x)))
    insert_before(block, make(RCCA, 8, 2))
    with pytest.raises(ValueError, match="got 'rcca'"):
        insert_before(block, make(RCCA, 8, 1))
    insert_before(block, make(RCCA, 8, 1), "second")
    assert torch.equal(block(x), expected)


def test_a_block_without_a_tensor_in_front_is_named() -> None:
    block = Block(8).double()
    insert_before(block, make(RCCA, 8))
    with pytest.raises(TypeError, match=r"Block must be called with a tensor as its first .*, got none; insert"):
        block(x=features(2))
    with pytest.raises(TypeError, match="got list"):
        block([features(2)])


# Mask R-CNN


@pytest.fixture(scope="module")
def torchvision() -> ModuleType:
    return import_torchvision()


def mask_rcnn(torchvision: ModuleType, backbone: str = "resnet50") -> nn.Module:
    torch.manual_seed(0)
    detection = torchvision.models.detection
    body = detection.backbone_utils.resnet_fpn_backbone(backbone_name=backbone, weights=None, trainable_layers=5)
    few = {f"rpn_{step}_nms_top_n_{phase}": 8 for step in ("pre", "post") for phase in ("train", "test")}
    return detection.MaskRCNN(
        body, 4, min_size=96, max_size=128, **few, box_batch_size_per_image=8, box_score_thresh=0.0
    )


def outputs(net: nn.Module, images: list[Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        (found,) = net.eval()(images)
    return found


def test_rcca_in_mask_rcnn_begins_as_the_pretrained_network_and_trains(torchvision: ModuleType) -> None:
    net = mask_rcnn(torchvision)
    images = [torch.rand(3, 90, 120, generator=torch.Generator().manual_seed(1))]
    expected, pretrained = outputs(net, images), {name: value.clone() for name, value in net.state_dict().items()}
    assert len(expected["boxes"]) > 0
    rcca = RCCA(1024)
    insert_before(net.backbone.body.layer3[-1], rcca)
    net.load_state_dict(pretrained)
    found = outputs(net, images)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())

    targets = [
        {
            "boxes": torch.tensor([[10.0, 12.0, 70.0, 80.0]]),
            "labels": torch.tensor([2]),
            "masks": torch.ones(1, 90, 120, dtype=torch.uint8),
        }
    ]
    losses = net.train()(images, targets)
    sum(losses.values()).backward()
    assert rcca.gamma.grad.abs() > 0
    nn.init.ones_(rcca.gamma)
    changed = outputs(net, images)
    assert not torch.equal(changed["scores"], expected["scores"])


@pytest.mark.parametrize(("backbone", "blocks"), [("resnet50", 6), ("resnet101", 23)])
def test_the_last_block_of_res4(torchvision: ModuleType, backbone: str, blocks: int) -> None:
    with torch.device("meta"):
        net = mask_rcnn(torchvision, backbone)
        insert_before(net.backbone.body.layer3[-1], RCCA(1024))
    assert f"backbone.body.layer3.{blocks - 1}.rcca.gamma" in net.state_dict()


def test_the_name_must_be_a_string():
    with pytest.raises(TypeError, match=r"insert_before: name must be a string, got int; pass one like 'rcca'\."):
        insert_before(nn.Conv2d(8, 8, 1), RCCA(8), name=3)
