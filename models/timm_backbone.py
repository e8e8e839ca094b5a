"""Networks of the package timm as backbones, with the ImageNet weights that timm downloads."""

from __future__ import annotations

import os
from collections import OrderedDict
from difflib import get_close_matches
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ccgpu.models import weights
from ccgpu.models.attention import require_int
from ccgpu.models.convolution_gradients import right_gradients
from ccgpu.models.normalisation import for_channels
from ccgpu.models.weights import check_weights, fill, read_state_dict


class TimmBackbone(nn.Module):
    """The last two feature levels of a timm network, dilated so that both are at 1/8 of the input size.

    timm builds it with `features_only=True, output_stride=8`. A batch norm with an activation inside is split into a
    `torch.nn.BatchNorm2d` and the activation, so that the activation remains when distributed training replaces batch
    norms by batch norms over all processes. In bfloat16 on CPUs its gradients are right (`right_gradients`). Weights
    are randomly initialised; `load_imagenet` loads timm's.

    Args:
        name: timm's name, with or without the tag of its weights: "mobilenetv3_small_100" or
            "resnet18.a1_in1k"; `timm.list_models()` has all of them.
        in_channels: channels of the images, 1 or more.

    Attributes:
        channels: the channels of the two levels.
        mean, std: the normalisation that timm trained the network with: red, green, blue, in units of 0..255. For other
            channels their average for each.

    Shape:
        images (B, in_channels, H, W) -> two maps (B, channels, H', W'), H' about H / 8, rounded as the network does.

    Raises:
        ModuleNotFoundError: timm is not installed.
        RuntimeError: timm is installed but cannot be imported.
        ValueError: timm has no network of this name, or cannot build it with features at 1/8.
    """

    def __init__(self, name: str, *, in_channels: int = 3) -> None:
        super().__init__()
        require_int("TimmBackbone", "in_channels", in_channels, 1)
        timm = _import_timm(name)
        if not timm.is_model(name.partition(".")[0]):
            close = get_close_matches(name.partition(".")[0], timm.list_models(), n=5)
            raise ValueError(
                f"build_backbone: name must be a network of timm {timm.__version__} after 'timm:', got {name!r}; "
                + (f"pass one like {', '.join(close)}." if close else "timm.list_models() has all names.")
            )
        try:
            self.network = _build(name, in_chans=in_channels)
        # timm raises exceptions of any type for networks that it cannot build this way: TypeError, AssertionError
        # (often without a message) and RuntimeError were seen.
        except Exception as error:
            raise ValueError(
                "build_backbone: name must be a network that timm can build with features_only=True and "
                f"output_stride=8, got {name!r} ({_reason(error)}); pass a convolutional one like "
                "'timm:resnet18' or 'timm:mobilenetv3_small_100'."
            ) from error
        strides = tuple(self.network.feature_info.reduction())
        if strides != (8, 8):
            raise ValueError(
                f"build_backbone: name must be a network whose last two feature levels are at stride 8, got {name!r} "
                f"with {strides}; pass another."
            )
        self.name = name
        self.in_channels = in_channels
        self.channels = tuple(self.network.feature_info.channels())
        # timm normalises images in 0..1.
        self.mean, self.std = (
            for_channels([255 * x for x in self.network.pretrained_cfg[key]], in_channels) for key in ("mean", "std")
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last two feature levels; see the class for shapes."""
        with right_gradients(images):
            auxiliary, features = self.network(images)
        return auxiliary, features

    def extra_repr(self) -> str:
        """Name the network."""
        return repr(self.name)


def load_imagenet(backbone: TimmBackbone, source: str | os.PathLike[str]) -> None:
    """Fill a backbone with timm's weights for its network, from timm's download or a file.

    The weights must fit the whole classifier entry by entry; the backbone then takes the entries that it has.

    Args:
        backbone: the network to fill, on any device and of any floating dtype.
        source: "package" for the weights that timm downloads or has in its cache, those of the tag in the name or of
            timm's default tag; or a file: a state dict written by `torch.save`, with timm's names and the classifier.

    Raises:
        RuntimeError: timm cannot fetch the weights.
        FileNotFoundError: there is no file at source.
        ValueError: the file is damaged, no state dict, or has entries that are missing, surplus or of another
            shape or kind.
    """
    timm = _import_timm(backbone.name)
    if source == "package":
        try:
            # Built with the classifier, because timm ignores missing and surplus entries with features_only=True.
            whole = timm.create_model(backbone.name, output_stride=8, pretrained=True)
        # A failed download raises errors of timm, of the hub's client or of the system.
        except Exception as error:
            raise RuntimeError(
                f"load_imagenet: the weights of {backbone.name!r} must be in timm's cache or available for "
                f"download, got {_reason(error)}; connect this machine, or fetch them elsewhere and pass the file."
            ) from error
        check_weights("load_imagenet", f"timm's {backbone.name}", whole.state_dict())
    else:
        whole = timm.create_model(backbone.name, output_stride=8)
        fill(whole, read_state_dict(source), source, f"network {backbone.name!r} of timm")
    filled = _build(backbone.name, pretrained=True, pretrained_cfg_overlay={"state_dict": whole.state_dict()})
    # timm adapts the first convolution to other channels by another rule than ours, so it gets three.
    own = backbone.network.state_dict()
    backbone.network.load_state_dict(weights.for_channels(filled.state_dict(), own, backbone.in_channels))


def _import_timm(name: str) -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise ModuleNotFoundError(
            f"build_backbone: timm must be installed for 'timm:{name}', got {str(error)!r}; pip install timm."
        ) from error
    # timm imports torchvision, which raises RuntimeError if it was built for another version of torch.
    except RuntimeError as error:
        raise RuntimeError(
            f"build_backbone: timm must be importable for 'timm:{name}', got {_reason(error)}; "
            f"install the torchvision that was built for torch {torch.__version__}."
        ) from error
    return timm


def _build(name: str, **options: Any) -> Any:
    """Return timm's network of the last two feature levels, with batch norms split from their activations."""
    import timm

    network = timm.create_model(name, features_only=True, output_stride=8, out_indices=(-2, -1), **options)
    for parent in list(network.modules()):
        for key, child in list(parent.named_children()):
            if type(child) is timm.layers.BatchNormAct2d:
                setattr(parent, key, _split(child))
    return network


def _split(module: Any) -> nn.Sequential:
    """Return timm's batch norm with activation as torch's batch norm (sharing its tensors), drop and activation."""
    norm = nn.BatchNorm2d(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
    for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        setattr(norm, key, tensor)
    return nn.Sequential(OrderedDict(norm=norm, drop=module.drop, activation=module.act))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
