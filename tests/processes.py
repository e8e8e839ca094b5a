"""Start the processes of a `torch.distributed` group for a test, and wait for them."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 600  # seconds: the processes share a core with whatever else the machine does


def alone() -> dict[str, str]:
    """Return the environment of a process without a group."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def environments(ranks: int) -> list[dict[str, str]]:
    """Return the environment of each rank of a new group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**alone(), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def run_together(arguments: Sequence[str], environments: Sequence[Mapping[str, str]]) -> list[tuple[int, str]]:
    """Run Python with these arguments in each environment at once; return each one's exit status and stderr."""
    running = [
        subprocess.Popen([sys.executable, *arguments], env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        for environment in environments
    ]
    try:
        errors = [process.communicate(timeout=TIMEOUT)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, text) for process, text in zip(running, errors, strict=True)]


def run_ranks(module: str, ranks: int, *arguments: str) -> list[tuple[int, str]]:
    """Run `python -m module ARGUMENTS` as the ranks of a group; return each one's exit status and stderr."""
    return run_together(["-m", module, *arguments], environments(ranks))
