"""What is said while kernels are compiled: on a terminal, to the logger, or nothing."""

import io
import logging
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ccgpu.kernels import compilation
from ccgpu.kernels.compilation import Compilation, told

ROOT = Path(__file__).resolve().parents[2]
# One kernel in one dtype, because that compiles in a few seconds.
PROGRAM = """
import logging, sys
if sys.argv[1:]:
    logging.getLogger("ccgpu").setLevel(sys.argv[1])
import numpy as np
from ccgpu.kernels.numba_cpu import calls
q = np.ones((1, 5, 4, 6), np.float32)
calls.affinity(q, q)
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _nothing_configured(monkeypatch):
    """A logger without the handlers of pytest, which stand at the root logger."""
    logger = logging.Logger("ccgpu")
    logger.parent = logging.RootLogger(logging.WARNING)
    monkeypatch.setattr(compilation, "LOGGER", logger)
    monkeypatch.delenv(compilation.QUIET, raising=False)


def test_a_terminal_is_told_once_for_what_is_compiled_together(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    kernels = Compilation()
    kernels.end()
    assert sys.stderr.getvalue() == ""
    for _ in range(3):
        kernels.begin("kernels")
    kernels.end()
    kernels.end()
    assert sys.stderr.getvalue() == "ccgpu: compiling kernels\nccgpu: compiled in 0 s\n"


@pytest.mark.parametrize("level", [logging.WARNING, logging.INFO])
def test_the_loggers_level_decides(level, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    compilation.LOGGER.addHandler(handler)
    compilation.LOGGER.setLevel(level)
    Compilation().begin("kernels")
    assert said == (["ccgpu: compiling kernels"] if level == logging.INFO else [])
    assert sys.stderr.getvalue() == ""


@pytest.mark.parametrize(("value", "quiet"), [("1", True), ("0", False), ("", False)])
def test_the_environment_silences(value, quiet, monkeypatch):
    monkeypatch.setenv("CCGPU_QUIET", value)
    monkeypatch.setattr(sys, "stderr", Terminal())
    Compilation().begin("kernels")
    assert (sys.stderr.getvalue() == "") is quiet


def test_nothing_is_said_where_nobody_looks(monkeypatch, capsys):
    Compilation().begin("kernels")
    monkeypatch.setattr(sys, "stderr", None)  # as of a process without a console
    Compilation().begin("kernels")
    monkeypatch.undo()
    assert capsys.readouterr().err == ""


def test_told_speaks_of_what_takes_long_alone(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with told("at once"):
        pass
    monkeypatch.setattr(compilation, "PATIENCE", 0.01)
    with told("slowly"):
        time.sleep(0.3)
    assert sys.stderr.getvalue() == "ccgpu: compiling slowly\nccgpu: compiled in 0 s\n"


def shown_on_a_terminal(cache, *arguments, **environment):
    """Run PROGRAM with stderr on a pseudo-terminal and return what appears there."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=ROOT,
        env={**os.environ, "NUMBA_CACHE_DIR": str(cache), **environment},
        stderr=theirs,
    ) as process:
        os.close(theirs)
        text = b""
        while select.select([ours], [], [], 120)[0]:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other end was closed
                break
            if not part:
                break
            text += part
    os.close(ours)
    assert process.returncode == 0, text
    return text.decode().splitlines()


def test_the_first_process_says_that_it_compiles_and_the_second_loads(tmp_path):
    begun, ended = shown_on_a_terminal(tmp_path)
    assert begun == f"ccgpu: compiling CPU kernels, once for this machine; they are kept in {tmp_path}"
    assert ended.startswith("ccgpu: compiled in ")
    assert shown_on_a_terminal(tmp_path) == []


@pytest.mark.slow
def test_it_is_silenced(tmp_path):
    assert shown_on_a_terminal(tmp_path / "a", CCGPU_QUIET="1") == []
    assert shown_on_a_terminal(tmp_path / "b", "WARNING") == []
