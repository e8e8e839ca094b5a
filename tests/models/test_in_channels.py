"""Networks for images of any number of channels, and RGB weights in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ccgpu.models import checkpoint
from ccgpu.models.backbones import build_backbone, load_imagenet
from ccgpu.models.ccnet import CCNet
from ccgpu.models.checkpoint_keys import FORMAT
from ccgpu.models.image_format import ImageFormat

CHANNELS = (1, 2, 4, 7)
# A backbone of each family, and each stem of a ResNet; timm's are in test_timm_backbone.py.
BACKBONES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("resnet18", {"stem": "deep"}),
    ("resnet18", {"stem": "7x7"}),
    ("resnet18", {"stem": "v1c"}),
    ("efficientnet-lite0", {}),
)


def network(channels: int, **arguments: Any) -> CCNet:
    """Return a small network for images of `channels`."""
    values = {"mean": range(channels), "std": [2.0] * channels} if channels != 3 else {}
    return CCNet("resnet18", 3, **{"in_channels": channels, "head_channels": 8, **values, **arguments})


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize(("name", "options"), BACKBONES)
def test_rgb_weights_see_equal_channels_as_grey(
    name: str, options: dict[str, Any], channels: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    rgb = build_backbone(name, **options).eval()
    torch.save(rgb.state_dict(), tmp_path / "rgb.pth")
    net = build_backbone(name, in_channels=channels, **options).eval()
    load_imagenet(net, tmp_path / "rgb.pth")
    grey = torch.randn(2, 1, 33, 41)
    with torch.no_grad():
        for found, expected in zip(net(grey.repeat(1, channels, 1, 1)), rgb(grey.repeat(1, 3, 1, 1)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert len(net.mean) == len(net.std) == channels


def test_the_package_weights_are_adapted() -> None:
    nets = [build_backbone("efficientnet-lite0", in_channels=channels) for channels in (3, 5)]
    for net in nets:
        load_imagenet(net, "package")
    rgb, five = (net._conv_stem.weight for net in nets)
    assert torch.equal(five, (rgb.sum(dim=1, keepdim=True) / 5).repeat(1, 5, 1, 1))


def test_a_misshapen_convolution_of_a_network_for_rgb_is_refused_and_not_adapted(tmp_path: Path) -> None:
    state = build_backbone("resnet18").state_dict()
    state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"][:, :3]
    torch.save(state, tmp_path / "rgb.pth")
    with pytest.raises(ValueError, match=r"misshapen: layer1\.0\.conv1\.weight"):
        load_imagenet(build_backbone("resnet18"), tmp_path / "rgb.pth")


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("dims", [2, 3])
def test_ccnet_takes_images_and_clips_of_its_channels(channels: int, dims: int) -> None:
    net = network(channels, dims=dims)
    size = (33, 41) if dims == 2 else (2, 33, 41)
    images = torch.randn(2, channels, *size)
    assert net(images).logits.shape == (2, 3, *size)
    assert net.attention_map(images, at=tuple(side // 2 for side in size)).shape[0] == 2
    with pytest.raises(
        ValueError, match=rf"images must be \(B, {channels}, .*convert the images to {channels} channels"
    ):
        net(torch.randn(2, channels + 1, *size))


@pytest.mark.parametrize("arguments", [{}, {"mean": [0.0] * 4}, {"mean": [0.0] * 3, "std": [1.0] * 3}])
def test_mean_and_std_must_be_given_for_other_channels(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be 4 finite numbers.* for images of 4 channels"):
        CCNet("resnet18", 3, in_channels=4, **arguments)


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_files_hold_channels_and_format(tmp_path: Path, ending: str) -> None:
    net, images = network(5).eval(), ImageFormat(5, raw=True, dtype="uint16")
    checkpoint.write(tmp_path / f"net{ending}", checkpoint.Checkpoint(net.config, net.state_dict(), images=images))
    assert checkpoint.read(tmp_path / f"net{ending}").images == images
    again = CCNet.from_checkpoint(tmp_path / f"net{ending}")
    assert (again.in_channels, again.backbone.mean) == (5, (0.0, 1.0, 2.0, 3.0, 4.0))
    pixels = torch.randn(1, 5, 33, 33)
    with torch.no_grad():
        assert torch.equal(again(pixels), net(pixels))


def test_a_file_is_read_for_other_channels(tmp_path: Path) -> None:
    net = network(3).eval()
    checkpoint.write(tmp_path / "net.pt", checkpoint.Checkpoint(net.config, net.state_dict()))
    one = CCNet.from_checkpoint(tmp_path / "net.pt", in_channels=1, mean=[100.0], std=[50.0])
    grey = torch.randn(1, 1, 33, 33)
    with torch.no_grad():
        torch.testing.assert_close(one(grey), net(grey.repeat(1, 3, 1, 1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (ImageFormat(4, raw=True).as_plain(), "got 4 channels of uint8 for a network of 5"),
        ({"channels": 0}, "got images"),
    ],
)
def test_a_format_that_does_not_fit_is_refused(tmp_path: Path, images: dict[str, Any], message: str) -> None:
    net = network(5)
    header = {"format": FORMAT, "network": net.config, "images": images}
    torch.save({"ccgpu": header, "state_dict": net.state_dict()}, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=message):
        checkpoint.read(tmp_path / "net.pt")
