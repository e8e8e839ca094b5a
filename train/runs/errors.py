"""What a user is told where a command cannot start or stops in the middle: one line and an exit status."""

from __future__ import annotations

import sys
import traceback

import torch

from ccgpu.models.image_files import BadImage
from ccgpu.train.distributed import is_main
from ccgpu.train.runs import checkpoints

# What a wrong flag, dataset or checkpoint raises before anything runs: told in one line, exit status 2.
BAD_INPUT = (ValueError, OSError, ImportError, checkpoints.CheckpointError)
# What `failure` tells later, in one line, where it is no mistake of the program's: exit status 1.
FAILURES = (BadImage, OSError, MemoryError, RuntimeError)


def fail(command: str, message: str, status: int, *, everywhere: bool = False) -> int:
    """Print an error, on the first process or `everywhere` (what not all processes meet); return the exit status."""
    if everywhere or is_main():
        print(f"{command}: {message}", file=sys.stderr)
    return status


def failure(error: Exception, *, again: str, smaller: str) -> str:
    """Return what to tell of an error that stopped a command between its images.

    Args:
        error: one of `FAILURES`, from this process or, with its traceback as torch's loader puts it, from another.
        again: how to go on when the cause is gone.
        smaller: how to do with less memory.

    Raises:
        RuntimeError: `error` itself, where it is a mistake of the program's and its traceback is wanted.
    """
    text = str(error)
    if text.startswith("Caught "):
        text = text.rpartition(f"{type(error).__name__}: ")[2].strip()
        # torch ties such an error into a circle with its loader, whose processes would stay.
        traceback.clear_frames(error.__traceback__)
    # torch has no class of its own for some of these.
    first = text.partition("\n")[0]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in text:
        return f"out of memory ({first}); {smaller}"
    if isinstance(error, (BadImage, OSError)):
        return f"{text} Then {again}" if text.endswith(".") else f"{text}; make room or give access, then {again}"
    if text.startswith("DataLoader worker"):
        return f"a loader's process ended ({first.strip()}); if memory ran out, lower --workers, then {again}"
    if isinstance(error, torch.distributed.DistError) or "by peer" in text:
        return f"another process ended ({first.partition('. ')[0]}); it tells why"
    raise error
