"""Train CCNet on a folder of images and masks: `ccgpu train DIR`.

DIR holds images/ and masks/, or train/ and val/ with these, or images/train, masks/train and so on. Masks are ids or
colours; the classes come from the masks, from classes.txt, classes.csv or classes.json in DIR, or from --classes. What
was taken for what is printed before training, and written to dataset.txt in the run folder; `ccgpu inspect DIR` prints
it alone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ccgpu.train import command
from ccgpu.train.dataset import Opened
from ccgpu.train.runs.folder import NAME, FolderSettings, open_folder
from ccgpu.train.runs.initial import name_of_network
from ccgpu.train.runs.plan import Request

_FROM_DATA = "from the images"
_SHOWN = {
    **dict.fromkeys(("backbone", "imagenet", "crop", "batch", "iterations"), _FROM_DATA),
    **dict.fromkeys(("eval_every", "save_every", "log_every", "workers"), _FROM_DATA),
    **{"gamma": 1.0, "head_channels": 128, "mode": "whole"},
}
"""Defaults of flags that the help shows: those of `recipe_of`, as far as they are always the same."""


def default_out(flags: Mapping[str, Any]) -> Path:
    """Return the run folder for a command line without --out: runs/NAME, after DIR, with --init runs/NAME-from-FILE."""
    name = Path(flags.get("data") or NAME).resolve().name
    if flags.get("init") is not None:
        name += f"-from-{name_of_network(Path(flags['init']))}"
    return Path("runs") / (re.sub(r"[^\w.-]+", "-", name).strip("-.") or NAME)


def open_source(request: Request[FolderSettings], device: torch.device) -> Opened:
    """Return the dataset that the flags name, or the one of the run that is resumed; errors are `open_folder`'s."""
    checkpoint = request.checkpoint
    saved = None if checkpoint is None else checkpoint["folder"]
    if checkpoint is not None and saved is None:
        raise ValueError(
            f"--resume must name a run on a folder, got one of {checkpoint['dataset']} in {request.checkpoint_path}; "
            "continue it with the command that began it."
        )
    return open_folder(request.settings({}), saved, request.given, device, request.out)


SOURCE = command.Source(
    usage=("DIR", "[--out DIR] [flags]"),
    description="Train and evaluate CCNet on a folder of images and masks, whose layout, classes and recipe are found.",
    settings=FolderSettings,
    defaults=_SHOWN,
    presets={},
    default_out=default_out,
    unset={
        "data": "",  # DIR says it
        "out": "runs/NAME, NAME being that of DIR; with --init runs/NAME-from-FILE",
        # Of synthetic images and of videos.
        **dict.fromkeys(("preset", "scenes", "scenes_size", "markers", "clip"), ""),
        "value_range": "all values as stored",
        "classes": "classes.txt, .csv or .json in the folder, else the values that the masks hold",
    },
    argument=lambda request: str(request.settings({}).data),
    open=open_source,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see `command.main` for the exit status."""
    return command.main(SOURCE, argv)


if __name__ == "__main__":
    sys.exit(main())
