"""timm's networks as backbones: compared with timm's own results, with weights from a file and from timm's cache."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ccgpu.models.backbones import build_backbone, load_imagenet
from ccgpu.models.efficientnet import EfficientNetLiteClassifier
from tests.torchvision_operators import import_torchvision

# timm's own small network, for its tests.
SMALL = "test_resnet"


@pytest.fixture(scope="module")
def timm() -> ModuleType:
    if find_spec("timm") is None:
        pytest.skip("timm is not installed (extra timm)")
    import_torchvision()  # timm imports it
    import timm

    return timm


def randomised(network: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Return the state dict with random values in every floating-point entry."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(value.shape, generator=generator) + 0.5
        if name.endswith(("running_var", "bn1.weight"))
        else torch.randn(value.shape, generator=generator) / max(value[0].numel(), 4) ** 0.5
        if value.is_floating_point()
        else value.clone()
        for name, value in network.state_dict().items()
    }


@pytest.mark.parametrize(
    ("name", "activated"),
    [
        (SMALL, False),
        ("mobilenetv3_small_050", True),
        ("regnetx_002", True),
        ("regnety_002", True),
        ("test_byobnet", True),
        ("test_convnext", False),
    ],
)
def test_features_are_timms_at_stride_eight(timm: ModuleType, name: str, activated: bool) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(f"timm:{name}")
    torch.manual_seed(0)
    theirs = timm.create_model(name, features_only=True, output_stride=8)
    images = torch.randn(2, 3, 64, 96)
    for training in (True, False):
        ours, expected = backbone.train(training)(images), theirs.train(training)(images)[-2:]
        for own, other, channels in zip(ours, expected, backbone.channels, strict=True):
            assert own.shape == (2, channels, 8, 12)
            assert other.std() > 1e-4
            assert torch.equal(own, other)
    norms = {type(module) for module in theirs.modules() if isinstance(module, nn.BatchNorm2d)}
    assert (timm.layers.BatchNormAct2d in norms) == activated
    norms = {type(module) for module in backbone.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    assert norms <= {nn.BatchNorm2d}


def test_gradients_reach_every_parameter(timm: ModuleType) -> None:
    torch.manual_seed(0)
    backbone = build_backbone("timm:mobilenetv3_small_050")
    sum(output.square().mean() for output in backbone(torch.randn(2, 3, 40, 40))).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())
    assert next(backbone.parameters()).grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "regnety_002"])
def test_gradients_in_bfloat16_are_those_of_float32(timm: ModuleType, name: str) -> None:
    """torch's own gradients of these dilated convolutions, depthwise and of groups of 8, are wrong on some CPUs."""
    torch.manual_seed(0)
    # In eval mode batch norms do not magnify rounding errors.
    backbone = build_backbone(f"timm:{name}").eval().to(memory_format=torch.channels_last)
    backbone.load_state_dict(randomised(backbone))  # timm begins with zeros at the ends of some blocks
    images = torch.randn(2, 3, 184, 240).to(memory_format=torch.channels_last)
    gradients = []
    for bf16 in (False, True):
        backbone.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = backbone(images)
        sum(output.float().square().mean() for output in outputs).backward()
        gradients.append({key: parameter.grad.clone() for key, parameter in backbone.named_parameters()})
    dilated = [
        f"{key}.weight"
        for key, module in backbone.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups > 1 and module.dilation != (1, 1)
    ]
    assert len(dilated) >= 3
    for key in dilated:
        expected, own = (found[key] for found in gradients)
        assert (own - expected).norm() < 0.1 * expected.norm(), key


def test_mean_and_std_are_those_of_the_weights(timm: ModuleType) -> None:
    backbone = build_backbone("timm:resnet18.a1_in1k")
    assert backbone.mean == pytest.approx((123.675, 116.28, 103.53))
    assert backbone.std == pytest.approx((58.395, 57.12, 57.375))
    assert build_backbone(f"timm:{SMALL}").mean == (127.5, 127.5, 127.5)


def test_efficientnet_lite_computes_the_same_as_timms(timm: ModuleType) -> None:
    """timm's independent implementation has the entries of the classifier in the same order under other names."""
    torch.manual_seed(0)
    ours, theirs = EfficientNetLiteClassifier("lite0").eval(), timm.create_model("tf_efficientnet_lite0").eval()
    state = randomised(ours)
    ours.load_state_dict(state)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), state.values(), strict=True)))
    for size in ((64, 96), (65, 47)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            logits, expected = ours(images), theirs(images)
        assert expected.std() > 1e-2
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


# Weights


def test_load_imagenet_fills_from_a_file(timm: ModuleType, tmp_path: Path) -> None:
    whole = timm.create_model("regnety_002").eval()
    state = randomised(whole)
    torch.save(state, tmp_path / "regnety.pth")
    backbone = build_backbone("timm:regnety_002").eval()
    load_imagenet(backbone, tmp_path / "regnety.pth")
    whole.load_state_dict(state)
    # The stem and the first stage are not dilated, so the classifier computes the same.
    images = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        expected = whole.s1(whole.stem(images))
        torch.testing.assert_close(backbone.network.s1(backbone.network.stem(images)), expected)
    values = [value for name, value in state.items() if not name.startswith("head.")]
    assert len(backbone.state_dict()) == len(values)
    assert all(torch.equal(*pair) for pair in zip(backbone.state_dict().values(), values, strict=True))


def test_load_imagenet_fills_from_what_timm_has_cached(
    timm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, safetensors = pytest.importorskip("huggingface_hub"), pytest.importorskip("safetensors.torch")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    backbone = build_backbone(f"timm:{SMALL}")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"load_imagenet: the weights of 'test_resnet' must be in timm's cache"):
        load_imagenet(backbone, "package")
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())

    entry = tmp_path / f"models--{backbone.network.pretrained_cfg['hf_hub_id'].replace('/', '--')}"
    for folder in ("refs", "snapshots/1"):
        (entry / folder).mkdir(parents=True)
    (entry / "refs" / "main").write_text("1")
    state = randomised(timm.create_model(SMALL))
    safetensors.save_file(state, entry / "snapshots" / "1" / "model.safetensors")
    load_imagenet(backbone, "package")
    values = [value for name, value in state.items() if not name.startswith("fc.")]
    assert all(torch.equal(*pair) for pair in zip(backbone.state_dict().values(), values, strict=True))


def test_load_imagenet_lists_all_differences_and_loads_nothing(timm: ModuleType, tmp_path: Path) -> None:
    state = timm.create_model(SMALL).state_dict()
    del state["layer1.0.conv1.weight"]
    state["layer9.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "odd.pth")
    backbone = build_backbone(f"timm:{SMALL}")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(ValueError, match=r"must fit the network 'test_resnet' of timm .* got 2 that do not") as caught:
        load_imagenet(backbone, tmp_path / "odd.pth")
    assert "missing: layer1.0.conv1.weight" in str(caught.value)
    assert "surplus: layer9.weight (3,)" in str(caught.value)
    (tmp_path / "cut.pth").write_bytes((tmp_path / "odd.pth").read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read"):
        load_imagenet(backbone, tmp_path / "cut.pth")
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


# Names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18x", r"must be a network of timm .* got 'resnet18x'; pass one like .*resnet18"),
        ("hf-hub:somebody/network", "must be a network of timm .* got 'hf-hub:somebody/network'"),
        ("", r"got ''; timm\.list_models\(\) has all names"),
        ("resnet18.nonesuch", r"got 'resnet18\.nonesuch' \(RuntimeError: Invalid pretrained tag"),
        ("test_vit", r"output_stride=8, got 'test_vit' \(TypeError: .*output_stride"),
        ("ghostnet_050", r"got 'ghostnet_050' \(AssertionError: only output_stride==32 is valid"),
        ("vgg11", r"got 'vgg11' \(AssertionError\)"),
    ],
)
def test_networks_that_cannot_be_backbones_are_named_with_the_reason(timm: ModuleType, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backbone(f"timm:{name}")


def test_a_network_at_another_stride_is_refused(timm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of timm's that takes output_stride and does not keep to it."""
    create_model = timm.create_model

    def without_dilation(*args: Any, **options: Any) -> nn.Module:
        return create_model(*args, **{**options, "output_stride": 32})

    monkeypatch.setattr(timm, "create_model", without_dilation)
    with pytest.raises(ValueError, match=r"must be a network whose last two .* got 'test_resnet' with \(16, 32\)"):
        build_backbone(f"timm:{SMALL}")


def test_a_missing_timm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"timm must be installed for 'timm:resnet18', got .*pip install timm"
    ):
        build_backbone("timm:resnet18")


def test_a_timm_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    message = "timm must be importable for 'timm:resnet18', got RuntimeError: operator torchvision::nms does not exist"
    with pytest.raises(RuntimeError, match=message):
        build_backbone("timm:resnet18")


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_rgb_weights_see_equal_channels_as_grey(timm: ModuleType, channels: int, tmp_path: Path) -> None:
    torch.save(randomised(timm.create_model(SMALL)), tmp_path / "rgb.pth")
    rgb, net = (build_backbone(f"timm:{SMALL}", in_channels=number).eval() for number in (3, channels))
    for backbone in (rgb, net):
        load_imagenet(backbone, tmp_path / "rgb.pth")
    grey = torch.randn(2, 1, 65, 65)
    with torch.no_grad():
        found, expected = net(grey.repeat(1, channels, 1, 1)), rgb(grey.repeat(1, 3, 1, 1))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())
    assert len(net.mean) == len(net.std) == channels
