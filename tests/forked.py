"""Programs in a process of their own that begins with torch imported, because that import outlasts most of them.

A process imports torch once and forks for each program: what a program imports, sets or computes is gone with its
child. What is read while torch is imported (OMP_NUM_THREADS) cannot be set for a program.
"""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 300  # seconds: the process shares a core with whatever else the machine does
SERVER = """
import json, os, sys, traceback
import torch

for line in sys.stdin:
    program, environment, out, err = json.loads(line)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for number, path in ((0, os.devnull), (1, out), (2, err)):
                os.dup2(os.open(path, os.O_RDWR), number)
            os.environ.clear()
            os.environ.update(environment)
            exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Answer(NamedTuple):
    """The exit status of a program, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


@functools.cache
def _server() -> subprocess.Popen[bytes]:
    """Start the process that forks; it ends with this one, which holds the other end of its input."""
    return subprocess.Popen(
        [sys.executable, "-c", SERVER],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )


def run_forked(program: str, **environment: str) -> Answer:
    """Run a program after `import torch`, with these environment variables beside those of this process.

    Raises:
        TimeoutError: it did not end.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder) / name for name in ("out", "err"))
        out.touch()
        err.touch()
        request = textwrap.dedent(program), {**os.environ, **environment}, str(out), str(err)
        server.stdin.write(json.dumps(request).encode() + b"\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], TIMEOUT)[0]:
            os.killpg(server.pid, signal.SIGKILL)
            _server.cache_clear()
            raise TimeoutError(f"the program did not end within {TIMEOUT} seconds: {err.read_text()}")
        return Answer(int(server.stdout.readline()), out.read_text(), err.read_text())
