"""PTX of the CUDA kernels by NVRTC, with the options that CuPy gives it, kept in build/ptx."""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import lru_cache
from pathlib import Path

from benchmarks import nvrtc
from benchmarks.registers import CUPY_OPTIONS
from ccgpu.kernels.cuda.configurations import OPTIONS, Configuration, source
from tests.ptx.parse import Kernel, parse

CACHE = Path(__file__).resolve().parents[2] / "build" / "ptx"


def text(code: str, target: str, name: str, options: tuple[str, ...] = (*OPTIONS, *CUPY_OPTIONS)) -> str:
    """Return the PTX of CUDA C++ for a virtual architecture such as "compute_90".

    Raises:
        nvrtc.CompileError, nvrtc.NotInstalled: as `nvrtc.compile_source`.
    """
    key = hashlib.sha256("\0".join((nvrtc.version(), target, *options, code)).encode()).hexdigest()[:32]
    path = CACHE / f"{key}.ptx"
    if not path.exists():
        compiled = nvrtc.compile_source(code, target, options, name).code
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=CACHE, delete=False) as file:
            file.write(compiled)
        os.replace(file.name, path)  # atomic: other processes may compile the same
    return path.read_text()


@lru_cache(maxsize=256)
def kernel(configuration: Configuration, target: str) -> Kernel:
    """Return a configuration's kernel as compiled for a virtual architecture."""
    return parse(text(source(configuration), target, configuration.entry))[configuration.entry]
