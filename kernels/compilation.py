"""What is said while kernels are compiled, which takes seconds: to the logger `ccgpu`, or on a terminal.

Each kernel is compiled once for a machine and kept on disk. While nothing is said, a first call looks as if it hung.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator

LOGGER = logging.getLogger("ccgpu")
QUIET = "CCGPU_QUIET"
PATIENCE = 1.0  # seconds: a kernel that is loaded from the disk takes less, one that is compiled more


def tell(message: str) -> None:
    """Log a message at INFO where that is asked for; otherwise print it if stderr is a terminal.

    A level or a handler of the logger `ccgpu` decides alone. The environment variable CCGPU_QUIET=1 silences both.
    """
    if os.environ.get(QUIET, "0") not in ("", "0"):
        return
    if LOGGER.isEnabledFor(logging.INFO) or LOGGER.level != logging.NOTSET or LOGGER.handlers:
        LOGGER.info("ccgpu: %s", message)
    elif sys.stderr is not None and sys.stderr.isatty():
        print(f"ccgpu: {message}", file=sys.stderr, flush=True)


class Compilation:
    """What is being compiled in this process; several threads may compile at once."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._lock = threading.RLock()  # a signal handler may compile on the thread that holds it

    def begin(self, what: str) -> None:
        """Tell that something is being compiled, unless that has been told and `end` has not been called since."""
        with self._lock:
            if self._began is not None:
                return
            self._began = time.perf_counter()
        tell(f"compiling {what}")

    def end(self) -> None:
        """Tell how long it took, if anything was compiled."""
        if self._began is None:
            return
        with self._lock:
            began, self._began = self._began, None
        if began is not None:
            tell(f"compiled in {time.perf_counter() - began:.0f} s")


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Tell that something is being compiled, and how long it took; nothing if it is there within `PATIENCE` seconds."""
    compilation = Compilation()
    timer = threading.Timer(PATIENCE, compilation.begin, (what,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        compilation.end()
