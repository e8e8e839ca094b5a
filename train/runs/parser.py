"""The parser of a command's flags, with hints for flags that it does not know."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

DATASETS = ("cityscapes", "ade20k", "voc", "lip", "camvid", "far_context")
"""What `ccgpu train NAME` takes for a dataset, also where a folder has that name."""


def command_parser(name: str, text: str | None, arguments: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of `ccgpu NAME`.

    Args:
        name: the words after `ccgpu`.
        text: the module's docstring, whose first line is the description.
        arguments: what the usage shows instead of all flags; None: all flags.
    """
    prog = f"ccgpu {name}"
    return _Parser(
        prog=prog,
        usage=None if arguments is None else f"{prog} {arguments}",
        description=(text or "").partition("\n")[0],
        allow_abbrev=False,
    )


class _Parser(argparse.ArgumentParser):
    """A parser that proposes the flags that an unknown one may stand for, and refuses empty values."""

    _words: Sequence[str] = ()  # the command line

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the flags; an error ends the process with status 2, as argparse does."""
        self._words = [*(sys.argv[1:] if args is None else args)]
        # No flag has an empty value, but a shell makes one of a variable that is not set; as a path it is this folder.
        for before, word in zip(["", *self._words], self._words, strict=False):
            if word == "" or (word.startswith("--") and word.endswith("=")):
                name = word[:-1] or before
                where = f"argument {name}: " if name.startswith("--") else ""
                self.error(f"{where}expected a value, got an empty one, as of a variable that is not set")
        found, unknown = self.parse_known_args(self._words, namespace)
        if unknown:
            self.error(
                f"unrecognized arguments: {' '.join(unknown)}{self._hint(unknown) or '; --help lists all flags'}"
            )
        return found

    def error(self, message: str) -> NoReturn:
        """Print a message and end the process; a flag that is missing may be there in another spelling."""
        if "arguments are required" in message:
            known = self._option_string_actions
            unknown = [word for word in self._words if word.startswith("--") and word.partition("=")[0] not in known]
            message += f"; got {' '.join(unknown)}{self._hint(unknown)}" if unknown else ""
        super().error(message)

    def _hint(self, unknown: Sequence[str]) -> str:
        words = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        near = [name for word in words for name in self._near(word)]
        return f"; did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""

    def _near(self, word: str) -> list[str]:
        """Return the flags that begin with a word, else those spelled like it, else those whose help has its words."""
        flags = [name for action in self._actions for name in action.option_strings]
        begun = [name for name in flags if len(word) > len("--") and name.startswith(word.lower())]
        spelled = difflib.get_close_matches(word.lower(), flags, n=1, cutoff=0.7)
        words = re.sub("[-_]+", " ", word).strip().lower().replace("color", "colour")
        phrase = re.compile(rf"\b{re.escape(words)}\b")
        named = [a.option_strings[0] for a in self._actions if a.option_strings and phrase.search(a.help or "")]
        return begun[:2] or spelled or named[:2]
