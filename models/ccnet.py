"""CCNet: a backbone at 1/8 of the images' size and the criss-cross head on its last features.

In training, an auxiliary head predicts the classes from the backbone's last but one features, too.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccgpu.checks import untraced
from ccgpu.models.attention import (
    NOT_SCRIPTABLE,
    RCCA,
    attention_map,
    attention_weights,
    check_position,
    require_int,
)
from ccgpu.models.backbones import build_backbone
from ccgpu.models.context import CONTEXTS
from ccgpu.models.heads import AuxiliaryHead, CCHead, as_clips, as_frames

# Channels of the embedding for the category consistent loss (TPAMI 2020, section 4.1).
EMBEDDING_CHANNELS = 16
# Arguments of `CCNet` that are yes or no, and those of them that None leaves to the backbone.
_SWITCHES = ("auxiliary", "align_corners", "recompute", "halved_dilation", "ceil_mode")
_OF_RESNETS = ("halved_dilation", "ceil_mode")


class Outputs(NamedTuple):
    """Outputs of a `CCNet` in train mode.

    Attributes:
        logits: class logits at the images' size.
        auxiliary: the auxiliary head's logits at the images' size; None without that head.
        embedding: input of the category consistent loss, at the features' size; None for embedding=0.
    """

    logits: Tensor
    auxiliary: Tensor | None = None
    embedding: Tensor | None = None


class CCNet(nn.Module):
    """Criss-cross network for semantic segmentation: images -> class logits at the images' size.

        auxiliary_features, features = backbone(images)
        logits = upsample(head(features))
        auxiliary_logits = upsample(auxiliary_head(auxiliary_features)),    in train mode only

    The backbone is initialised by its own rules (`ccgpu.models.backbones.load_imagenet(net.backbone, path)` loads
    ImageNet weights), the heads by torch's defaults, as in the authors' code.

    Args:
        backbone: "resnet18", "resnet50", "resnet101", "efficientnet-lite0", "efficientnet-lite2", "local" or
            "timm:NAME"; see `ccgpu.models.backbones.build_backbone`.
        num_classes: classes, 1 or more; 19 for Cityscapes.
        context: "rcca", or another context module: "none", "nonlocal", "psp", "aspp".
        recurrence: R, loops of the attention, 0 or more; 0 is the network without attention. None: 2 for images, 3
            for clips, the number of loops after which each position has information from every other.
        dims: 2 for images; 3 for clips.
        stem: for a ResNet, "deep", "7x7" or "v1c"; None: deep.
        halved_dilation, ceil_mode: for a ResNet, see `ResNet`; None: False and True, as in the authors' code.
        in_channels: channels C of the images, 1 or more; 3 are red, green and blue, unless mean and std say otherwise.
        mean, std: normalisation of the images, one number for each channel in units of the images' values, for RGB
            0..255; None, for three channels alone: the backbone's own. They are stored as `net.backbone.mean` and
            `net.backbone.std`; the caller normalises the images with them.
        head_channels: channels in both heads, 1 or more; 512 in the paper.
        auxiliary: whether there is an auxiliary head.
        auxiliary_channels: channels in the auxiliary head, 1 or more; None: head_channels.
        embedding: channels of the embedding for the category consistent loss, 0 for none; 16 in the paper.
        dropout: probability of the heads' channel dropout, from 0 to 1.
        activation: activation of the heads, "leaky_relu" (slope 0.01, the authors') or "relu".
        align_corners: whether the bilinear upsampling of the logits aligns the centres of the corner pixels (True, the
            authors' choice) or the edges of the images (False).
        gamma, nonlocal_form, recompute, backend: see `CCHead`.

    Shape:
        images: (B, C, H, W), or clips (B, C, T, H, W) for dims=3, T, H and W 1 or more; floating point, normalised
        with the backbone's mean and std. In train mode the network returns `Outputs`: logits and auxiliary logits
        (B, num_classes, H, W), the embedding at the features' size; in eval mode the logits alone. For clips all of
        these have T before H. For T = 1 a network for clips computes the same as the network for images with the same
        weights; their state dicts interchange.

    Attributes:
        backbone: with `channels`, `mean` and `std`.
        head: the `CCHead`; head.cca is the `RCCA`, None where the network has none.
        auxiliary_head: the `AuxiliaryHead`, None for auxiliary=False.
        config: all arguments but backend, by name, as plain values; `CCNet(**config)` builds the same network.

    Raises:
        TypeError: a size is not an int or a switch not a bool, or the images are not floating point.
        ValueError: an argument is out of its range, or the images have another shape.

    `torch.compile(fullgraph=True)` takes a network in either mode, `torch.export.export` one in eval mode. With axes
    exported as `torch.export.Dim.AUTO` it takes images of any size with two or more feature positions along each axis;
    with a named Dim for H or W torch refuses a ResNet, because it cannot prove how the max-pool rounds.

    Source: the paper, figure 2; the auxiliary head, the activations and align_corners: the authors' code.

    Examples:
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
        halved_dilation: bool | None = None,
        ceil_mode: bool | None = None,
        in_channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        head_channels: int = 512,
        auxiliary: bool = True,
        auxiliary_channels: int | None = None,
        embedding: int = 0,
        dropout: float = 0.1,
        activation: str = "leaky_relu",
        align_corners: bool = True,
        nonlocal_form: str = "sdpa",
        recompute: bool = False,
        backend: str | None = None,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__", "backend")}
        super().__init__()
        self.config = {
            name: list(value) if name in ("mean", "std") and value else value for name, value in arguments.items()
        }
        if context not in CONTEXTS:
            raise ValueError(f"CCNet: context must be one of {CONTEXTS}, got {context!r}; pass one of these.")
        if dims not in (2, 3):
            raise ValueError(f"CCNet: dims must be 2 or 3, got {dims!r}; pass 2 for images, 3 for clips.")
        recurrence = (2 if dims == 2 else 3) if recurrence is None else recurrence
        sizes = (
            ("num_classes", num_classes, 1),
            ("in_channels", in_channels, 1),
            ("head_channels", head_channels, 1),
            ("recurrence", recurrence, 0),
            ("embedding", embedding, 0),
            ("auxiliary_channels", head_channels if auxiliary_channels is None else auxiliary_channels, 1),
        )
        for name, value, minimum in sizes:
            require_int("CCNet", name, value, minimum)
        for name in _SWITCHES:
            if not isinstance(arguments[name], bool) and not (arguments[name] is None and name in _OF_RESNETS):
                found = type(arguments[name]).__name__
                raise TypeError(f"CCNet: {name} must be a bool, got {found}; pass True or False.")
        if not 0 <= dropout <= 1:
            raise ValueError(f"CCNet: dropout must be from 0 to 1, got {dropout}; pass a probability.")
        self.dims = dims
        self.in_channels = in_channels
        self.align_corners = align_corners
        resnet = {"halved_dilation": halved_dilation, "ceil_mode": ceil_mode}
        self.backbone = build_backbone(
            backbone,
            stem=stem,
            in_channels=in_channels,
            **{name: value for name, value in resnet.items() if value is not None},
        )
        for name, values in (("mean", mean), ("std", std)):
            if values is not None or in_channels != 3:
                setattr(self.backbone, name, _per_channel(name, values, in_channels))
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
            activation=activation,
            nonlocal_form=nonlocal_form,
            recompute=recompute,
            backend=backend,
        )
        self.auxiliary_head = None
        if auxiliary:
            channels = head_channels if auxiliary_channels is None else auxiliary_channels
            self.auxiliary_head = AuxiliaryHead(
                before, num_classes, channels=channels, dropout=dropout, activation=activation
            )

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        *,
        num_classes: int | None = None,
        classes: Sequence[str] | None = None,
        **changes: Any,
    ) -> CCNet:
        """Return the network of a file, with its weights, in eval mode on the CPU.

        The file may be the authors' CCNet, mmsegmentation's CCNet R-50/101-D8, a ResNet of torchvision, MIT scene
        parsing or mmsegmentation (v1c), or one of our own: a run's `last.pt` or a file that `ccgpu convert`
        writes. The network gets everything that its weights depend on: stem, dilation, the max-pool's rounding,
        activation, align_corners, and the normalisation of images (`net.backbone.mean`, `.std`; always red, green, blue
        in 0..255). A ResNet's file fills the backbone; the heads are randomly initialised, and a UserWarning says so.
        The layouts are described in `ccgpu.models.published`.

        Args:
            path: a file of `torch.save` or safetensors, or a run's folder, for its `last.pt`. Only tensors and plain
                values are read.
            num_classes: classes of the network; None: the file's. For another number the last convolution of both heads
                is drawn anew by torch's default, everything else is loaded, and a UserWarning says so.
            classes: names of the network's classes, in the order of its logits; None: the file's classes, or as many as
                num_classes without names. Those of the same name in the file (other spellings included, see
                `ccgpu.models.labels.same_classes`) keep their row in both heads, its weights and its bias; the others
                are drawn anew, and a UserWarning names them. A file without names keeps all rows if it has as many
                classes, else none.
            changes: arguments of `CCNet` that override the file's: recurrence, backend, recompute; in_channels with
                mean and std, for which the first convolution is adapted as in `ccgpu.models.backbones.load_imagenet`.
                mmsegmentation's files without a config need align_corners=True where they were trained on crops of
                769x769. The authors' files do not hold R; 2 is assumed.

        Raises:
            TypeError: num_classes is not an int, or classes is a text instead of several, or holds others.
            FileNotFoundError: there is no file at path. (Any other OSError from opening it is passed on.)
            ValueError: a damaged file; an unknown layout; entries that are missing, surplus or misshapen, all of which
                are listed; weights that are NaN or infinite; changes that do not fit; num_classes and classes that do
                not fit each other, or names that are not different.
        """
        from ccgpu.models import checkpoint, published  # here, because checkpoint imports this module

        found = checkpoint.read(path, **changes)
        drawn: list[str] = []
        if num_classes is not None or classes is not None:
            names = None if classes is None else [classes] if isinstance(classes, str) else [*classes]
            if isinstance(classes, str) or not all(isinstance(name, str) for name in names or ()):
                raise TypeError(
                    f"CCNet.from_checkpoint: classes must be several names, got {classes!r}; pass a list of texts."
                )
            number = len(names or ()) if num_classes is None else num_classes
            require_int("CCNet.from_checkpoint", "num_classes", number, 1)
            found, kept, drawn = checkpoint.with_classes(found, names, number)
        if found.source == published.RESNET:
            warnings.warn(f"CCNet.from_checkpoint: {'; '.join(found.notes)}.", stacklevel=2)
        elif drawn:
            rest = f"those of {len(kept)} are the file's ({', '.join(kept)})" if kept else "none is the file's"
            warnings.warn(
                f"CCNet.from_checkpoint: the last convolutions' rows of {len(drawn)} of {len(drawn) + len(kept)} "
                f"classes are randomly initialised ({', '.join(drawn)}), {rest}; train them.",
                stacklevel=2,
            )
        return checkpoint.build(found)

    def forward(self, images: Tensor) -> Tensor | Outputs:
        """Return logits, in train mode `Outputs`; see the class for shapes."""
        _check_images(images, self.in_channels, self.dims)
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

    def attention_map(self, images: Tensor, at: Iterable[int], *, recurrence: int | None = None) -> Tensor:
        """Return how much the pixel `at` attends to each position of the feature map, over all loops of the head.

        This is `ccgpu.models.attention.attention_map` of the head's attention, at the position nearest to the pixel
        (under the network's align_corners). The features are computed in eval mode and without gradients; afterwards
        every module is back in its own mode.

        Args:
            images: (B, C, H, W) or (B, C, T, H, W), as for `forward`.
            at: (y, x), a pixel of the images, 0 <= y < H and 0 <= x < W; for clips (t, y, x).
            recurrence: number of loops, 0 or more; None: the network's own.

        Returns:
            (B, H', W') or (B, T, H', W') at the backbone's output stride; non-negative, each image's or clip's map
            sums to 1.

        Raises:
            RuntimeError: the network has no criss-cross attention.
            TypeError: the images are not floating point, or `at` or recurrence is not ints.
            ValueError: the images have another shape, `at` lies outside them, or recurrence is below 0.
        """
        _check_images(images, self.in_channels, self.dims)
        pixel = check_position("CCNet.attention_map", at, tuple(images.shape[2:]))
        attention, features = self._attention("CCNet.attention_map", images)
        position = self.position_of(pixel, tuple(images.shape[2:]), tuple(features.shape[2:]))
        return attention_map(attention, features, position, recurrence=recurrence)

    def attention_weights(self, images: Tensor, *, recurrence: int | None = None) -> list[Tensor]:
        """Return how much every position of the feature map attends to each position of its criss-cross, for each loop.

        This is `ccgpu.models.attention.attention_weights` of the head's attention; features, arguments and errors as
        in `attention_map`. `position_of` returns the position nearest to a pixel.

        Returns:
            R tensors (B, K, H', W') or (B, K, T, H', W').
        """
        attention, features = self._attention("CCNet.attention_weights", images)
        return attention_weights(attention, features, recurrence=recurrence)

    def position_of(self, pixel: Sequence[int], size: Sequence[int], coarse: Sequence[int]) -> tuple[int, ...]:
        """Return the position nearest to a pixel of images of `size`, on a feature map of extents `coarse`."""
        axes = zip(pixel, size, coarse, strict=True)
        return tuple(_nearest(index, fine, positions, self.align_corners) for index, fine, positions in axes)

    def _attention(self, function: str, images: Tensor) -> tuple[RCCA, Tensor]:
        """Return the head's attention and its input for the images, computed in eval mode and without gradients."""
        if self.head.cca is None:
            raise RuntimeError(
                f"{function}: the network must have criss-cross attention, got none; "
                'build it with context="rcca" and recurrence=1 or more.'
            )
        _check_images(images, self.in_channels, self.dims)
        with _evaluating(self), torch.no_grad():
            features = self.head.conva(self._features(images)[1])
        return self.head.cca, as_clips(features, images.shape[2]) if self.dims == 3 else features

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return both features of the backbone; the frames of clips are stacked along the batch axis."""
        return self.backbone(as_frames(images) if self.dims == 3 else images)

    def _full_size(self, logits: Tensor, images: Tensor, frames: int) -> Tensor:
        """Return a head's logits upsampled to the size of the images; for clips (B, classes, T, H, W)."""
        full = F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=self.align_corners)
        return as_clips(full, frames) if self.dims == 3 else full

    def __prepare_scriptable__(self) -> nn.Module:
        """Raise: torch.jit.script calls this for each module that it compiles."""
        raise RuntimeError(NOT_SCRIPTABLE.format("CCNet"))


@torch.fx.wrap  # a traced graph calls the whole check
@untraced
def _check_images(images: Tensor, channels: int, dims: int) -> None:
    shape = f"(B, {channels}, H, W)" if dims == 2 else f"(B, {channels}, T, H, W)"
    if images.ndim != dims + 2 or images.shape[1] != channels:
        raise ValueError(
            f"CCNet: images must be {shape} for dims={dims}, got shape {tuple(images.shape)}; "
            f"add the batch axis with images.unsqueeze(0) or convert the images to {channels} channels."
        )
    if 0 in images.shape[2:]:
        raise ValueError(
            f"CCNet: images must have a pixel or more, got shape {tuple(images.shape)}; leave empty images out."
        )
    if not images.is_floating_point():
        raise TypeError(
            f"CCNet: images must be floating point, got {images.dtype}; normalise them as for the backbone."
        )


def _per_channel(name: str, values: Sequence[float] | None, channels: int) -> tuple[float, ...]:
    """Return values as a tuple of `channels` floats; raise unless they are finite and, for "std", more than 0."""
    if (
        values is None
        or len(values) != channels
        or not all(math.isfinite(x) and (x > 0 or name == "mean") for x in values)
    ):
        raise ValueError(
            f"CCNet: {name} must be {channels} finite numbers{'' if name == 'mean' else ' more than 0'} for images of "
            f"{channels} channels, got {values!r}; give one for each channel, in units of the images' values: for RGB "
            "red, green and blue in 0..255."
        )
    return tuple(float(x) for x in values)


def _nearest(index: int, fine: int, coarse: int, align_corners: bool) -> int:
    """Return which of `coarse` positions along an axis is nearest to pixel `index` of `fine`, centre to centre."""
    if align_corners:
        # round(index * (coarse - 1) / (fine - 1)) in whole numbers, halves up; a single pixel is at position 0.
        span = max(fine - 1, 1)
        return (2 * index * (coarse - 1) + span) // (2 * span)
    return (2 * index + 1) * coarse // (2 * fine)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Put every module into eval mode, and restore each module's own mode at the end."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
