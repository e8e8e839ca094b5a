"""Reference implementations of the published networks in plain torch, computed from the entries of their files.

They are independent of ccgpu and interpret the entries of a file as its authors' code does. With training=True norms
take the statistics of the batch, and update the running ones in the file's entries; dropout is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.published_files import State


def convolve(state: State, x: Tensor, name: str, *, stride: int = 1, dilation: int = 1) -> Tensor:
    weight = state[f"{name}.weight"]
    padding = weight.shape[-1] // 2 * dilation
    return F.conv2d(x, weight, state.get(f"{name}.bias"), stride=stride, padding=padding, dilation=dilation)


def batch_norm(state: State, x: Tensor, name: str, training: bool = False) -> Tensor:
    weight, bias, mean, variance = (state[f"{name}.{e}"] for e in ("weight", "bias", "running_mean", "running_var"))
    return F.batch_norm(x, mean, variance, weight, bias, training=training, momentum=0.1, eps=1e-5)


def inplace_abn(state: State, x: Tensor, name: str, training: bool = False) -> Tensor:
    """InPlaceABN without its activation: (x - mean) / sqrt(var + eps) * (|weight| + eps) + bias."""
    column = (1, -1, 1, 1)
    weight, bias, mean, variance = (
        state[f"{name}.{entry}"].view(column) for entry in ("weight", "bias", "running_mean", "running_var")
    )
    if training:
        with torch.no_grad():
            state[f"{name}.running_mean"] = 0.9 * mean.flatten() + 0.1 * x.mean((0, 2, 3))
            state[f"{name}.running_var"] = 0.9 * variance.flatten() + 0.1 * x.var((0, 2, 3))
        mean = x.mean((0, 2, 3), keepdim=True)
        variance = (x - mean).square().mean((0, 2, 3), keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * (weight.abs() + 1e-5) + bias


Norm = Callable[[State, Tensor, str], Tensor]


def stages(state: State, x: Tensor, prefix: str, norm: Norm, *, halved: bool) -> list[Tensor]:
    outputs = []
    for layer, (stride, dilation) in enumerate([(1, 1), (2, 1), (1, 2), (1, 4)], 1):
        count = len(
            {name.split(".")[prefix.count(".") + 1] for name in state if name.startswith(f"{prefix}layer{layer}.")}
        )
        for i in range(count):
            block = f"{prefix}layer{layer}.{i}"
            step = stride if i == 0 else 1
            rate = max(dilation // 2, 1) if halved and i == 0 else dilation
            out = norm(state, convolve(state, x, f"{block}.conv1"), f"{block}.bn1").relu()
            out = norm(state, convolve(state, out, f"{block}.conv2", stride=step, dilation=rate), f"{block}.bn2").relu()
            out = norm(state, convolve(state, out, f"{block}.conv3"), f"{block}.bn3")
            if i == 0:
                x = norm(state, convolve(state, x, f"{block}.downsample.0", stride=step), f"{block}.downsample.1")
            x = (out + x).relu()
        outputs.append(x)
    return outputs


def criss_cross(state: State, x: Tensor, name: str, gamma: Tensor) -> Tensor:
    """One loop, position by position: softmax over the row and the column, the position itself once."""
    q, k, v = (convolve(state, x, f"{name}.{part}_conv") for part in ("query", "key", "value"))
    out = torch.empty_like(v)
    height, width = x.shape[2:]
    for i in range(height):
        for j in range(width):
            seen = [(i, b) for b in range(width)] + [(a, j) for a in range(height) if a != i]
            rows, columns = (list(axis) for axis in zip(*seen, strict=True))
            energy = torch.einsum("bc,bcn->bn", q[:, :, i, j], k[:, :, rows, columns])
            out[:, :, i, j] = torch.einsum("bn,bcn->bc", energy.softmax(1), v[:, :, rows, columns])
    return gamma * out + x


def upsampled(logits: Tensor, images: Tensor, align_corners: bool) -> Tensor:
    return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=align_corners)


def authors_network(
    state: State, images: Tensor, recurrence: int = 2, *, training: bool = False
) -> tuple[Tensor, Tensor]:
    """Logits and auxiliary logits of images (B, 3, H, W), red, green, blue in 0..255."""
    norm = partial(inplace_abn, training=training)
    mean = torch.tensor([104.00698793, 116.66876762, 122.67891434], dtype=images.dtype).view(1, 3, 1, 1)
    x = images.flip(1) - mean  # blue, green, red
    x = norm(state, convolve(state, x, "conv1", stride=2), "bn1").relu()
    x = norm(state, convolve(state, x, "conv2"), "bn2").relu()
    x = norm(state, convolve(state, x, "conv3"), "bn3").relu()
    x = F.max_pool2d(x, 3, stride=2, padding=1, ceil_mode=True)
    *_, layer3, x = stages(state, x, "", norm, halved=False)

    def leaky(x: Tensor, name: str, after: str) -> Tensor:
        return F.leaky_relu(norm(state, convolve(state, x, name), after), 0.01)

    attended = leaky(x, "head.conva.0", "head.conva.1")
    for _ in range(recurrence):
        attended = criss_cross(state, attended, "head.cca", state["head.cca.gamma"])
    attended = leaky(attended, "head.convb.0", "head.convb.1")
    joined = leaky(torch.cat([x, attended], 1), "head.bottleneck.0", "head.bottleneck.1")
    logits = convolve(state, joined, "head.bottleneck.3")
    auxiliary = convolve(state, leaky(layer3, "dsn.0", "dsn.1"), "dsn.3")
    return upsampled(logits, images, True), upsampled(auxiliary, images, True)


def mmsegmentation_network(
    state: State, images: Tensor, *, align_corners: bool, recurrence: int = 2, training: bool = False
) -> tuple[Tensor, Tensor]:
    """Logits and auxiliary logits of images (B, 3, H, W), red, green, blue in 0..255."""
    norm = partial(batch_norm, training=training)
    mean = torch.tensor([123.675, 116.28, 103.53], dtype=images.dtype).view(1, 3, 1, 1)
    std = torch.tensor([58.395, 57.12, 57.375], dtype=images.dtype).view(1, 3, 1, 1)
    x = (images - mean) / std
    for i, stride in ((0, 2), (3, 1), (6, 1)):
        x = convolve(state, x, f"backbone.stem.{i}", stride=stride)
        x = norm(state, x, f"backbone.stem.{i + 1}").relu()
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    *_, layer3, x = stages(state, x, "backbone.", norm, halved=True)

    logits = mmsegmentation_head(state, x, recurrence=recurrence, training=training)
    hidden = norm(state, convolve(state, layer3, "auxiliary_head.convs.0.conv"), "auxiliary_head.convs.0.bn").relu()
    auxiliary = convolve(state, hidden, "auxiliary_head.conv_seg")
    return upsampled(logits, images, align_corners), upsampled(auxiliary, images, align_corners)


def mmsegmentation_head(state: State, x: Tensor, *, recurrence: int = 2, training: bool = False) -> Tensor:
    """Logits of features x (B, 2048, H, W), at their size."""

    def module(x: Tensor, name: str) -> Tensor:
        return batch_norm(state, convolve(state, x, f"{name}.conv"), f"{name}.bn", training).relu()

    attended = module(x, "decode_head.convs.0")
    for _ in range(recurrence):
        attended = criss_cross(state, attended, "decode_head.cca", state["decode_head.cca.gamma.scale"])
    attended = module(attended, "decode_head.convs.1")
    return convolve(state, module(torch.cat([x, attended], 1), "decode_head.conv_cat"), "decode_head.conv_seg")
