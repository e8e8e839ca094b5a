"""How a command fails: one line on stderr that says what to do, and an exit status.

Status 1: the command failed while it ran. Status 2: bad flags, data or checkpoint, found before it ran. Status 130 and
143: the command was stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from ccgpu.models.image_files import BadImage
from ccgpu.models.prediction import NonFiniteScores
from ccgpu.train.distributed import is_main
from ccgpu.train.loaders import is_lost_loader
from ccgpu.train.runs import checkpoints

Prepared = TypeVar("Prepared")

# Exceptions that a wrong flag, dataset or checkpoint raises.
BAD_INPUT = (ValueError, OSError, ImportError, checkpoints.CheckpointError)
# A foreign file may also describe its network by values of a wrong type.
BAD_FILE = (*BAD_INPUT, TypeError)
# Exceptions that `failure` explains in one line, or raises again if they are bugs.
FAILURES = (BadImage, OSError, MemoryError, RuntimeError)


# How torch and the system name shared memory that cannot be had, or a loader that touched a missing page of it.
_SHARED_MEMORY = re.compile(r"shared memory|\(shm\)|</torch_|<filename not specified>|Bus error")


def run_command(
    command: str,
    prepare: Callable[[], Prepared],
    run: Callable[[Prepared], int],
    *,
    again: str,
    smaller: str,
    stopped: str = "stopped",
    refused: tuple[type[Exception], ...] = BAD_INPUT,
    explained: Mapping[type[Exception], int] | None = None,
    everywhere: bool = False,
) -> int:
    """Prepare a command and run it; report a failure in one line on stderr and return the exit status.

    Args:
        command: the command's name, for messages.
        prepare: reads flags, files and data; its result is passed to `run`.
        run: does the work and returns the exit status.
        again: advice on how to continue once the cause of a failure is gone.
        smaller: advice on how to use less memory.
        stopped: message after Ctrl-C.
        refused: exceptions of `prepare` that mean bad input, status 2.
        explained: exceptions of `run` whose message needs no addition -> exit status.
        everywhere: whether each of several processes prints its own failure; False: the first process alone prints.
    """
    try:
        try:
            prepared = prepare()
        except refused as error:
            return fail(command, str(error), 2)
        try:
            return run(prepared)
        except tuple(explained or ()) as error:
            statuses = [status for kind, status in (explained or {}).items() if isinstance(error, kind)]
            return fail(command, str(error), statuses[0])
    except FAILURES as error:
        return fail(command, failure(error, again=again, smaller=smaller), 1, everywhere=everywhere)
    except KeyboardInterrupt:
        return fail(command, stopped, 130)


def fail(command: str, message: str, status: int, *, everywhere: bool = False) -> int:
    """Print an error and return the exit status; `everywhere` prints it on all processes, not on the first alone."""
    if everywhere or is_main():
        print(f"{command}: {message}", file=sys.stderr)
    return status


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out, of the CPU or of a device; torch has no exception class for the former."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def failure(error: Exception, *, again: str, smaller: str) -> str:
    """Return in one line why a command failed while it ran, and what to do.

    Args:
        error: one of `FAILURES`, raised in this process or, with its traceback in the message, in a loader's.
        again: advice on how to continue once the cause is gone.
        smaller: advice on how to use less memory.

    Raises:
        RuntimeError: `error` itself, if it is a bug, whose traceback is needed.
    """
    text = str(error)
    if text.startswith("Caught "):
        text = text.rpartition(f"{type(error).__name__}: ")[2].strip()
        # torch makes a reference cycle of such an error and its loader, which would keep the loader's processes alive.
        traceback.clear_frames(error.__traceback__)
    # Some of these are recognised by their text, because torch has no exception class for them.
    first = text.partition("\n")[0]
    if is_out_of_memory(error):
        return f"out of memory ({first}); {smaller}"
    if isinstance(error, (OSError, RuntimeError)) and _SHARED_MEMORY.search(text):
        return (
            f"shared memory ran out, through which loader processes hand over images ({first.strip()}); give a "
            f"container more of it with --shm-size 8g or --ipc=host, or add --workers 0, then {again}"
        )
    if "Too many open files" in text or "items of ancdata" in text:
        return f"too many open files ({first.strip()}); raise ulimit -n or lower --workers, then {again}"
    if isinstance(error, (BadImage, OSError)):
        return f"{text} Then {again}" if text.endswith(".") else f"{text}; make room or give access, then {again}"
    if isinstance(error, NonFiniteScores):
        return text
    if is_lost_loader(error):
        return f"a loader's process ended ({first.strip()}); if memory ran out, lower --workers, then {again}"
    if isinstance(error, torch.distributed.DistError) or "by peer" in text:
        return f"another process ended ({first.partition('. ')[0]}); see its message"
    raise error
