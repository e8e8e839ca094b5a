"""Settings that presets of several datasets share: those of the demos, and those of mmsegmentation's CCNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEMO: Mapping[str, Any] = {
    "scenes": (160, 24),
    "backbone": "resnet18",
    "head_channels": 64,
    "iterations": 360,
    "batch": 4,
    "crop": (97, 129),
    "lr": 0.04,
    "channels_last": True,
    "baselines": True,
    "eval_every": 0,
    "save_every": 120,
    "log_every": 10,
    "workers": 0,
}
"""Settings that the demos share; the demo of Cityscapes takes about 4 minutes on two CPU cores (AVX-512)."""

MMSEGMENTATION: Mapping[str, Any] = {
    "backbone": "resnet50",
    "stem": "v1c",
    "halved_dilation": True,
    "ceil_mode": False,
    "activation": "relu",
    "auxiliary_channels": 256,
    "align_corners": False,
    "head_init": "mmsegmentation",
    "ccl": False,
    "loss_average": "all",
    "random_scale": (0.5, 2.0),
    "cat_max_ratio": 0.75,
    "photometric": True,
    "lr": 1e-2,
    "weight_decay": 5e-4,
    "schedule": "mmseg-poly",
    "min_lr": 1e-4,
    "mode": "whole",
    "average": "probabilities",
}
"""Settings that mmsegmentation's configs of CCNet share, as far as they are not the defaults.

Source: configs/ccnet, configs/_base_/models/ccnet_r50-d8.py, configs/_base_/schedules of mmsegmentation. Crop, sizes of
images, batch and number of steps are those of each config.
"""

CPU: Mapping[str, Any] = {
    "backbone": "efficientnet-lite0",
    "head_channels": 128,
    "gamma": 1.0,
    "photometric": True,
    "batch": 8,
    "optimiser": "adamw",
    "lr": 1e-3,
    "weight_decay": 0.01,
    "ema": 0.998,
    "amp": "bf16",
    "channels_last": True,
    "log_every": 20,
    "workers": 0,
}
"""Settings of a training of about two hours on one CPU core, with `--imagenet package`.

Optimiser and learning rate are those of HyperSeg's training of an EfficientNet on CamVid (Nirkin et al., CVPR 2021, its
configs), with decoupled weight decay; the rest is ours. Gamma starts from 1, so that there is attention from the first
step; without attention `--context none --gamma 0` is the same training.
"""
