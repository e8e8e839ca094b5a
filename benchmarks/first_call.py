"""The seconds that the CPU kernels of a dtype take to compile: what `ccgpu warmup` prints with an empty cache."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOTAL = re.compile(r"([0-9.]+) s  for \d+ kernels")


def compile_seconds(dtype: str) -> float:
    """Return the seconds in which another process, whose cache is empty, compiles all CPU kernels of a dtype.

    Args:
        dtype: its name, for example "bfloat16".

    Raises:
        RuntimeError: the kernels cannot be compiled here; the message is the command's.
    """
    words = ["-m", "ccgpu.train", "warmup", "--device", "cpu", "--dtype", dtype]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
        ran = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    found = TOTAL.search(ran.stdout)
    if ran.returncode or found is None:
        raise RuntimeError(f"compile_seconds: `ccgpu warmup` must compile {dtype}, got: {ran.stderr.strip()}")
    return float(found[1])
