"""A reader of the documentation, who does what the blocks of a page say, in their order, in a folder of their own.

Python runs unchanged; a block with a title is saved under that name. A command runs in this process, with flags added
at its end that make it small (where a flag is given twice, the last one counts). "PATH" stands for the folder of the
command's dataset and is replaced by a synthetic one.
"""

from __future__ import annotations

import configparser
import contextlib
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.run import get_args_parser

from ccgpu.train.__main__ import main as ccgpu
from tests.train.narrow import NARROW

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(\w*)(?: title=\"([^\"\n]*)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)

SMALL_RUN = [
    *("--crop", "33", "41", "--scenes", "6", "3", "--head-channels", "8", "--batch", "4", "--iterations", "2"),
    "--no-tensorboard",
]
HERE = ["--device", "cpu", "--workers", "0"]
# Flags for the datasets whose recipes set image sizes.
SMALL_RECIPES = {
    "ade20k": ["--random-short-sides", "48", "64", "--short-side", "64"],
    "voc": ["--random-short-sides", "64", "--short-side", "64"],
    "lip": ["--fit", "64", "64"],
    "cityscapes": ["--window", "65", "--stride", "49"],
}
# Flags for the presets that set more sizes.
_SIZES = ["--random-short-sides", "48", "--random-long-side", "96", "--short-side", "48", "--long-side", "96"]
SMALL_PRESETS = {
    "demo": ["--scenes-size", "72", "144"],  # a page looks at row 64, column 128 of an image
    "cpu": ["--short-side", "64"],
    "mmseg-512x1024": ["--auxiliary-channels", "8"],
    **{name: ["--auxiliary-channels", "8", *_SIZES] for name in ("mmseg-769", "mmseg-ade20k", "mmseg-voc")},
}
SMALL = {
    "evaluate": HERE,
    "predict": ["--device", "cpu"],
    "attention": ["--device", "cpu"],
    "cost": ["--sizes", "65x65", "--channels", "16", "--repeats", "1", "--device", "cpu"],
}
SHOWN = ("text", "math", "bibtex", "floors")  # languages of blocks that are not run; test_architecture.py reads floors
SETTING_UP = ("pip", "source")  # commands that change the reader's machine: checked, not run


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: where it starts, its language, its title, its text."""

    page: Path
    line: int
    language: str
    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Return a page's fenced blocks."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found[1], found[2] or "", found[3])
        for found in FENCE.finditer(text)
    ]


class Reader:
    """Follows blocks in the current folder.

    Args:
        data: name of a dataset -> the folder of a small one.
        leave_out: texts; commands and blocks of Python that contain one are not run.
    """

    def __init__(self, data: Callable[[str], Path], leave_out: Sequence[str] = ()) -> None:
        self.data, self.leave_out = data, leave_out
        self.names: dict[str, Any] = {"__name__": "reader"}

    def read(self, page: Path) -> None:
        """Follow all blocks of a page.

        Raises:
            AssertionError: a block of another language, or one that fails (see `follow`).
        """
        for block in blocks(page):
            if block.language not in SHOWN:
                assert block.language in ("python", "sh"), f"{block}: say python, sh or {', '.join(SHOWN)} after ```"
                self.follow(block)

    def follow(self, block: Block) -> None:
        """Do what a block says.

        Raises:
            AssertionError: a command that fails, or that is none of this project's.
        """
        if block.language == "sh":
            for command in commands(block.text):
                if not self.left_out(command):
                    self.command(command, block)
        elif block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif not self.left_out(block.text):
            exec(compile("\n" * block.line + block.text, str(block.page), "exec"), self.names)

    def left_out(self, text: str) -> bool:
        """Return whether a command or block is not to be run."""
        return any(part in text for part in self.leave_out)

    def command(self, command: str, block: Block) -> None:
        """Run a command of a shell."""
        words = shlex.split(command, comments=True)
        with environment(words):
            if words[0] == "make":
                self.make(words[1:], block)
            elif words[0] in SETTING_UP:
                check_setting_up(words, block)
            elif words[0] == "torchrun":
                self.torchrun(words[1:], f"{block}: {command}")
            elif words[0] == "ccgpu":
                first = 3 if words[1] == "train" else 2  # arguments before the flags
                arguments = self.smaller(words[first - 1], words[first:])
                run(ccgpu, [*words[1:first], *arguments], f"{block}: {command}")
            else:
                assert words[:2] == ["python", "-m"], f"{block}: no such command: {command}"
                own = words[2].partition(".")[0] in ("kernels", "models", "train")
                main = importlib.import_module(f"ccgpu.{words[2]}" if own else words[2]).main
                run(main, self.smaller(words[2], words[3:]), f"{block}: {command}")

    def torchrun(self, words: list[str], what: str) -> None:
        """Start a training command or a saved script on two processes; check the flags of one for several machines.

        Raises:
            AssertionError: it fails.
        """
        flags = get_args_parser().parse_args(words)
        if flags.module:
            assert flags.training_script == "ccgpu.train", what
            train, name, *rest = flags.training_script_args
            assert train == "train", what
            program = ["-m", "tests.train.narrow", train, name, *self.smaller(name, rest)]
        else:
            assert Path(flags.training_script).is_file(), what
            program = [flags.training_script, *flags.training_script_args]
        if flags.nnodes != get_args_parser().get_default("nnodes"):
            return
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": paths}
        done = subprocess.run([*launcher, *program], env=environment)
        assert done.returncode == 0, what

    def make(self, targets: list[str], block: Block) -> None:
        """Run the commands `ccgpu X` of a make target; of other targets only check that they exist."""
        shown = subprocess.run(["make", "-n", "-C", str(ROOT), *targets], capture_output=True, text=True)
        assert shown.returncode == 0, f"{block}: make {targets}: {shown.stderr}"
        for line in shown.stdout.splitlines():
            _, found, rest = line.partition("bin/ccgpu ")
            if found:
                self.command(f"ccgpu {rest}", block)

    def smaller(self, module: str, arguments: list[str]) -> list[str]:
        """Return the arguments with real folders instead of PATH, and flags at the end that make the command small."""
        name = module.rpartition(".")[2]
        dataset = name
        if "--dataset" in arguments:
            dataset = arguments[arguments.index("--dataset") + 1]
        elif "--checkpoint" in arguments:
            dataset = "cityscapes"
        arguments = [str(self.data(dataset)) if word == "PATH" else word for word in arguments]
        if name in SMALL:
            windows = (
                ["--window", "65", "--stride", "49"] if name == "evaluate" and "ccnet.safetensors" in arguments else []
            )
            return [*arguments, *SMALL[name], *windows]
        is_run = {"--data", "--preset", "--out"} & {*arguments} or Path(name).is_dir()
        if not is_run or name in ("convert", "export", "inspect"):
            return arguments
        if "--resume" in arguments and "--preset" not in arguments:
            shorter = ["--extend", "2"] if "--extend" in arguments else []
            return [*arguments, *shorter, *HERE]  # all other settings come from the resumed run
        more = [] if "package" in arguments else ["--backbone", NARROW]
        more += [] if "--preset" in arguments else ["--scenes-size", "64", "96"]
        if "--preset" in arguments:
            more += SMALL_PRESETS.get(arguments[arguments.index("--preset") + 1], [])
        return [*arguments, *SMALL_RUN, *SMALL_RECIPES.get(name, []), *more, *HERE]


def run(main: Callable[[list[str]], int], arguments: list[str], what: str) -> None:
    """Run a command in this process.

    Raises:
        AssertionError: it fails.
    """
    try:
        status: Any = main(arguments)
    except SystemExit as exit:  # of --help
        status = exit.code
    assert not status, f"{what}: status {status}"


def commands(text: str) -> list[str]:
    """Return the commands of a block, those on several lines joined, without comments."""
    return [line for line in text.replace("\\\n", " ").splitlines() if line.partition("#")[0].strip()]


@contextlib.contextmanager
def environment(words: list[str]) -> Iterator[None]:
    """Move the NAME=VALUE in front of a command into the environment while it runs."""
    before = dict(os.environ)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def check_setting_up(words: list[str], block: Block) -> None:
    """Check that a `pip install` names this project and extras that it has."""
    if words[0] != "pip":
        return
    assert words[1] == "install", f"{block}: {words}"
    declared = configparser.ConfigParser()
    declared.read(ROOT / "setup.cfg")
    for place in words[2:]:
        found = re.fullmatch(r"\.(?:\[(.+)\])?", place)
        assert found, f"{block}: {place} is not this project"
        for extra in found[1].split(",") if found[1] else []:
            assert extra in declared["options.extras_require"], f"{block}: no extra {extra}"
