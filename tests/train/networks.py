"""A small network in a file of ours, whose logits and attention differ from place to place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ccgpu.models import checkpoint
from ccgpu.models.ccnet import CCNet
from ccgpu.models.labels import Labels
from ccgpu.train import camvid


def write_network(
    path: Path, labels: Labels | None = camvid.LABELS, prediction: dict[str, Any] | None = None, **options: Any
) -> CCNet:
    """Write it and return it in eval mode; with CamVid's classes unless options say otherwise."""
    torch.manual_seed(4)
    defaults = {"num_classes": camvid.LABELS.num_classes, "head_channels": 16, "gamma": 0.7}
    net = CCNet("resnet18", **{**defaults, **options}).eval()
    torch.nn.init.normal_(net.head.bottleneck[-1].weight)
    if net.head.cca is not None:
        for convolution in (net.head.cca.query_conv, net.head.cca.key_conv):
            torch.nn.init.normal_(convolution.weight)  # else all weights are about equal
    plain = None if labels is None else labels.as_plain()
    checkpoint.write(path, checkpoint.Checkpoint(net.config, net.state_dict(), plain, prediction or {}))
    return net
