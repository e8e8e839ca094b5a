"""Ctrl-C and SIGTERM, deferred until a command can stop without loss, e.g. after writing a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class DeferredInterrupts:
    """Within a `with` block, note the first SIGINT or SIGTERM instead of raising; a second one acts at once.

    Calling the object returns whether a signal came. Only the main thread can set handlers; in another thread the block
    does nothing.

    Attributes:
        exit_status: 128 + the signal's number, as shells report it: 130 for Ctrl-C.
    """

    def __init__(self) -> None:
        self.exit_status = 128 + signal.SIGINT
        self._received = False
        self._former_handlers: dict[int, Any] = {}

    def __enter__(self) -> DeferredInterrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former_handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def __call__(self) -> bool:
        """Return whether the user or the system asked to stop."""
        return self._received

    def _note(self, number: int, _: FrameType | None) -> None:
        self._received = True
        self.exit_status = 128 + number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._former_handlers.items():
            signal.signal(number, handler)
        self._former_handlers.clear()
