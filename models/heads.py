"""The two heads of `CCNet`, the criss-cross head and the auxiliary head, and the conversion of clips to frames.

`nn.BatchNorm2d` followed by an activation (by default a leaky ReLU) stands in for the authors' InPlaceABN. InPlaceABN
scales by |weight| + 1e-5, so a negative weight in their files means its absolute value. Norm and activation are two
separate modules because distributed training replaces every `nn.BatchNorm2d` and `nn.Dropout2d` by a module that works
on the global batch, and must leave the activation alone. Inside the `nn.Sequential`s the activation is named, not
numbered, so that the other entries keep the authors' numbers, and the state dict their keys (`bottleneck.{0,1,3}`).
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccgpu.models.attention import RCCA, GatedAttention
from ccgpu.models.context import activation_layer, build_context, convolution

HEAD_INITS = ("torch", "mmsegmentation")
CLASSIFIER_STD = 0.01  # of mmsegmentation's classifiers


class _Logits(nn.Conv2d):
    """A 1x1 convolution that runs in its weights' dtype, float32, also under autocast.

    The predicted class depends on small differences between large logits: with logits rounded to bfloat16, two and a
    half times as many pixels change their class.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits in the weights' dtype; outside autocast this is a plain convolution."""
        return _convolve_in_own_dtype(x, self.weight, self.bias)


@torch.fx.wrap  # whether autocast is on is not known while torch.fx traces
def _convolve_in_own_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not torch.is_autocast_enabled(x.device.type):  # keeps an autocast region out of exported graphs
        return F.conv2d(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return F.conv2d(x.to(weight.dtype), weight, bias)


def _classifier(
    in_channels: int, channels: int, num_classes: int, dropout: float, activation: str, *, bias: bool
) -> OrderedDict[str, nn.Module]:
    """Return 3x3 convolution, batch norm, activation, dropout of whole channels, 1x1 convolution to classes."""
    return OrderedDict(
        {
            "0": nn.Conv2d(in_channels, channels, 3, padding=1, bias=bias),
            "1": nn.BatchNorm2d(channels),
            "activation": activation_layer(activation),
            "2": nn.Dropout2d(dropout),
            "3": _Logits(channels, num_classes, 1),
        }
    )


class CCHead(nn.Module):
    """Class logits from backbone features x: bottleneck([x, convb(context(conva(x)))]).

    conva and convb are 3x3 convolutions with norm and activation, context is an `RCCA` or another context module, and
    bottleneck (3x3 convolution, norm, activation, dropout, 1x1 convolution) takes x concatenated with convb's output.

    Args:
        in_channels: channels of x.
        num_classes: channels of the logits.
        channels: channels of conva, the context, convb and the bottleneck; 512 in the paper.
        context: "none", "rcca", "nonlocal", "psp" or "aspp"; see `ccgpu.models.context.build_context`.
        recurrence: loops of the criss-cross attention; 0 leaves it out, parameters included, as "none" does.
        dims: 2 for images, 3 for clips. For clips, criss-cross and non-local attention also attend along time; all
            other modules process each frame by itself.
        embedding: channels to which a 1x1 convolution reduces the context module's output, for the category consistent
            loss (16 in the paper); 0 for no embedding.
        dropout: probability of the channel dropout.
        activation: "leaky_relu" (slope 0.01) or "relu".
        gamma: initial value of gamma in criss-cross and non-local attention; 0 in the paper.
        nonlocal_form: "sdpa" or "materialised", how non-local attention is computed.
        recompute: criss-cross and non-local attention save only each loop's input for backward.
        backend: as in `ccgpu.cca`.

    Attributes:
        cca: the `RCCA`, or None.
        context: any other context module, or None.

    Shape:
        (B * T, in_channels, H, W) -> logits (B * T, num_classes, H, W), in the parameters' dtype also under
        autocast, and embedding (B * T, embedding, H, W). The frames of a clip are consecutive; T is the argument
        `frames` of `forward` (1 for images).

    Source: the paper, figure 2 and section 3.1; names, activation and dropout from the authors' code.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int = 512,
        context: str = "rcca",
        recurrence: int = 2,
        dims: int = 2,
        gamma: float = 0.0,
        embedding: int = 0,
        dropout: float = 0.1,
        activation: str = "leaky_relu",
        nonlocal_form: str = "sdpa",
        recompute: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.conva = convolution(in_channels, channels, activation=activation)
        module = build_context(
            context,
            channels,
            recurrence=recurrence,
            dims=dims,
            gamma=gamma,
            nonlocal_form=nonlocal_form,
            activation=activation,
            recompute=recompute,
            backend=backend,
        )
        # Published files call criss-cross attention "cca"; any other context module is stored under "context".
        self.cca = module if isinstance(module, RCCA) else None
        self.context = module if self.cca is None else None
        self.convb = convolution(channels, channels, activation=activation)
        layers = _classifier(in_channels + channels, channels, num_classes, dropout, activation, bias=False)
        self.bottleneck = nn.Sequential(layers)
        self.embedding = nn.Conv2d(channels, embedding, 1) if embedding else None

    def forward(self, x: Tensor, frames: int = 1) -> tuple[Tensor, Tensor | None]:
        """Return logits and, in train mode, the embedding (None without one); see the class for shapes."""
        attended = self.conva(x)
        module = self.context if self.cca is None else self.cca
        if isinstance(module, GatedAttention) and module.dims == 3:
            attended = as_frames(module(as_clips(attended, frames)))
        elif module is not None:
            attended = module(attended)
        logits = self.bottleneck(torch.cat([x, self.convb(attended)], dim=1))
        return logits, self.embedding(attended) if self.training and self.embedding is not None else None


def as_frames(clips: Tensor) -> Tensor:
    """Return clips (B, C, T, H, W) as images (B * T, C, H, W), the frames of a clip consecutive."""
    return clips.transpose(1, 2).flatten(0, 1)


def as_clips(images: Tensor, frames: int) -> Tensor:
    """Return images (B * T, C, H, W) as clips (B, C, T, H, W) of T = frames: the inverse of `as_frames`."""
    return images.unflatten(0, (-1, frames)).transpose(1, 2)


class AuxiliaryHead(nn.Sequential):
    """Class logits from the features before the last (a ResNet's layer3), for deep supervision in training only.

    3x3 convolution with bias, norm, activation, dropout, 1x1 convolution, as `dsn` in the authors' code.

    Args:
        in_channels: channels of the features.
        num_classes: channels of the logits.
        channels: channels of the 3x3 convolution; 512 in the authors' code.
        dropout: probability of the channel dropout.
        activation: "leaky_relu" (slope 0.01) or "relu".

    Shape:
        (B, in_channels, H, W) -> (B, num_classes, H, W), for clips (B * T, ...).
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int = 512,
        dropout: float = 0.1,
        activation: str = "leaky_relu",
    ) -> None:
        super().__init__(_classifier(in_channels, channels, num_classes, dropout, activation, bias=True))


@torch.no_grad()
def initialise_as_mmsegmentation(head: nn.Module) -> None:
    """Draw the weights of a head anew as mmsegmentation does; torch's rules have drawn them before.

        3x3 and 1x1 convolutions before a batch norm: normal, std = sqrt(2 / ((1 + slope^2) fan_out)), bias 0
        convolutions to classes: normal, std = 0.01, bias 0

    fan_out is output channels times kernel positions, slope that of the activation (0 for "relu"). Everything else
    keeps torch's initial values there as here: q, k and v of the attention, and the batch norms.

    Args:
        head: a `CCHead` or an `AuxiliaryHead`, changed in place; the numbers are drawn from torch's global generator.

    Source: mmcv's `ConvModule.init_weights` and the `init_cfg` of mmsegmentation's `BaseDecodeHead`.
    """
    for module in head.modules():
        if isinstance(module, _Logits):
            nn.init.normal_(module.weight, std=CLASSIFIER_STD)
            _zero_bias(module)
        elif isinstance(module, nn.Sequential):
            layers = [*module]
            for layer, after in pairwise(layers):
                if isinstance(layer, nn.Conv2d) and isinstance(after, nn.BatchNorm2d):
                    slopes = [other.negative_slope for other in layers if isinstance(other, nn.LeakyReLU)]
                    slope = slopes[0] if slopes else 0.0
                    nn.init.kaiming_normal_(layer.weight, a=slope, mode="fan_out", nonlinearity="leaky_relu")
                    _zero_bias(layer)


def _zero_bias(convolution: nn.Conv2d) -> None:
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
