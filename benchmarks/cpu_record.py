"""The record of a measurement on a CPU: a line of its circumstances, then one for each result."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ccgpu.models.weights import write_atomically
from ccgpu.train.runs import records


def write(path: Path, module: str, rows: Iterable[Mapping[str, Any]], **more: Any) -> None:
    """Write a record anew, as JSON lines.

    Args:
        path: the file.
        module: the command's module, in benchmarks/.
        rows: the results.
        more: further circumstances.
    """
    head = {
        "kind": "circumstances",
        "command": f"python -m benchmarks.{module} --record FILE",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        **more,
        **records.circumstances(torch.device("cpu")),
    }
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in (head, *rows)))
