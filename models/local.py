"""A small backbone with a field of view of 15 pixels, for data that need context and for quick tests."""

from __future__ import annotations

from torch import Tensor, nn

from ccgpu.models.attention import require_int

STRIDES = (2, 2, 2, 1)
KERNELS = (3, 3, 3, 1)
CHANNELS = (16, 32, 32, 32)
_MIDDLE = 127.5  # of 0..255, which mean and std map to -1..1


class LocalBackbone(nn.Module):
    """Three 3x3 convolutions of stride 2 and one 1x1 convolution, each with batch norm and ReLU: 15,504 weights.

    A feature depends on the pixels around it alone:

        field of view = 1 + sum over layers of (kernel - 1) * product of the strides before = 15 pixels

    Feature (y, x) sees the pixels 8 y - 7 ... 8 y + 7 and 8 x - 7 ... 8 x + 7. A ResNet-18 at this stride sees more
    than 400 pixels, so that it leaves nothing to be shown by a context module on small images. Three 3x3 convolutions
    of the head enlarge the field of view of a network without a context module by 16 pixels each.

    Args:
        in_channels: channels of the images, 1 or more.

    Attributes:
        channels: (32, 32).
        mean, std: 127.5 for each channel.
        field_of_view: side in pixels of the square that a feature depends on.

    Shape:
        images (B, in_channels, H, W) -> features before the last layer, and of the last, both (B, 32, H', W'); an
        extent n becomes ceil(n / 8).

    Raises:
        TypeError, ValueError: in_channels is not an int of 1 or more.

    Examples:
        >>> import torch
        >>> from ccgpu.models.local import LocalBackbone
        >>> backbone = LocalBackbone().eval()
        >>> backbone.field_of_view, backbone(torch.zeros(1, 3, 65, 33))[1].shape
        (15, torch.Size([1, 32, 9, 5]))
    """

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        require_int("LocalBackbone", "in_channels", in_channels, 1)
        self.in_channels = in_channels
        self.mean, self.std = ((_MIDDLE,) * in_channels for _ in range(2))
        self.channels = CHANNELS[-2:]
        self.field_of_view, stride, before = 1, 1, in_channels
        layers = []
        for kernel, step, channels in zip(KERNELS, STRIDES, CHANNELS, strict=True):
            convolution = nn.Conv2d(before, channels, kernel, step, padding=kernel // 2, bias=False)
            layers.append(nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)))
            self.field_of_view += (kernel - 1) * stride
            stride, before = stride * step, channels
        self.strided, self.last = nn.Sequential(*layers[:-1]), layers[-1]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features before the last layer, and those of the last; see the class for shapes."""
        features = self.strided(images)
        return features, self.last(features)
