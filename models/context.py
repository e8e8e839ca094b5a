"""The context modules that the paper compares RCCA with: non-local attention, pyramid pooling (PSP) and ASPP.

All map (B, C, H, W) to (B, C, H, W), so each can replace the `RCCA` of the head; `build_context` builds any of them by
name. Norm and activation are the head's: `nn.BatchNorm2d` and a leaky ReLU (or another of `ACTIVATIONS`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccgpu.models.attention import RCCA, GatedAttention, require_int
from ccgpu.models.convolution_gradients import right_gradients

CONTEXTS = ("none", "rcca", "nonlocal", "psp", "aspp")
FORMS = ("materialised", "sdpa")
ACTIVATIONS = ("leaky_relu", "relu")
# InPlaceABN's default, which the authors' heads use.
LEAKY_SLOPE = 0.01


def activation_layer(name: str) -> nn.Module:
    """Return the activation of the heads: "leaky_relu" with slope 0.01 (the authors') or "relu" (mmsegmentation's)."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation_layer: name must be one of {ACTIVATIONS}, got {name!r}; pass one of these.")
    return nn.LeakyReLU(LEAKY_SLOPE, inplace=True) if name == "leaky_relu" else nn.ReLU(inplace=True)


def convolution(
    in_channels: int, channels: int, kernel: int = 3, *, dilation: int = 1, activation: str = "leaky_relu"
) -> nn.Sequential:
    """Return a convolution without bias that keeps the map's size, batch norm and activation; kernel must be odd."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(channels),
        activation_layer(activation),
    )


class NonLocal(GatedAttention):
    """x + gamma * (dense attention of x): every position attends to all N = H W positions.

        out_u = gamma * sum_i softmax_i(q_u . k_i) v_i + x_u,    q, k, v = query_conv(x), key_conv(x), value_conv(x)

    The block that the paper compares RCCA with. It has the convolutions (C // reduction channels for q and k) and the
    gamma of `CrissCrossAttention` and does not scale energies either; parameters have the same names, so state dicts
    interchange. Multiplications and additions: 2 N C (2 D + C) + 2 N^2 (D + C), 108 GFLOPs at 97x97 for C = 512,
    D = 64.

    Args:
        in_channels, reduction, dims, gamma, recompute: as in `GatedAttention`; so are shapes and errors.
        form: the implementation; both compute the same function.
            "materialised": the B matrices of N x N weights are formed, and saved for backward, as in public code.
            "sdpa": `torch.nn.functional.scaled_dot_product_attention`, which forms no such matrix where torch has a
            fused kernel for the call. On the CPU torch has one only for D = C, so there the matrix is formed as well.

    Raises:
        ValueError: the form is unknown.

    Source: Wang et al., Non-local Neural Networks, CVPR 2018, equations 1, 3 (embedded Gaussian) and 6; gamma and C / 8
    as in the authors' code, after Zhang et al., Self-Attention Generative Adversarial Networks, ICML 2019.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        reduction: int = 8,
        dims: int = 2,
        gamma: float = 0.0,
        form: str = "materialised",
        recompute: bool = False,
    ) -> None:
        super().__init__(in_channels, reduction=reduction, dims=dims, gamma=gamma, recompute=recompute)
        if form not in FORMS:
            raise ValueError(f"NonLocal: form must be one of {FORMS}, got {form!r}; pass one of these.")
        self.form = form

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return for each position the mean of all values, weighted by softmax(q^T k): (B, C, *S)."""
        q, k, mixed = q.flatten(2), k.flatten(2), v.flatten(2)
        if self.form == "materialised":
            weights = torch.bmm(q.transpose(1, 2), k).softmax(-1)
            return torch.bmm(mixed, weights.transpose(1, 2)).view(v.shape)
        # One head. The fused kernels need the channels of a position to be adjacent in memory.
        q, k, mixed = (x.transpose(1, 2).unsqueeze(1).contiguous() for x in (q, k, mixed))
        return F.scaled_dot_product_attention(q, k, mixed, scale=1.0).squeeze(1).transpose(1, 2).view(v.shape)

    def extra_repr(self) -> str:
        """Name the settings that the submodules do not show."""
        return f"form={self.form!r}, {super().extra_repr()}"


class PyramidPooling(nn.Module):
    """The map concatenated with its means over 1x1, 2x2, 3x3 and 6x6 bins, then fused (PSPNet).

        out = fuse([x, up(branch_1(mean_1(x))), ..., up(branch_6(mean_6(x)))])

    mean_n averages over n x n bins, a branch is a 1x1 convolution to C // 4 channels (at least one), up resizes to x's
    size (bilinear, corners aligned as in the head), fuse is a 3x3 convolution from 2 C to C channels; each convolution
    is followed by norm and activation. About 36 N C^2 multiplications and additions: 89 GFLOPs at 97x97, C = 512.

    The norm behind mean_1 sees one value per image and channel: in train mode it needs 2 images in the global
    batch, and torch raises ValueError for one.

    Args:
        in_channels: C, channels of x and of the output; 1 or more.
        activation: "leaky_relu" or "relu".

    Shape:
        (B, C, H, W) -> (B, C, H, W), floating point.

    Source: Zhao et al., Pyramid Scene Parsing Network, CVPR 2017, section 3.2.
    """

    BINS = (1, 2, 3, 6)

    def __init__(self, in_channels: int, *, activation: str = "leaky_relu") -> None:
        super().__init__()
        require_int("PyramidPooling", "in_channels", in_channels, 1)
        channels = max(in_channels // len(self.BINS), 1)
        self.branches = nn.ModuleList(convolution(in_channels, channels, 1, activation=activation) for _ in self.BINS)
        self.fuse = convolution(in_channels + len(self.BINS) * channels, in_channels, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map with its means; see the class for formula and shapes."""
        maps = [x]
        for parts, branch in zip(self.BINS, self.branches, strict=True):
            means = branch(F.adaptive_avg_pool2d(x, parts))
            maps.append(F.interpolate(means, size=x.shape[2:], mode="bilinear", align_corners=True))
        return self.fuse(torch.cat(maps, dim=1))


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: convolutions of the map at several dilations, and its mean (DeepLabv3).

        out = fuse([point(x), dilated_12(x), dilated_24(x), dilated_36(x), pooled(mean(x))])

    point is a 1x1 convolution, dilated_r a 3x3 convolution with dilation r (the rates for output stride 8), and pooled
    a 1x1 convolution of the mean over all positions, whose result every position receives; each has C output channels.
    fuse is a 1x1 convolution from 5 C to C channels; each convolution is followed by norm and activation. About 66 N
    C^2 multiplications and additions: 163 GFLOPs at 97x97, C = 512.

    The norm behind the mean sees one value per image and channel: in train mode it needs 2 images in the global
    batch, and torch raises ValueError for one.

    Args:
        in_channels: C, channels of x and of the output; 1 or more.
        activation: "leaky_relu" or "relu".

    Shape:
        (B, C, H, W) -> (B, C, H, W), floating point.

    Source: Chen et al., Rethinking Atrous Convolution for Semantic Image Segmentation, 2017, section 3.3; its
    branches have 256 channels; here they have C, to replace `RCCA`.
    """

    RATES = (12, 24, 36)

    def __init__(self, in_channels: int, *, activation: str = "leaky_relu") -> None:
        super().__init__()
        require_int("ASPP", "in_channels", in_channels, 1)
        self.point = convolution(in_channels, in_channels, 1, activation=activation)
        self.dilated = nn.ModuleList(
            convolution(in_channels, in_channels, dilation=rate, activation=activation) for rate in self.RATES
        )
        self.pooled = convolution(in_channels, in_channels, 1, activation=activation)
        self.fuse = convolution((len(self.RATES) + 2) * in_channels, in_channels, 1, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map fused from the five branches; see the class for formula and shapes."""
        mean = self.pooled(x.mean((2, 3), keepdim=True)).expand_as(x)
        with right_gradients(x):
            dilated = [branch(x) for branch in self.dilated]
        return self.fuse(torch.cat([self.point(x), *dilated, mean], dim=1))


def build_context(
    name: str,
    channels: int,
    *,
    recurrence: int = 2,
    dims: int = 2,
    gamma: float = 0.0,
    nonlocal_form: str = "sdpa",
    activation: str = "leaky_relu",
    recompute: bool = False,
    backend: str | None = None,
) -> nn.Module | None:
    """Return the context module `name` for maps with `channels` channels, or None for no module.

    Args:
        name: "none", "rcca" (`RCCA`), "nonlocal" (`NonLocal`), "psp" (`PyramidPooling`) or "aspp" (`ASPP`).
        channels: C, 1 or more.
        recurrence: loops of rcca; 0: no module.
        dims: position axes of rcca and nonlocal, 2 or 3. psp and aspp take images only, so the head gives them each
            frame of a clip by itself.
        gamma: initial value of gamma in rcca and nonlocal.
        nonlocal_form: the `form` of nonlocal.
        activation: "leaky_relu" or "relu", in psp and aspp.
        recompute: rcca and nonlocal save only their input for backward.
        backend: for rcca, as in `ccgpu.cca`.

    Raises:
        TypeError: a size is not an int.
        ValueError: an argument is out of its range; recompute is set for another module than rcca and nonlocal.
    """
    if name not in CONTEXTS:
        raise ValueError(f"build_context: name must be one of {CONTEXTS}, got {name!r}; pass one of these.")
    if recompute and name not in ("rcca", "nonlocal"):
        raise ValueError(f"build_context: recompute must be False for {name!r}, got True; only attention has it.")
    if name == "rcca":
        rcca = RCCA(channels, recurrence, dims=dims, gamma=gamma, recompute=recompute, backend=backend)
        return rcca if recurrence > 0 else None
    if name == "nonlocal":
        return NonLocal(channels, dims=dims, gamma=gamma, form=nonlocal_form, recompute=recompute)
    if name == "psp":
        return PyramidPooling(channels, activation=activation)
    return ASPP(channels, activation=activation) if name == "aspp" else None
