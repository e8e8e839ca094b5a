"""State dicts in the published layouts with random values; only their heads are narrower than the published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
CLASSES, HEAD, AUXILIARY = 7, 24, 16  # head channels: the published 512 and 256 are only more of the same


class RandomEntries:
    """Entries with random values under the names of one layout."""

    def __init__(self, counters: bool) -> None:
        self.state: State = {}
        self.counters = counters  # num_batches_tracked: not in the authors' files
        self.generator = torch.Generator().manual_seed(3)

    def convolution(self, name: str, out: int, into: int, size: int, *, bias: bool = False) -> None:
        fan = into * size**2
        self.state[f"{name}.weight"] = torch.randn(out, into, size, size, generator=self.generator) * (1.5 / fan) ** 0.5
        if bias:
            self.state[f"{name}.bias"] = torch.randn(out, generator=self.generator) * 0.1

    def norm(self, name: str, channels: int) -> None:
        uniform = torch.rand(3, channels, generator=self.generator)
        sign = torch.where(torch.rand(channels, generator=self.generator) < 0.3, -1.0, 1.0)
        self.state[f"{name}.weight"] = (uniform[0] * 0.5 + 0.75) * sign
        self.state[f"{name}.bias"] = torch.randn(channels, generator=self.generator) * 0.1
        self.state[f"{name}.running_mean"] = uniform[1] - 0.5
        self.state[f"{name}.running_var"] = uniform[2] + 0.5
        if self.counters:
            self.state[f"{name}.num_batches_tracked"] = torch.tensor(1000)

    def stages(self, prefix: str, depth: int, channels: int) -> None:
        for layer, (width, count) in enumerate(zip((64, 128, 256, 512), BLOCKS[depth], strict=True), 1):
            for i in range(count):
                block = f"{prefix}layer{layer}.{i}"
                for j, (out, into, size) in enumerate(
                    [(width, channels, 1), (width, width, 3), (4 * width, width, 1)], 1
                ):
                    self.convolution(f"{block}.conv{j}", out, into, size)
                    self.norm(f"{block}.bn{j}", out)
                # Small, as in trained networks, so that a hundred blocks do not overflow.
                self.state[f"{block}.bn3.weight"] *= 0.2
                if i == 0:
                    self.convolution(f"{block}.downsample.0", 4 * width, channels, 1)
                    self.norm(f"{block}.downsample.1", 4 * width)
                channels = 4 * width

    def attention(self, name: str, gamma: str, shape: tuple[int, ...]) -> None:
        for part, out in (("query", HEAD // 8), ("key", HEAD // 8), ("value", HEAD)):
            self.convolution(f"{name}.{part}_conv", out, HEAD, 1, bias=True)
        self.state[f"{name}.{gamma}"] = torch.full(shape, 0.8)


def authors_file(depth: int) -> State:
    entries = RandomEntries(counters=False)
    for i, (out, into) in enumerate([(64, 3), (64, 64), (128, 64)], 1):
        entries.convolution(f"conv{i}", out, into, 3)
        entries.norm(f"bn{i}", out)
    entries.state["conv1.weight"] /= 60  # their images are not divided by a std
    entries.stages("", depth, 128)
    entries.convolution("head.conva.0", HEAD, 2048, 3)
    entries.norm("head.conva.1", HEAD)
    entries.attention("head.cca", "gamma", (1,))
    entries.convolution("head.convb.0", HEAD, HEAD, 3)
    entries.norm("head.convb.1", HEAD)
    entries.convolution("head.bottleneck.0", HEAD, 2048 + HEAD, 3)
    entries.norm("head.bottleneck.1", HEAD)
    entries.convolution("head.bottleneck.3", CLASSES, HEAD, 1, bias=True)
    entries.convolution("dsn.0", HEAD, 1024, 3, bias=True)
    entries.norm("dsn.1", HEAD)
    entries.convolution("dsn.3", CLASSES, HEAD, 1, bias=True)
    return entries.state


def mmsegmentation_file(depth: int, classes: int = CLASSES) -> State:
    entries = RandomEntries(counters=True)
    for i, (out, into) in zip((0, 3, 6), [(32, 3), (32, 32), (64, 32)], strict=True):
        entries.convolution(f"backbone.stem.{i}", out, into, 3)
        entries.norm(f"backbone.stem.{i + 1}", out)
    entries.stages("backbone.", depth, 64)
    for i, into in enumerate([2048, HEAD]):
        entries.convolution(f"decode_head.convs.{i}.conv", HEAD, into, 3)
        entries.norm(f"decode_head.convs.{i}.bn", HEAD)
    entries.attention("decode_head.cca", "gamma.scale", ())
    entries.convolution("decode_head.conv_cat.conv", HEAD, 2048 + HEAD, 3)
    entries.norm("decode_head.conv_cat.bn", HEAD)
    entries.convolution("decode_head.conv_seg", classes, HEAD, 1, bias=True)
    entries.convolution("auxiliary_head.convs.0.conv", AUXILIARY, 1024, 3)
    entries.norm("auxiliary_head.convs.0.bn", AUXILIARY)
    entries.convolution("auxiliary_head.conv_seg", classes, AUXILIARY, 1, bias=True)
    return entries.state


def config_text(align_corners: bool, recurrence: int) -> str:
    """Return the config in the metadata of mmsegmentation's checkpoints, which is Python text."""
    return f"""norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    backbone=dict(type='ResNetV1c', depth=50, dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1), contract_dilation=True),
    decode_head=dict(
        type='CCHead', in_channels=2048, in_index=3, channels=512, recurrence={recurrence}, dropout_ratio=0.1,
        num_classes=19, norm_cfg=dict(type='SyncBN'), align_corners={align_corners},
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    auxiliary_head=dict(type='FCNHead', align_corners={align_corners}))
"""


def saved(content: Any, folder: Path, name: str = "file.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


def without(state: State, name: str) -> State:
    return {key: value for key, value in state.items() if key != name}
