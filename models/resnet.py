"""Dilated ResNets for dense prediction, and loading of their ImageNet weights.

The state dict has torchvision's names, and for the deep stem the names in the authors' and the MIT scene-parsing files,
which agree. So an ImageNet file fits without renaming; its classifier `fc` is ignored.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from ccgpu.models.attention import require_int
from ccgpu.models.normalisation import IMAGENET_MEAN, IMAGENET_STD, for_channels
from ccgpu.models.weights import fill, read_state_dict

STEMS = ("deep", "7x7", "v1c")
# Channels of the three 3x3 convolutions, for the stems that consist of three.
_DEEP_STEMS = {"deep": (64, 64, 128), "v1c": (32, 32, 64)}
# Residual blocks in layer1 ... layer4 (He et al., CVPR 2016, table 1).
_BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
# Parts of the v1c stem: our name -> the name in mmsegmentation's files.
V1C_STEM = {
    "conv1.": "stem.0.",
    "bn1.": "stem.1.",
    "conv2.": "stem.3.",
    "bn2.": "stem.4.",
    "conv3.": "stem.6.",
    "bn3.": "stem.7.",
}
# (Whether the blocks are bottlenecks, number of blocks in layer1 ... layer4) -> depth, to recognise a file's network.
# Depths 34 and 152 cannot be built here, but error messages name them.
_FILES: dict[tuple[bool, tuple[int, ...]], int] = {
    (False, _BLOCKS[18]): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, _BLOCKS[50]): 50,
    (True, _BLOCKS[101]): 101,
    (True, (3, 8, 36, 3)): 152,
}
# Output stride -> strides and dilations of layer1 ... layer4; stem and max-pool before them have a stride of 4. The
# first row is CCNet's; each further row restores the stride of one dilated stage.
_STAGES = {
    8: ((1, 2, 1, 1), (1, 1, 2, 4)),
    16: ((1, 2, 2, 1), (1, 1, 1, 2)),
    32: ((1, 2, 2, 2), (1, 1, 1, 1)),
}
_WIDTHS = (64, 128, 256, 512)


def _downsample(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """Return the projection in a block's shortcut, or None where the input already has the output's shape."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class BasicBlock(nn.Module):
    """ResNet-18's block of two dilated 3x3 convolutions: relu(bn2(conv2(relu(bn1(conv1(x))))) + x)."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, *, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _downsample(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output; x is (B, in_channels, H, W)."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        residual = x if self.downsample is None else self.downsample(x)
        return F.relu(out + residual, inplace=True)


class Bottleneck(nn.Module):
    """The block of ResNet-50 and -101: relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + x).

    conv1 and conv3 are 1x1, conv2 is 3x3 with the block's stride and dilation. The output has 4 times `width` channels.
    """

    expansion = 4

    def __init__(self, in_channels: int, width: int, *, stride: int, dilation: int) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _downsample(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output; x is (B, in_channels, H, W)."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        residual = x if self.downsample is None else self.downsample(x)
        return F.relu(out + residual, inplace=True)


class ResNet(nn.Module):
    """ResNet features at 1/8 of the input size: dilations replace the strides of the last two stages.

    With output stride 8 the stages have strides 1, 2, 1, 1 and dilations 1, 1, 2, 4. All 3x3 convolutions of a stage
    have its dilation (mmsegmentation halves it in the stage's first block: `halved_dilation`). The max-pool rounds up
    (ceil_mode), so an extent n becomes (n + 1) // 8 + 1: 769 -> 97, 1024 x 2048 -> 129 x 257.

    Convolutions have He's normal initialisation (fan out), batch norms weight 1 and bias 0; `load_imagenet` loads
    ImageNet weights from a file.

    Args:
        depth: 18, 50 or 101.
        stem: "deep", three 3x3 convolutions with 64, 64, 128 channels (CCNet and the MIT files), "7x7", one convolution
            with 64 channels (torchvision), or "v1c", three 3x3 convolutions with 32, 32, 64 channels (mmsegmentation).
        output_stride: 8, or 16 or 32 for smaller maps with less dilation.
        halved_dilation: whether the first block of a dilated stage has half the stage's dilation (mmsegmentation).
        ceil_mode: whether the max-pool rounds up (the authors' code) or down (torchvision and mmsegmentation); if down,
            an extent n becomes (n - 1) // 8 + 1.
        in_channels: channels of the images, 1 or more.

    Attributes:
        channels: (channels of layer3, channels of layer4): (256, 512) for depth 18, (1024, 2048) for 50 and
            101.
        mean, std: ImageNet's, with which torchvision's files were trained: red, green, blue, in units of 0..255. For
            other channels their average for each.

    Shape:
        images (B, in_channels, H, W) -> (layer3, layer4), both (B, channels, H', W') at the output stride (at output
        stride 32, layer3 is at 16).

    Raises:
        ValueError: an argument is none of the values above.

    Source: He et al., CVPR 2016; the dilated form and the deep stem: the authors' code.

    Examples:
        >>> import torch
        >>> from ccgpu.models.resnet import ResNet
        >>> layer3, layer4 = ResNet(18).eval()(torch.zeros(1, 3, 65, 33))
        >>> layer3.shape, layer4.shape
        (torch.Size([1, 256, 9, 5]), torch.Size([1, 512, 9, 5]))
    """

    def __init__(
        self,
        depth: int,
        *,
        stem: str = "deep",
        output_stride: int = 8,
        halved_dilation: bool = False,
        ceil_mode: bool = True,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        require_int("ResNet", "in_channels", in_channels, 1)
        for name, value, known in (
            ("depth", depth, tuple(_BLOCKS)),
            ("stem", stem, STEMS),
            ("output_stride", output_stride, tuple(_STAGES)),
        ):
            if value not in known:
                raise ValueError(f"ResNet: {name} must be one of {known}, got {value!r}; pass one of these.")
        self.depth = depth
        self.stem = stem
        self.in_channels = in_channels
        self.mean, self.std = (for_channels(values, in_channels) for values in (IMAGENET_MEAN, IMAGENET_STD))
        if stem in _DEEP_STEMS:
            first, second, channels = _DEEP_STEMS[stem]
            self.conv1 = nn.Conv2d(in_channels, first, 3, stride=2, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(first)
            self.conv2 = nn.Conv2d(first, second, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(second)
            self.conv3 = nn.Conv2d(second, channels, 3, padding=1, bias=False)
            self.bn3 = nn.BatchNorm2d(channels)
        else:
            self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(64)
            channels = 64
        block = BasicBlock if depth == 18 else Bottleneck
        strides, dilations = _STAGES[output_stride]
        stages = []
        for width, count, stride, dilation in zip(_WIDTHS, _BLOCKS[depth], strides, dilations, strict=True):
            first = dilation // 2 if halved_dilation and dilation > 1 else dilation
            stage = nn.Sequential(block(channels, width, stride=stride, dilation=first))
            channels = width * block.expansion
            for _ in range(1, count):
                stage.append(block(channels, width, stride=1, dilation=dilation))
            stages.append(stage)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=ceil_mode)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.channels = (_WIDTHS[2] * block.expansion, _WIDTHS[3] * block.expansion)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of layer3 and layer4; see the class for shapes."""
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        if self.stem in _DEEP_STEMS:
            x = F.relu(self.bn2(self.conv2(x)), inplace=True)
            x = F.relu(self.bn3(self.conv3(x)), inplace=True)
        layer3 = self.layer3(self.layer2(self.layer1(self.maxpool(x))))
        return layer3, self.layer4(layer3)

    def extra_repr(self) -> str:
        """Name the depth and the stem."""
        return f"depth={self.depth}, stem={self.stem!r}"


def load_imagenet(resnet: ResNet, path: str | os.PathLike[str], *, blue_first: bool = False) -> None:
    """Fill a ResNet with the ImageNet weights of a file.

    Torchvision's files fit the 7x7 stem, the files of MIT scene parsing (from which the authors start) the deep stem,
    and mmsegmentation's `resnet50_v1c` and `resnet101_v1c` the v1c stem. The file is a state dict written by
    `torch.save`, e.g. `resnet101-63fe2227.pth` or `resnet101-imagenet.pth`. Its classifier (`fc.*`) is ignored;
    `ccgpu.models.weights.fill` describes how the other entries must fit.

    Args:
        resnet: the network to fill, on any device and of any floating dtype.
        path: the file.
        blue_first: whether the file's network takes blue, green, red, as CCNet's authors take the files of MIT scene
            parsing: the input channels of its first convolution are put into our order, red first.

    Raises:
        FileNotFoundError: there is no file at path. (Any other OSError from opening it is passed on.)
        ValueError: the file is damaged or no state dict, is of another depth or stem, or has entries that are
            missing, surplus or of another shape or kind; all of these entries are listed.
    """
    loaded = {name: value for name, value in read_state_dict(path).items() if not name.startswith("fc.")}
    for ours, theirs in V1C_STEM.items():
        loaded = {
            ours + name.removeprefix(theirs) if name.startswith(theirs) else name: value
            for name, value in loaded.items()
        }
    found, wanted = _describe(loaded), f"ResNet-{resnet.depth} with a {resnet.stem} stem"
    if found is not None and found != wanted:
        raise ValueError(
            f"load_imagenet: {os.fspath(path)!r} must hold a {wanted}, got a {found}; "
            "pass a file for this network or build the network for the file."
        )
    if blue_first and "conv1.weight" in loaded and loaded["conv1.weight"].ndim == 4:
        loaded["conv1.weight"] = loaded["conv1.weight"].flip(1)
    fill(resnet, loaded, path, wanted, resnet.in_channels)


def depth_of(state: Mapping[str, Tensor]) -> int | None:
    """Return the depth (18, 34, 50, 101 or 152) of the ResNet in a state dict, or None if there is no ResNet in it."""
    names = (name.split(".") for name in state)
    blocks = {(parts[0], parts[1]) for parts in names if len(parts) > 1}
    counts = tuple(sum(layer == f"layer{n}" for layer, _ in blocks) for n in range(1, 5))
    return _FILES.get(("layer1.0.conv3.weight" in state, counts))


def _describe(state: Mapping[str, Tensor]) -> str | None:
    """Return a text with depth and stem of the ResNet in a state dict; None if its entries do not determine them."""
    depth = depth_of(state)
    if depth is None or "conv1.weight" not in state:
        return None
    if "conv3.weight" in state:
        stem = "v1c" if state["conv1.weight"].shape[0] == _DEEP_STEMS["v1c"][0] else "deep"
        return f"ResNet-{depth} with a {stem} stem"
    if tuple(state["conv1.weight"].shape[2:]) == (7, 7):
        return f"ResNet-{depth} with a 7x7 stem"
    return None
