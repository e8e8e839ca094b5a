"""CCNet: a dilated ResNet, the criss-cross head on its last stage, an auxiliary head on the stage before.

The norm of both heads is `nn.BatchNorm2d` followed by a leaky ReLU, which is what the authors' InPlaceABN
computes. They are two plain modules on purpose: a function that swaps every `nn.BatchNorm2d` and
`nn.Dropout2d` for a kind that works over all processes keeps the activation. The activation has a name of its
own inside the sequences, so the numbers of the other entries, and with them the keys of the state dict
(`bottleneck.{0,1,3}`), are those of the authors' files.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccgpu.models.attention import RCCA, attention_map, check_position, require_int
from ccgpu.models.resnet import ResNet

BACKBONES = {"resnet18": 18, "resnet50": 50, "resnet101": 101}
# InPlaceABN's default, which the authors' heads use.
LEAKY_SLOPE = 0.01


def _convolution(in_channels: int, channels: int) -> nn.Sequential:
    """3x3 convolution without bias, batch norm, leaky ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.LeakyReLU(LEAKY_SLOPE, inplace=True),
    )


def _classifier(
    in_channels: int, channels: int, num_classes: int, dropout: float, *, bias: bool
) -> OrderedDict[str, nn.Module]:
    """3x3 convolution, batch norm, leaky ReLU, dropout of whole channels, 1x1 convolution to classes."""
    return OrderedDict(
        {
            "0": nn.Conv2d(in_channels, channels, 3, padding=1, bias=bias),
            "1": nn.BatchNorm2d(channels),
            "activation": nn.LeakyReLU(LEAKY_SLOPE, inplace=True),
            "2": nn.Dropout2d(dropout),
            "3": nn.Conv2d(channels, num_classes, 1),
        }
    )


class CCHead(nn.Module):
    """Class logits from backbone features x: bottleneck([x, convb(cca(conva(x)))]).

    conva and convb are 3x3 convolutions with norm and activation, cca is an `RCCA`, and bottleneck (3x3
    convolution, norm, activation, dropout, 1x1 convolution) sees the features from before the attention
    beside those after it.

    Args:
        in_channels: channels of x.
        num_classes: channels of the logits.
        channels: channels of conva, the attention, convb and the bottleneck; 512 in the paper.
        recurrence: loops of the attention. 0 leaves it out, parameters included: the paper's baseline, and
            `cca` is None.
        dropout: probability of the channel dropout.
        backend: as in `ccgpu.cca`.

    Shape:
        (B, in_channels, H, W) -> (B, num_classes, H, W).

    Source: the paper, figure 2 and section 3.1; names, activation and dropout from the authors' code.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int = 512,
        recurrence: int = 2,
        dropout: float = 0.1,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.conva = _convolution(in_channels, channels)
        self.cca = RCCA(channels, recurrence, backend=backend) if recurrence != 0 else None
        self.convb = _convolution(channels, channels)
        layers = _classifier(in_channels + channels, channels, num_classes, dropout, bias=False)
        self.bottleneck = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits; see the class for shapes."""
        attended = self.conva(x)
        if self.cca is not None:
            attended = self.cca(attended)
        return self.bottleneck(torch.cat([x, self.convb(attended)], dim=1))


class AuxiliaryHead(nn.Sequential):
    """Class logits from the features of layer3, which only training uses (deep supervision).

    3x3 convolution with bias, norm, activation, dropout, 1x1 convolution, as `dsn` in the authors' code.

    Args:
        in_channels: channels of the features.
        num_classes: channels of the logits.
        channels: channels in between; 512 in the authors' code.
        dropout: probability of the channel dropout.

    Shape:
        (B, in_channels, H, W) -> (B, num_classes, H, W).
    """

    def __init__(self, in_channels: int, num_classes: int, *, channels: int = 512, dropout: float = 0.1) -> None:
        super().__init__(_classifier(in_channels, channels, num_classes, dropout, bias=True))


class CCNet(nn.Module):
    """Criss-cross network for semantic segmentation: images -> class logits at the images' size.

        layer3, layer4 = backbone(images)
        logits = upsample(head(layer4))
        auxiliary_logits = upsample(auxiliary_head(layer3)),    in train mode only

    The backbone starts from He's initialisation (`load_imagenet(net.backbone, path)` fills it), the heads
    from torch's defaults, as the authors' do.

    Args:
        backbone: "resnet18", "resnet50" or "resnet101".
        num_classes: classes, 1 or more; 19 for Cityscapes.
        recurrence: R, loops of the attention, 0 or more; 0 is the network without attention.
        stem: "deep" or "7x7", see `ResNet`.
        head_channels: channels in both heads, 1 or more; 512 in the paper.
        auxiliary: whether there is an auxiliary head.
        dropout: probability of the heads' channel dropout, from 0 to 1.
        align_corners: how the logits are upsampled (bilinearly): corner pixels' centres kept in place (True,
            the authors' choice) or the pictures' edges (False).
        backend: as in `ccgpu.cca`.

    Shape:
        images: (B, 3, H, W), floating point, normalised as the backbone was trained.
        In train mode (logits, auxiliary_logits), both (B, num_classes, H, W); with auxiliary=False, and
        always in eval mode, logits.

    Attributes:
        backbone: the `ResNet`. head: the `CCHead`, with the `RCCA` as head.cca (None for recurrence=0).
        auxiliary_head: the `AuxiliaryHead`, None for auxiliary=False.

    Raises:
        TypeError: a size is not an int; images that are not floating point.
        ValueError: an argument outside of its values; images of another shape.

    Source: the paper, figure 2; the auxiliary head, the activations and align_corners: the authors' code.

    >>> import torch
    >>> from ccgpu.models.ccnet import CCNet
    >>> net = CCNet("resnet18", 5, head_channels=16)
    >>> images = torch.zeros(2, 3, 33, 65)
    >>> [logits.shape for logits in net(images)]
    [torch.Size([2, 5, 33, 65]), torch.Size([2, 5, 33, 65])]
    >>> net.eval()(images).shape
    torch.Size([2, 5, 33, 65])
    """

    def __init__(
        self,
        backbone: str = "resnet101",
        num_classes: int = 19,
        *,
        recurrence: int = 2,
        stem: str = "deep",
        head_channels: int = 512,
        auxiliary: bool = True,
        dropout: float = 0.1,
        align_corners: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(f"CCNet: backbone must be one of {tuple(BACKBONES)}, got {backbone!r}; pass one of these.")
        sizes = (
            ("num_classes", num_classes, 1),
            ("head_channels", head_channels, 1),
            ("recurrence", recurrence, 0),
        )
        for name, value, minimum in sizes:
            require_int("CCNet", name, value, minimum)
        if not 0 <= dropout <= 1:
            raise ValueError(f"CCNet: dropout must be from 0 to 1, got {dropout}; pass a probability.")
        self.align_corners = align_corners
        self.backbone = ResNet(BACKBONES[backbone], stem=stem)
        layer3, layer4 = self.backbone.channels
        self.head = CCHead(
            layer4,
            num_classes,
            channels=head_channels,
            recurrence=recurrence,
            dropout=dropout,
            backend=backend,
        )
        self.auxiliary_head = (
            AuxiliaryHead(layer3, num_classes, channels=head_channels, dropout=dropout) if auxiliary else None
        )

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits, in train mode with the auxiliary logits; see the class for shapes."""
        self._check_images(images)
        layer3, layer4 = self.backbone(images)
        logits = self._upsample(self.head(layer4), images)
        if self.training and self.auxiliary_head is not None:
            return logits, self._upsample(self.auxiliary_head(layer3), images)
        return logits

    def attention_map(self, images: Tensor, at: Iterable[int]) -> Tensor:
        """How much the pixel `at` attends to each position of the feature map, over all loops of the head.

        `ccgpu.models.attention.attention_map` of the head's attention at the position that the pixel falls on
        (the nearest one under the network's align_corners). The features are those of eval mode; every
        module's mode is given back afterwards, and no gradient is recorded.

        Args:
            images: (B, 3, H, W), as for `forward`.
            at: (y, x), a pixel of the images, 0 <= y < H and 0 <= x < W.

        Returns:
            (B, H', W') at the backbone's output stride; non-negative, each picture's map sums to 1.

        Raises:
            RuntimeError: the network has no attention (recurrence=0).
            TypeError, ValueError: images of another shape, a position that is not two ints inside of them.
        """
        if self.head.cca is None:
            raise RuntimeError(
                "CCNet.attention_map: the network must have attention, got recurrence=0; "
                "build it with recurrence=1 or more."
            )
        self._check_images(images)
        size = tuple(images.shape[2:])
        pixel = check_position("CCNet.attention_map", at, size)
        with _evaluating(self), torch.no_grad():
            features = self.head.conva(self.backbone(images)[1])
        pairs = zip(pixel, size, features.shape[2:], strict=True)
        position = [_nearest(index, fine, coarse, self.align_corners) for index, fine, coarse in pairs]
        return attention_map(self.head.cca, features, position)

    def _upsample(self, logits: Tensor, images: Tensor) -> Tensor:
        return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=self.align_corners)

    def _check_images(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"CCNet: images must be (B, 3, H, W), got shape {tuple(images.shape)}; "
                "add the batch axis with images.unsqueeze(0) or convert the pictures to three channels."
            )
        if not images.is_floating_point():
            raise TypeError(
                f"CCNet: images must be floating point, got {images.dtype}; normalise them as for the backbone."
            )


def _nearest(index: int, fine: int, coarse: int, align_corners: bool) -> int:
    """Return which of `coarse` positions along an axis has its centre nearest to pixel `index` of `fine`."""
    if align_corners:
        # round(index * (coarse - 1) / (fine - 1)) in whole numbers, halves up; a lone pixel is at position 0.
        span = max(fine - 1, 1)
        return (2 * index * (coarse - 1) + span) // (2 * span)
    return (2 * index + 1) * coarse // (2 * fine)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Put every module into eval mode and give each its own mode back at the end."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
