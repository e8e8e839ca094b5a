"""What a run leaves behind: lines of JSON, each appended at once, so that a killed process leaves all its lines."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

STEPS, RECORDS, OUTPUT = "steps.jsonl", "records.jsonl", "output.log"
SKIPPED = 77  # exit status of a step that cannot run here; its last line of output is the reason
REASON_CHARACTERS = 400


def append(path: Path, row: Mapping[str, object]) -> None:
    """Append a row to a file as one line of JSON, by one write to the file's end."""
    line = json.dumps(row, default=str) + "\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def one_line(text: object) -> str:
    """Return the last line of a text that is not empty, cut to REASON_CHARACTERS."""
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return lines[-1][:REASON_CHARACTERS] if lines else ""


def skip(reason: str) -> NoReturn:
    """End this process as a step that cannot run here."""
    print(reason, flush=True)
    sys.exit(SKIPPED)


def need_kernels() -> None:
    """End this process as a skipped step where the CUDA kernels cannot run."""
    import torch

    import ccgpu

    if not torch.cuda.is_available():
        skip("torch sees no CUDA device")
    status = next(backend for backend in ccgpu.backends("cuda") if backend.name == "cupy")
    if not status.available:
        skip(str(status.reason))
