"""Compile CUDA C++ to machine code of a GPU with NVRTC, NVIDIA's compiler as a library, on a computer without a GPU.

The extra `test-cuda` installs it. Its C interface (NVRTC's documentation, chapter "User interface") is called through
ctypes: six functions that have not changed since CUDA 11.1.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

COMPILATION_FAILED = 6  # NVRTC_ERROR_COMPILATION: the log says more
INSTALL = "pip install -e '.[test-cuda]'"


class NotInstalled(RuntimeError):
    """There is no NVRTC on this computer."""


class CompileError(RuntimeError):
    """The source does not compile for the target."""


class Compiled(NamedTuple):
    """The result of a compilation: the machine code, and the compiler's log."""

    code: bytes
    log: str


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """Load NVRTC, from the packages of pip, or from a CUDA installation.

    Raises:
        NotInstalled: there is none.
    """
    try:
        from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib
    except ImportError as error:
        raise NotInstalled(f"nvrtc: cuda-pathfinder must be installed; {INSTALL}") from error
    try:
        path = load_nvidia_dynamic_lib("nvrtc").abs_path
    except DynamicLibNotFoundError as error:
        raise NotInstalled(f"nvrtc: NVRTC must be installed; {INSTALL}") from error
    return ctypes.CDLL(path)


def _check(result: int, function: str) -> None:
    if result != 0:
        text = library().nvrtcGetErrorString
        text.restype = ctypes.c_char_p
        raise RuntimeError(f"nvrtc: {function} must succeed, got {text(result).decode()}")


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    """Return the bytes that nvrtcGet<what> gives, whose number nvrtcGet<what>Size gives."""
    size = ctypes.c_size_t()
    _check(getattr(library(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)), f"nvrtcGet{what}Size")
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(library(), f"nvrtcGet{what}")(program, buffer), f"nvrtcGet{what}")
    return buffer.raw


def compile_source(source: str, target: str, options: Sequence[str] = (), name: str = "source") -> Compiled:
    """Compile CUDA C++ and return the machine code for `target`, or PTX if the target is a virtual architecture.

    Args:
        source: the source with everything it includes; no header is looked for.
        target: "sm_90" for machine code, "compute_90" for PTX.
        options: further options of NVRTC.
        name: name of the source in messages.

    Raises:
        CompileError: with the compiler's messages.
        NotInstalled: there is no NVRTC.
    """
    nvrtc, program = library(), ctypes.c_void_p()
    created = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), f"{name}.cu".encode(), 0, None, None)
    _check(created, "nvrtcCreateProgram")
    try:
        words = [f"-arch={target}", *options]
        result = nvrtc.nvrtcCompileProgram(
            program, len(words), (ctypes.c_char_p * len(words))(*(word.encode() for word in words))
        )
        log = _read(program, "ProgramLog").rstrip(b"\0").decode()
        if result == COMPILATION_FAILED:
            raise CompileError(f"nvrtc: {name} must compile for {target}, got\n{log}")
        _check(result, "nvrtcCompileProgram")
        return Compiled(_read(program, "CUBIN" if target.startswith("sm_") else "PTX"), log)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@lru_cache(maxsize=1)
def version() -> str:
    """Return NVRTC's full version, for example "13.0.88".

    nvrtcVersion leaves out the last number, but a kernel's registers may change with it; the header of PTX has it.
    """
    ptx = compile_source("", "compute_75").code.decode()
    found = re.search(r"V(\d+\.\d+\.\d+)", ptx)
    if found is None:
        raise RuntimeError(f"nvrtc: the header of PTX must name the compiler's version, got {ptx[:300]!r}")
    return found[1]
