"""All settings of every training command, in its recipe and its demo: whoever changes them changes results."""

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ccgpu.train import ade20k, camvid, cityscapes, command, far_context, lip, voc
from ccgpu.train.loaders import available_cores
from ccgpu.train.runs.settings import training as settings
from ccgpu.train.runs.settings.run import PRESETS
from ccgpu.train.runs.settings.training import Settings
from tests.train.training import COMMANDS, name_of

# The paper's recipe for Cityscapes: what a setting is where neither recipe nor preset names it.
DEFAULTS: dict[str, Any] = {
    "preset": None,
    "data": None,
    "train_split": ("train",),
    "val_split": ("val",),
    "scenes": (400, 60),
    "scenes_size": (512, 1024),
    "markers": 1,
    "exif": None,
    "value_range": None,
    "max_pixels": 178956970,  # Pillow's own limit
    "check": True,
    "clip": 1,
    "backbone": "resnet101",
    "stem": None,
    "halved_dilation": False,
    "ceil_mode": True,
    "normalisation": "imagenet",
    "imagenet": None,
    "init": None,
    "context": "rcca",
    "recurrence": None,
    "gamma": 0.0,
    "recompute": False,
    "nonlocal_form": "sdpa",
    "head_channels": 512,
    "auxiliary_channels": None,
    "activation": "leaky_relu",
    "dropout": 0.1,
    "align_corners": True,
    "head_init": "torch",
    "auxiliary_weight": 0.4,
    "class_weights": (),
    "label_smoothing": 0.0,
    "focal": None,
    "loss_average": "labelled",
    "dice": 0.0,
    "ohem": None,
    "ccl": False,
    "ccl_weights": (1.0, 1.0, 0.001),
    "ccl_margins": (0.5, 1.5),
    "ccl_form": "piecewise",
    "crop": (769, 769),
    "random_short_sides": (),
    "fit_crop": False,
    "random_long_side": None,
    "random_scale": (0.75, 2.0),
    "random_scale_step": 0.0,
    "cat_max_ratio": 1.0,
    "random_rotation": 0.0,
    "random_flip": True,
    "photometric": False,
    "iterations": 60000,
    "batch": 8,
    "accumulate": 1,
    "optimiser": "sgd",
    "lr": 0.01,
    "momentum": 0.9,
    "weight_decay": 0.0001,
    "schedule": "poly",
    "power": 0.9,
    "min_lr": 0.0,
    "warmup_steps": 0,
    "head_lr": 1.0,
    "clip_gradients": None,
    "ema": None,
    "freeze": None,
    "seed": 0,
    "amp": "off",
    "channels_last": False,
    "compile": False,
    "mode": "sliding",
    "window": (769, 769),
    "stride": (513, 513),
    "scales": (1.0,),
    "flip": False,
    "average": "logits",
    "short_side": None,
    "long_side": None,
    "fit": None,
    "baselines": False,
    "eval_every": 5000,
    "patience": 0,
    "save_every": 1000,
    "log_every": 50,
    "tensorboard": True,
    "wandb": False,
    "device": "auto",
    "workers": min(4, available_cores()),
}
ADE20K = {
    "train_split": ("training",),
    "val_split": ("validation",),
    "scenes_size": (384, 512),
    "ccl": True,
    "crop": (512, 512),
    "random_short_sides": (300, 375, 450, 525, 600),
    "random_scale": (1.0, 1.0),
    "iterations": 160000,
    "batch": 16,
    "mode": "whole",
    "short_side": 450,
    "eval_every": 16000,
}
LIP = {
    "scenes_size": (320, 208),
    "ccl": True,
    "crop": (473, 473),
    "fit_crop": True,
    "random_scale": (0.75, 1.25),
    "iterations": 163190,
    "batch": 28,
    "lr": 0.007,
    "weight_decay": 0.0005,
    "mode": "whole",
    "fit": (473, 473),
    "eval_every": 10880,
}
VOC = {
    "train_split": ("train", "aug"),
    "scenes_size": (375, 500),
    "crop": (512, 512),
    "random_short_sides": (512,),
    "random_scale": (0.5, 2.0),
    "iterations": 20000,
    "batch": 16,
    "weight_decay": 0.0005,
    "mode": "whole",
    "short_side": 512,
    "eval_every": 2000,
}
CAMVID = {
    "scenes_size": (360, 480),
    "crop": (360, 480),
    "random_scale": (0.5, 2.0),
    "iterations": 10000,
    "mode": "whole",
    "eval_every": 1000,
}
FAR_CONTEXT = {
    "scenes": (1600, 200),
    "scenes_size": (128, 128),
    "backbone": "local",
    "gamma": 1.0,
    "head_channels": 64,
    "dropout": 0.0,
    "auxiliary_weight": 0.0,
    "crop": (128, 128),
    "random_scale": (1.0, 1.0),
    "iterations": 800,
    "optimiser": "adamw",
    "lr": 0.005,
    "channels_last": True,
    "mode": "whole",
    "eval_every": 0,
    "save_every": 200,
    "log_every": 20,
    "workers": 0,
}
# What the presets after mmsegmentation's configs have in common.
MMSEGMENTATION = {
    "backbone": "resnet50",
    "stem": "v1c",
    "halved_dilation": True,
    "ceil_mode": False,
    "auxiliary_channels": 256,
    "activation": "relu",
    "align_corners": False,
    "head_init": "mmsegmentation",
    "ccl": False,
    "loss_average": "all",
    "random_scale": (0.5, 2.0),
    "cat_max_ratio": 0.75,
    "photometric": True,
    "weight_decay": 0.0005,
    "schedule": "mmseg-poly",
    "min_lr": 0.0001,
    "mode": "whole",
    "average": "probabilities",
}
# What the demos of the three datasets of single images have in common.
DEMO = {
    "scenes": (160, 24),
    "backbone": "resnet18",
    "head_channels": 64,
    "iterations": 360,
    "batch": 4,
    "lr": 0.04,
    "channels_last": True,
    "baselines": True,
    "eval_every": 0,
    "save_every": 120,
    "log_every": 10,
    "workers": 0,
}
PINNED: list[tuple[ModuleType, str | None, dict[str, Any]]] = [
    (cityscapes, None, {}),
    (
        cityscapes,
        "demo",
        {**DEMO, "scenes_size": (128, 256), "crop": (97, 129), "random_scale": (0.75, 1.5), "mode": "whole"},
    ),
    (cityscapes, "paper", {}),
    (
        cityscapes,
        "authors",
        {"random_scale": (0.7, 2.1), "random_scale_step": 0.1, "normalisation": "authors"},
    ),
    (
        cityscapes,
        "mmseg-512x1024",
        {**MMSEGMENTATION, "crop": (512, 1024), "iterations": 40000, "eval_every": 4000},
    ),
    (
        cityscapes,
        "mmseg-769",
        {
            **MMSEGMENTATION,
            "align_corners": True,
            "random_short_sides": (1025,),
            "random_long_side": 2049,
            "iterations": 40000,
            "mode": "sliding",
            "short_side": 1025,
            "long_side": 2049,
            "eval_every": 4000,
        },
    ),
    (ade20k, None, ADE20K),
    (ade20k, "paper", ADE20K),
    (
        ade20k,
        "mmseg-ade20k",
        {
            **ADE20K,
            **MMSEGMENTATION,
            "random_short_sides": (512,),
            "random_long_side": 2048,
            "iterations": 80000,
            "short_side": 512,
            "long_side": 2048,
            "eval_every": 8000,
        },
    ),
    (
        ade20k,
        "demo",
        {
            **ADE20K,
            **DEMO,
            "scenes_size": (128, 192),
            "crop": (97, 129),
            "random_short_sides": (97, 113, 129, 145, 161),
            "short_side": None,
        },
    ),
    (lip, None, LIP),
    (lip, "paper", LIP),
    (lip, "demo", {**LIP, **DEMO, "scenes_size": (144, 96), "crop": (129, 97), "fit": (129, 97)}),
    (voc, None, VOC),
    (voc, "mmseg-voc", {**VOC, **MMSEGMENTATION, "random_long_side": 2048, "long_side": 2048}),
    (
        voc,
        "demo",
        {
            **VOC,
            **DEMO,
            "scenes_size": (128, 192),
            "crop": (97, 129),
            "random_short_sides": (),
            "random_scale": (0.75, 1.5),
            "short_side": None,
        },
    ),
    (camvid, None, CAMVID),
    (camvid, "paper", CAMVID),
    (
        camvid,
        "cpu",
        {
            **CAMVID,
            "backbone": "efficientnet-lite0",
            "head_channels": 128,
            "gamma": 1.0,
            "crop": (180, 240),
            "ohem": (0.7, 21600),
            "short_side": 270,
            "random_scale": (0.45, 1.0),
            "photometric": True,
            "iterations": 3000,
            "eval_every": 500,
            "optimiser": "adamw",
            "lr": 0.001,
            "weight_decay": 0.01,
            "ema": 0.998,
            "amp": "bf16",
            "channels_last": True,
            "save_every": 100,
            "log_every": 20,
            "workers": 0,
        },
    ),
    (
        camvid,
        "demo",
        {
            "scenes": (120, 20),
            "scenes_size": (96, 128),
            "clip": 3,
            "backbone": "resnet18",
            "head_channels": 64,
            "crop": (97, 129),
            "random_scale": (0.75, 1.5),
            "iterations": 300,
            "batch": 2,
            "lr": 0.04,
            "mode": "whole",
            "baselines": True,
            "eval_every": 0,
            "save_every": 100,
            "log_every": 10,
            "workers": 0,
        },
    ),
    (far_context, None, FAR_CONTEXT),
    (far_context, "demo", {**FAR_CONTEXT, "iterations": 2000, "baselines": True}),
]


@pytest.mark.parametrize(
    ("module", "preset", "changes"), PINNED, ids=[f"{module.DATASET.name}-{preset}" for module, preset, _ in PINNED]
)
def test_settings_of_each_preset_are_pinned(module: ModuleType, preset: str | None, changes: dict[str, Any]) -> None:
    values = command.presets(module.DATASET)[preset]
    assert dataclasses.asdict(Settings(**values)) == {**DEFAULTS, **changes}


def test_the_presets_are_those_of_the_datasets_and_each_is_pinned() -> None:
    has = {name: {name_of(module) for module in COMMANDS if name in module.DATASET.presets} for name in PRESETS}
    assert has == {name: set(datasets) for name, datasets in PRESETS.items()}
    all_of_them = {(name_of(module), name) for module in COMMANDS for name in command.presets(module.DATASET)}
    assert {(name_of(module), preset) for module, preset, _ in PINNED} == all_of_them


@pytest.mark.parametrize("module", COMMANDS, ids=name_of)
def test_presets_hold_settings_the_command_takes(module: ModuleType) -> None:
    for values in command.presets(module.DATASET).values():
        settings.check_settings(settings.Settings(**values), module.DATASET, 1, torch.device("cpu"))
    assert settings.Settings(**module.DATASET.recipe).preset is None
    assert command.presets(module.DATASET)["demo"].keys() >= {"iterations", "backbone"}


def test_defaults_are_the_recipe_of_the_paper() -> None:
    s = settings.Settings(**cityscapes.DATASET.recipe)
    assert (s.lr, s.momentum, s.weight_decay, s.power) == (1e-2, 0.9, 1e-4, 0.9)
    assert (s.batch, s.crop, s.iterations, s.random_scale, s.random_flip) == (8, (769, 769), 60000, (0.75, 2.0), True)
    assert (s.backbone, s.context, s.loops, s.head_channels) == ("resnet101", "rcca", 2, 512)
    assert (s.auxiliary_weight, s.dropout) == (0.4, 0.1)
    assert (s.mode, s.window, s.stride) == ("sliding", (769, 769), (513, 513))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"iteration": 20000}, "must hold settings, got 'iteration'; did you mean 'iterations'?"),
        ({"zzz": 1}, "must hold settings, got 'zzz'; --help lists all, as flags."),
        ({"crop": 512}, "got 'crop': 512; write a value of --crop, such as (769, 769)."),
        ({"crop": (512,)}, "got 'crop': (512,); write"),
        ({"crop": [512, 512]}, "got 'crop': [512, 512]; write"),
        ({"lr": "0.01"}, "got 'lr': '0.01'; write a value of --lr, such as 0.01."),
        ({"value_range": 4095}, "got 'value_range': 4095; write a value of --value-range."),
        ({"value_range": (0, "x")}, "got 'value_range': (0, 'x'); write"),
        ({"exif": "upside"}, "got 'exif': 'upside'; write"),
    ],
)
@pytest.mark.parametrize("kind", ["recipe", "preset demo"])
def test_a_recipe_that_no_flags_could_give_is_told_in_one_line(
    kind: str, recipe: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"recipe": recipe} if kind == "recipe" else {"presets": {"demo": recipe}}
    dataset = dataclasses.replace(camvid.DATASET, name="ponds", **changes)
    assert command.main(dataset, ["--out", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"train: Dataset: {kind} of ponds must hold ")
    assert message in line
    assert not (tmp_path / "run").exists()


def test_the_help_says_what_happens_without_a_flag() -> None:
    for field in dataclasses.fields(settings.Settings):
        if field.default is None or field.default == ():
            assert field.metadata["unset"], f"option(unset=) must say what no {field.name} means"
