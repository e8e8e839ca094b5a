"""Ctrl-C and SIGTERM, kept until a run is at a place where it can stop without loss."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class DeferredInterrupts:
    """Within a `with` block, note the first SIGINT or SIGTERM instead of raising; a second one acts at once.

    Calling the object tells whether one came. `exit_status` is 128 + the signal's number, as shells report
    it: 130 for Ctrl-C. Handlers belong to the main thread; in another thread signals are left alone.
    """

    def __init__(self) -> None:
        self.exit_status = 128 + signal.SIGINT
        self._received = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> DeferredInterrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()

    def __call__(self) -> bool:
        """Return whether the user or the system asked to stop."""
        return self._received

    def _note(self, number: int, _: FrameType | None) -> None:
        self._received = True
        self.exit_status = 128 + number
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former.clear()
