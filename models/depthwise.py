"""A depthwise convolution whose derivatives are right and fast in bfloat16 on CPUs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from ccgpu import autocast

_TAPS = 3  # extent of the kernels whose weight gradient torch computes by a fast kernel
_MULTIPLIES_BFLOAT16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
_FAR = 7  # padding from which on torch's forward of a dilated convolution is the slow one


def depthwise(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """Return the depthwise convolution of a map, of the same size: each channel with a kernel of its own.

        out[b, c, y, x'] = sum over i, j of weight[c, 0, i, j] * x[b, c, y + (i - r) d, x' + (j - r) d]
        r = k // 2, d the dilation; outside the map x is 0

    It is `torch.nn.functional.conv2d(x, weight, padding=r * d, dilation=d, groups=C)`. On CPUs torch 2.13 computes the
    derivatives of 5x5 and of dilated kernels by slow loops (`python -m benchmarks.dilated_speed`,
    docs/results/camvid-recipe/speed.jsonl), and in bfloat16 a dilated one's gradient for the weight wrongly for
    channels_last maps (`right_gradients` says where). Here a dilated convolution is one without dilation of the d * d
    maps of every d-th row and column; its gradient for x is a convolution with the flipped kernel; and its gradient for
    the weight is put together of 3x3 parts. Under autocast x and weight are converted first, as autocast does it.

    Args:
        x: (B, C, H, W), floating point, on any device, best channels_last, which it computes in.
        weight: (C, 1, k, k), k odd and 3 or more, of x's dtype unless autocast converts both.
        dilation: d, 1 or more.

    Raises:
        ValueError: weight is not square with an odd extent of 3 or more, or not depthwise for x.

    Differentiable to any order in x and weight. Saved for backward: x and weight.
    """
    size = weight.shape[-1]
    if weight.shape != (x.shape[1], 1, size, size) or size < _TAPS or size % 2 == 0:
        raise ValueError(
            f"depthwise: weight must be ({x.shape[1]}, 1, k, k) with k odd and 3 or more, got {tuple(weight.shape)}; "
            "use conv2d for other kernels."
        )
    if autocast.is_on(x.device.type):
        x, weight = autocast.lowered_maps(x.device.type, x, weight)
    out: Tensor = _Depthwise.apply(x, weight, dilation)
    return out


class _Depthwise(torch.autograd.Function):
    """The convolution of `depthwise` with its derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
        return _convolve(x, weight, dilation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        x, weight, ctx.dilation = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        grad = gradients[0]
        phases = _split(grad, ctx.dilation)
        for_x = for_weight = None
        if needs_x:
            for_x = _join(_convolve(phases, weight.flip(2, 3), 1), ctx.dilation, grad.shape)
        if needs_weight:
            for_weight = _weight_gradient(_split(x, ctx.dilation), phases, weight.shape[-1])
        return for_x, for_weight, None


def _convolve(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    padding = weight.shape[-1] // 2 * dilation
    if dilation > 1 and padding > _FAR:
        return _join(_convolve(_split(x, dilation), weight, 1), dilation, x.shape)
    return F.conv2d(x, weight, padding=padding, dilation=dilation, groups=x.shape[1])


def _split(x: Tensor, d: int) -> Tensor:
    """Return the d * d maps of every d-th row and column, (d * d * B, C, H / d, W / d) rounded up, filled with 0."""
    if d == 1:
        return x
    height, width = x.shape[2:]
    rows = F.pad(x, (0, -width % d, 0, -height % d)).permute(0, 2, 3, 1)  # channels_last without a copy
    rows = rows.unflatten(2, (-1, d)).unflatten(1, (-1, d))  # (B, H / d, d, W / d, d, C)
    return rows.permute(2, 4, 0, 1, 3, 5).flatten(0, 2).permute(0, 3, 1, 2)


def _join(phases: Tensor, d: int, shape: torch.Size) -> Tensor:
    """Return the map of this shape that `_split` split."""
    if d == 1:
        return phases
    rows = phases.permute(0, 2, 3, 1).unflatten(0, (d, d, -1))  # (d, d, B, H / d, W / d, C)
    joined = rows.permute(2, 3, 0, 4, 1, 5).flatten(3, 4).flatten(1, 2)
    joined = joined[:, : shape[2], : shape[3]].permute(0, 3, 1, 2)
    return joined.contiguous(memory_format=torch.channels_last)  # without gaps where rows were cut off


def _weight_gradient(x: Tensor, grad: Tensor, size: int) -> Tensor:
    """Return the gradient of the weight of a convolution without dilation, put together of 3x3 parts.

    The part of taps i ... i + 2 sees x moved by i; the last part overlaps the one before and adds what is missing.
    """
    if size == _TAPS:
        return _taps(x, grad, padding=1)
    height, width = grad.shape[2:]
    padded = F.pad(x, (size // 2,) * 4)
    starts = [min(i, size - _TAPS) for i in range(0, size, _TAPS)]
    new = [0, *(_TAPS - (after - before) for before, after in pairwise(starts))]

    def part(i: int, j: int) -> Tensor:
        return _taps(padded[:, :, i : i + height + _TAPS - 1, j : j + width + _TAPS - 1], grad, padding=0)

    rows = [torch.cat([part(i, j)[..., skip:] for j, skip in zip(starts, new, strict=True)], 3) for i in starts]
    return torch.cat([row[:, :, skip:] for row, skip in zip(rows, new, strict=True)], 2)


def _taps(x: Tensor, grad: Tensor, padding: int) -> Tensor:
    channels = x.shape[1]
    size = (channels, 1, _TAPS, _TAPS)
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and not _MULTIPLIES_BFLOAT16:
        # torch's kernel for the other CPUs, such as those without AVX-512, rounds its sums and is slower than float32.
        return conv2d_weight(x.float(), size, grad.float(), padding=padding, groups=channels).to(x.dtype)
    return conv2d_weight(x, size, grad, padding=padding, groups=channels)
