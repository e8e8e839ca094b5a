"""CSV files of results: one for each device, to which rows are only added, with what is needed to repeat them."""

from __future__ import annotations

import csv
import io
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from llvmlite import binding

from ccgpu.models.weights import write_atomically
from ccgpu.train.runs import records
from ccgpu.version import __version__

# LLVM's names of the vector units that decide how fast a CPU multiplies, and how the records call them.
VECTOR_UNITS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512bf16": "AVX-512-BF16", "amx-bf16": "AMX-BF16"}
FOLDER = Path(__file__).resolve().parent / "results"
Row = Mapping[str, object]


def device_name(device: torch.device) -> str:
    """Return the device's own name; for a CPU, its architecture, its vector units and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    features = binding.get_host_cpu_features()
    units = [title for name, title in VECTOR_UNITS.items() if features.get(name)]
    return ", ".join([" ".join([platform.machine(), *units]), f"{torch.get_num_threads()} threads"])


def path_for(device: torch.device, folder: Path = FOLDER) -> Path:
    """Return the file of a device, for example cca_nvidia-h100-80gb-hbm3.csv."""
    name = "cpu" if device.type == "cpu" else device_name(device).lower()
    return folder / f"cca_{re.sub('[^a-z0-9]+', '-', name).strip('-')}.csv"


def environment(device: torch.device, command: str, commit: str | None = None) -> dict[str, object]:
    """Return the columns that are the same in all rows of a run; pass `commit` if the tree has no git."""
    driver = cupy = triton = ""
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
        except (OSError, subprocess.CalledProcessError):
            driver = "unknown"
        cupy, triton = _version("cupy"), _version("triton")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or records.commit() or "unknown",
        "device": device_name(device),
        "driver": driver,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "cupy": cupy,
        "triton": triton,
        "ccgpu": __version__,
        "command": command,
    }


def _version(module: str) -> str:
    try:
        return str(__import__(module).__version__)
    except ImportError:
        return ""


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a file; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to a file, atomically; columns that only some rows have are empty in the others."""
    if not rows:
        return
    every = [*read(path), *rows]
    columns = list(dict.fromkeys(name for row in every for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(every)
    write_atomically(path, text.getvalue())
