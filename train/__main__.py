"""The command `ccgpu`: one subcommand for each thing that can be done, imported when it is asked for.

Without an install, `python -m ccgpu.train` in a checkout is the same command.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ccgpu.train.runs.parser import DATASETS
from ccgpu.version import __version__


class Command(NamedTuple):
    """A subcommand: the module with its `main`, and what it does in one line."""

    module: str
    summary: str


COMMANDS = {
    "train a network": {
        "train": Command("train", "train on a folder of images and masks, or on a dataset, and evaluate"),
        "inspect": Command("train.inspect", "show what a folder of images and masks holds, and what is wrong with it"),
        "evaluate": Command("train.evaluate", "compute a checkpoint's scores on a dataset"),
    },
    "use a network": {
        "predict": Command("train.predict", "segment images, folders of images and videos"),
        "attention": Command("train.attention", "draw what a pixel of an image attends to"),
        "export": Command("train.export", "write an ONNX model or a torch.export program"),
        "convert": Command("train.convert", "turn a published checkpoint into a file that needs no flags"),
    },
    "this machine": {
        "backends": Command("train.backends", "list what can compute the attention here"),
        "warmup": Command("warmup", "compile the kernels ahead"),
        "cost": Command("train.cost", "measure time and memory of each context module"),
    },
}
ALL = {name: command for group in COMMANDS.values() for name, command in group.items()}

TRAIN_HELP = f"""usage: ccgpu train FOLDER [flags]
       ccgpu train DATASET [flags]

Train CCNet and evaluate it.

  ccgpu train photos          a folder of your images and masks; `ccgpu inspect photos` shows what it holds
  ccgpu train cityscapes      a dataset: {", ".join(DATASETS)}; --data PATH names its folder
  ccgpu train my_dataset      a module of your own with a DATASET

A dataset's name always means the dataset; ./cityscapes is a folder of that name.
All flags: ccgpu train FOLDER --help, ccgpu train cityscapes --help"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status; 2 where there is no such subcommand."""
    words = [*(sys.argv[1:] if argv is None else argv)]
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if words else 2
    if words[0] == "--version":
        print(versions())
        return 0
    name, *rest = words
    if name not in ALL:
        print(unknown(name), file=sys.stderr)
        return 2
    # As `python -m` does: people's own modules with a dataset lie in the current folder. Last, so that no file there
    # is taken for a library.
    if not {"", os.getcwd()} & {*sys.path}:
        sys.path.append(os.getcwd())
    try:
        return train(rest) if name == "train" else run(ALL[name].module, rest)
    except KeyboardInterrupt:  # while libraries are imported, which takes seconds
        print(f"{name}: stopped", file=sys.stderr)
        return 130


def run(module: str, argv: Sequence[str]) -> int:
    """Run `ccgpu.MODULE`'s command and return its exit status."""
    status: int = importlib.import_module(f"ccgpu.{module}").main(argv)
    return status


def train(argv: Sequence[str]) -> int:
    """Train on what the first argument names: a dataset, a folder, or a module with a DATASET."""
    if not argv or argv[0] in ("-h", "--help"):
        print(TRAIN_HELP)
        return 0 if argv else 2
    what, *flags = argv
    if what in DATASETS:
        if os.path.isdir(what) and not {"--data", "--resume"} & {flag.split("=")[0] for flag in flags}:
            print(
                f"note: {what} is taken for the dataset, and the folder {what}/ here is not read; --data {what} reads"
                f" it as that dataset, ccgpu train ./{what} as a folder of images and masks",
                file=sys.stderr,
            )
        return run(f"train.{what}", flags)
    if os.path.isdir(what):
        return run("train.folder", ["--data", what, *flags])
    problem = no_module(what)
    if problem:
        print(f"train: {not_to_train_on(what, problem)}", file=sys.stderr)
        return 2
    from ccgpu.train.dataset import Dataset

    try:
        dataset = getattr(importlib.import_module(what), "DATASET", None)
    except ImportError as error:
        print(f"train: {what} must be a module that can be imported, got: {error}", file=sys.stderr)
        return 2
    if not isinstance(dataset, Dataset):
        print(f"train: {not_to_train_on(what, 'a module without one')}", file=sys.stderr)
        return 2
    from ccgpu.train import command

    return command.main(dataset, flags)


def no_module(name: str) -> str:
    """Return why a name cannot be that of a module; empty where it is one."""
    if os.path.isfile(name):
        return "which is a file"
    if not all(part.isidentifier() for part in name.split(".")):
        return "which is no folder"
    try:
        found = importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # of the package that holds it
        found = False
    return "" if found else "which is neither"


def not_to_train_on(what: str, problem: str) -> str:
    """Return the message for an argument that names nothing to train on."""
    parent = Path(what).parent
    folders = [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    near = [str(parent / name) for name in difflib.get_close_matches(Path(what).name, folders, n=2)]
    near += difflib.get_close_matches(what, DATASETS, n=1)
    hint = f"did you mean {' or '.join(near)}?" if near else "ccgpu train --help shows how to go on."
    return (
        f"the first argument must be a folder of images and masks, a dataset ({', '.join(DATASETS)}) or a module with "
        f"a DATASET, got {what!r}, {problem}; {hint}"
    )


def unknown(name: str) -> str:
    """Return the message for a word that is no subcommand."""
    near = difflib.get_close_matches(name.lower(), ALL, n=2)
    if name in DATASETS or os.path.isdir(name):
        near = [f"train {name}"]
    hint = f"did you mean ccgpu {' or ccgpu '.join(near)}?" if near else "ccgpu --help lists them."
    return f"ccgpu: the first argument must be a command, got {name!r}; {hint}"


def overview() -> str:
    """Return the help of `ccgpu`: the subcommands in their groups."""
    lines = ["usage: ccgpu COMMAND ...", "", "Semantic segmentation by criss-cross attention (CCNet)."]
    for title, group in COMMANDS.items():
        lines += ["", f"{title}:", *(f"  {name:<11}{command.summary}" for name, command in group.items())]
    return "\n".join([*lines, "", "ccgpu COMMAND --help shows a command's flags; ccgpu --version the versions."])


def versions() -> str:
    """Return the versions of ccgpu and of what it runs on, without importing torch."""
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = "not installed"
    return f"ccgpu {__version__} (Python {platform.python_version()}, torch {torch})"


if __name__ == "__main__":
    sys.exit(main())
