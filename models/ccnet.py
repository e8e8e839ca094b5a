"""CCNet: a backbone at 1/8 of the pictures' size, the criss-cross head on its last features, an auxiliary head on
those before.

The norm of both heads is `nn.BatchNorm2d` followed by a leaky ReLU, which is what the authors' InPlaceABN computes
(but that it scales by |weight| + 1e-5: in a file of theirs a negative weight means its absolute value). They are two
plain modules on purpose: a function that swaps every `nn.BatchNorm2d` and `nn.Dropout2d` for a kind that works over
all processes keeps the activation. The activation has a name of its own inside the sequences, so the numbers of the
other entries, and with them the keys of the state dict (`bottleneck.{0,1,3}`), are those of the authors' files.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccgpu.models.attention import RCCA, GatedAttention, attention_map, check_position, require_int
from ccgpu.models.backbones import build_backbone
from ccgpu.models.context import CONTEXTS, LEAKY_SLOPE, build_context, convolution

# Channels of the embedding that the category consistent loss sees (TPAMI 2020, section 4.1).
EMBEDDING_CHANNELS = 16


class Outputs(NamedTuple):
    """What a `CCNet` returns in train mode.

    Class logits at the pictures' size, the auxiliary head's logits (None without that head), and the embedding at the
    features' size (None without one).
    """

    logits: Tensor
    auxiliary: Tensor | None = None
    embedding: Tensor | None = None


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
    """Class logits from backbone features x: bottleneck([x, convb(context(conva(x)))]).

    conva and convb are 3x3 convolutions with norm and activation, context is an `RCCA` or one of the modules it is
    compared with, and bottleneck (3x3 convolution, norm, activation, dropout, 1x1 convolution) sees the features
    from before the context beside those after it.

    Args:
        in_channels: channels of x.
        num_classes: channels of the logits.
        channels: channels of conva, the context, convb and the bottleneck; 512 in the paper.
        context: "none", "rcca", "nonlocal", "psp" or "aspp"; see `ccgpu.models.context.build_context`.
        recurrence: loops of the criss-cross attention. 0 leaves it out, parameters included, as "none" does.
        dims: 2 for pictures. 3 for clips: criss-cross and non-local attention then look along the time too, all other
            modules see frame by frame.
        embedding: channels of the context's output reduced by a 1x1 convolution, for the category consistent loss
            (16 in the paper); 0 for none.
        dropout: probability of the channel dropout.
        gamma: where the gamma of criss-cross and non-local attention starts; 0 in the paper.
        nonlocal_form: "sdpa" or "materialised", how non-local attention is computed.
        recompute: of criss-cross and non-local attention: save only each loop's input for backward.
        backend: as in `ccgpu.cca`.

    Attributes:
        cca: the `RCCA`, or None. context: another context module, or None.

    Shape:
        (B * T, in_channels, H, W) -> logits (B * T, num_classes, H, W), embedding (B * T, embedding, H, W); the frames
        of a clip follow each other, T is the argument `frames` (1 for pictures).

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
        nonlocal_form: str = "sdpa",
        recompute: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.conva = convolution(in_channels, channels)
        module = build_context(
            context,
            channels,
            recurrence=recurrence,
            dims=dims,
            gamma=gamma,
            nonlocal_form=nonlocal_form,
            recompute=recompute,
            backend=backend,
        )
        # The published files' name for the attention is "cca"; other modules do not go under it.
        self.cca = module if isinstance(module, RCCA) else None
        self.context = module if self.cca is None else None
        self.convb = convolution(channels, channels)
        layers = _classifier(in_channels + channels, channels, num_classes, dropout, bias=False)
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
    """Return clips (B, C, T, H, W) as pictures (B * T, C, H, W), the frames of a clip one after the other."""
    return clips.transpose(1, 2).flatten(0, 1)


def as_clips(pictures: Tensor, frames: int) -> Tensor:
    """Return pictures (B * T, C, H, W) as clips (B, C, T, H, W) of T = frames: the inverse of `as_frames`."""
    return pictures.unflatten(0, (-1, frames)).transpose(1, 2)


class AuxiliaryHead(nn.Sequential):
    """Class logits from the features before the last (a ResNet's layer3), which only training uses (deep supervision).

    3x3 convolution with bias, norm, activation, dropout, 1x1 convolution, as `dsn` in the authors' code.

    Args:
        in_channels: channels of the features.
        num_classes: channels of the logits.
        channels: channels in between; 512 in the authors' code.
        dropout: probability of the channel dropout.

    Shape:
        (B, in_channels, H, W) -> (B, num_classes, H, W), for clips (B * T, ...).
    """

    def __init__(self, in_channels: int, num_classes: int, *, channels: int = 512, dropout: float = 0.1) -> None:
        super().__init__(_classifier(in_channels, channels, num_classes, dropout, bias=True))


class CCNet(nn.Module):
    """Criss-cross network for semantic segmentation: images -> class logits at the images' size.

        features for the auxiliary head, features = backbone(images)
        logits = upsample(head(features))
        auxiliary_logits = upsample(auxiliary_head(features for it)),    in train mode only

    The backbone starts from its own initialisation (`ccgpu.models.backbones.load_imagenet(net.backbone, path)` fills
    it), the heads from torch's defaults, as the authors' do.

    Args:
        backbone: "resnet18", "resnet50", "resnet101", "efficientnet-lite0", "efficientnet-lite2" or "timm:NAME"; see
            `ccgpu.models.backbones.build_backbone`.
        num_classes: classes, 1 or more; 19 for Cityscapes.
        context: "rcca", or what it is compared with: "none", "nonlocal", "psp", "aspp".
        recurrence: R, loops of the attention, 0 or more; 0 is the network without attention. None: 2 for pictures, 3
            for clips, which is what it takes for each position to reach every other.
        dims: 2 for pictures; 3 for clips.
        stem: of a ResNet, "deep" or "7x7"; None: deep.
        head_channels: channels in both heads, 1 or more; 512 in the paper.
        auxiliary: whether there is an auxiliary head.
        embedding: channels of the embedding for the category consistent loss, 0 for none; 16 in the paper.
        dropout: probability of the heads' channel dropout, from 0 to 1.
        align_corners: how the logits are upsampled (bilinearly): corner pixels' centres kept in place (True,
            the authors' choice) or the pictures' edges (False).
        gamma, nonlocal_form, recompute, backend: see `CCHead`.

    Shape:
        images: (B, 3, H, W), or clips (B, 3, T, H, W) for dims=3, T, H and W 1 or more; floating point, normalised
        with the backbone's mean and std. In train mode `Outputs`: logits and auxiliary logits (B, num_classes, H, W),
        the embedding at the features' size; in eval mode the logits. For clips a T stands before each H. With T = 1 a
        network for clips computes what the network for pictures does with the same weights, and its state dict fits
        there.

    Attributes:
        backbone: with `channels`, `mean` and `std`. head: the `CCHead`, with the `RCCA` as head.cca (None without).
        auxiliary_head: the `AuxiliaryHead`, None for auxiliary=False.

    Raises:
        TypeError: a size is not an int; images that are not floating point.
        ValueError: an argument outside of its values; images of another shape.

    `torch.compile(fullgraph=True)` takes a network in either mode, `torch.export.export` one in eval mode. The exported
    one takes pictures of any size with two or more feature positions an axis, where the axes are
    `torch.export.Dim.AUTO`; with a named Dim for H or W torch refuses a ResNet, whose max-pool's rounding it cannot
    prove.

    Source: the paper, figure 2; the auxiliary head, the activations and align_corners: the authors' code.

    >>> import torch
    >>> from ccgpu.models.ccnet import CCNet
    >>> net = CCNet("resnet18", 5, head_channels=16)
    >>> images = torch.zeros(2, 3, 33, 65)
    >>> outputs = net(images)
    >>> outputs.logits.shape, outputs.auxiliary.shape, outputs.embedding
    (torch.Size([2, 5, 33, 65]), torch.Size([2, 5, 33, 65]), None)
    >>> net.eval()(images).shape
    torch.Size([2, 5, 33, 65])
    """

    def __init__(
        self,
        backbone: str = "resnet101",
        num_classes: int = 19,
        *,
        context: str = "rcca",
        recurrence: int | None = None,
        dims: int = 2,
        gamma: float = 0.0,
        stem: str | None = None,
        head_channels: int = 512,
        auxiliary: bool = True,
        embedding: int = 0,
        dropout: float = 0.1,
        align_corners: bool = True,
        nonlocal_form: str = "sdpa",
        recompute: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if context not in CONTEXTS:
            raise ValueError(f"CCNet: context must be one of {CONTEXTS}, got {context!r}; pass one of these.")
        if dims not in (2, 3):
            raise ValueError(f"CCNet: dims must be 2 or 3, got {dims!r}; pass 2 for pictures, 3 for clips.")
        recurrence = (2 if dims == 2 else 3) if recurrence is None else recurrence
        sizes = (
            ("num_classes", num_classes, 1),
            ("head_channels", head_channels, 1),
            ("recurrence", recurrence, 0),
            ("embedding", embedding, 0),
        )
        for name, value, minimum in sizes:
            require_int("CCNet", name, value, minimum)
        if not 0 <= dropout <= 1:
            raise ValueError(f"CCNet: dropout must be from 0 to 1, got {dropout}; pass a probability.")
        self.dims = dims
        self.align_corners = align_corners
        self.backbone = build_backbone(backbone, stem=stem)
        before, last = self.backbone.channels
        self.head = CCHead(
            last,
            num_classes,
            channels=head_channels,
            context=context,
            recurrence=recurrence,
            dims=dims,
            gamma=gamma,
            embedding=embedding,
            dropout=dropout,
            nonlocal_form=nonlocal_form,
            recompute=recompute,
            backend=backend,
        )
        self.auxiliary_head = (
            AuxiliaryHead(before, num_classes, channels=head_channels, dropout=dropout) if auxiliary else None
        )

    def forward(self, images: Tensor) -> Tensor | Outputs:
        """Return logits, in train mode `Outputs`; see the class for shapes."""
        self._check_images(images)
        frames = images.shape[2] if self.dims == 3 else 1
        before, last = self._features(images)
        logits, embedding = self.head(last, frames)
        if not self.training:
            return self._full_size(logits, images, frames)
        auxiliary = None if self.auxiliary_head is None else self.auxiliary_head(before)
        return Outputs(
            self._full_size(logits, images, frames),
            None if auxiliary is None else self._full_size(auxiliary, images, frames),
            as_clips(embedding, frames) if embedding is not None and self.dims == 3 else embedding,
        )

    def attention_map(self, images: Tensor, at: Iterable[int]) -> Tensor:
        """How much the pixel `at` attends to each position of the feature map, over all loops of the head.

        `ccgpu.models.attention.attention_map` of the head's attention at the position that the pixel falls on
        (the nearest one under the network's align_corners). The features are those of eval mode; every
        module's mode is given back afterwards, and no gradient is recorded.

        Args:
            images: (B, 3, H, W) or (B, 3, T, H, W), as for `forward`.
            at: (y, x), a pixel of the images, 0 <= y < H and 0 <= x < W; for clips (t, y, x).

        Returns:
            (B, H', W') or (B, T, H', W') at the backbone's output stride; non-negative, each picture's or clip's map
            sums to 1.

        Raises:
            RuntimeError: the network has no criss-cross attention.
            TypeError, ValueError: images of another shape, a position that is not ints inside of them.
        """
        if self.head.cca is None:
            raise RuntimeError(
                "CCNet.attention_map: the network must have criss-cross attention, got none; "
                'build it with context="rcca" and recurrence=1 or more.'
            )
        self._check_images(images)
        size = tuple(images.shape[2:])
        pixel = check_position("CCNet.attention_map", at, size)
        with _evaluating(self), torch.no_grad():
            features = self.head.conva(self._features(images)[1])
        if self.dims == 3:
            features = as_clips(features, images.shape[2])
        pairs = zip(pixel, size, features.shape[2:], strict=True)
        position = [_nearest(index, fine, coarse, self.align_corners) for index, fine, coarse in pairs]
        return attention_map(self.head.cca, features, position)

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return both features of the backbone, those of a clip's frames one after the other."""
        return self.backbone(as_frames(images) if self.dims == 3 else images)

    def _full_size(self, logits: Tensor, images: Tensor, frames: int) -> Tensor:
        """Return the heads' logits at the size of images, frame by frame or clip by clip as images are."""
        full = F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=self.align_corners)
        return as_clips(full, frames) if self.dims == 3 else full

    def _check_images(self, images: Tensor) -> None:
        shape = "(B, 3, H, W)" if self.dims == 2 else "(B, 3, T, H, W)"
        if images.ndim != self.dims + 2 or images.shape[1] != 3:
            raise ValueError(
                f"CCNet: images must be {shape} for dims={self.dims}, got shape {tuple(images.shape)}; "
                "add the batch axis with images.unsqueeze(0) or convert the pictures to three channels."
            )
        if 0 in images.shape[2:]:
            raise ValueError(
                f"CCNet: images must have a pixel or more, got shape {tuple(images.shape)}; leave empty pictures out."
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
