"""Writes files of a small network whose logits and attention vary over the image, as those of trained networks do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ccgpu.models import checkpoint
from ccgpu.models.ccnet import CCNet
from ccgpu.models.image_format import ImageFormat
from ccgpu.models.labels import Labels
from ccgpu.train import camvid
from tests.train.narrow import NARROW


def write_network(
    path: Path,
    labels: Labels | None = camvid.LABELS,
    prediction: dict[str, Any] | None = None,
    images: ImageFormat | None = None,
    **options: Any,
) -> CCNet:
    """Write a network, with CamVid's classes unless options say otherwise, and return it in eval mode."""
    torch.manual_seed(4)
    defaults = {"num_classes": camvid.LABELS.num_classes, "head_channels": 16, "gamma": 0.7}
    net = CCNet(NARROW, **{**defaults, **options}).eval()
    torch.nn.init.normal_(net.head.bottleneck[-1].weight)
    if net.head.cca is not None:
        for convolution in (net.head.cca.query_conv, net.head.cca.key_conv):
            torch.nn.init.normal_(convolution.weight)  # at initialisation all weights are about equal
    plain = None if labels is None else labels.as_plain()
    checkpoint.write(
        path,
        checkpoint.Checkpoint(net.config, net.state_dict(), plain, prediction or {}, images=images or ImageFormat()),
    )
    return net
