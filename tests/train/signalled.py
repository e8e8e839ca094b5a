"""The command `ccgpu` with the backbone `narrow`, which sends itself a signal at a moment of a training.

    python -m tests.train.signalled SIGKILL record 1 train cityscapes ...     once the record of step 1 is written
    python -m tests.train.signalled SIGKILL checkpoint 4 train cityscapes ... halfway through the checkpoint of step 4

A process that is sent a signal from outside, when its files show that it is time, may be past that moment by then.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from ccgpu.train.__main__ import main as ccgpu
from ccgpu.train.runs import checkpoints, records
from tests.train.narrow import teach


def send_at(number: signal.Signals, moment: str, step: int) -> None:
    """Send this process a signal at a moment, once."""
    append_record, write_partial = records.append_record, checkpoints.write_partial

    def append(path: Path, record: Any) -> None:
        append_record(path, record)
        if (moment, record["kind"], record["iteration"]) == ("record", "training", step):
            os.kill(os.getpid(), number)

    def write(path: Path, save: Any) -> Path:
        partial = write_partial(path, save)
        if moment == "checkpoint" and checkpoints.read_checkpoint(partial)["iteration"] == step:
            os.truncate(partial, partial.stat().st_size // 2)
            os.kill(os.getpid(), number)
        return partial

    records.append_record, checkpoints.write_partial = append, write


if __name__ == "__main__":
    teach(pytest.MonkeyPatch())
    send_at(signal.Signals[sys.argv[1]], sys.argv[2], int(sys.argv[3]))
    sys.exit(ccgpu(sys.argv[4:]))
