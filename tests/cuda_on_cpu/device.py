"""Compile CUDA kernels with g++ and run them on this CPU, on NumPy arrays.

    library = compile(source, ["scale"])
    counts = library.launch("scale", 4, 128, struct.pack("PPi", x.ctypes.data, y.ctypes.data, n), 0,
                            [("x", x, False), ("y", y, True)])

README.md in this folder says what of a GPU the machine models.
"""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / "build" / "cuda_on_cpu"
HEADERS = sorted(path.name for path in HERE.glob("*.h"))
# -Og: a library runs for seconds, so that a higher optimisation takes longer to compile than it saves.
FLAGS = (
    *("-std=c++17", "-Og", "-g1", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-gnu-unique"),
    *("-fno-strict-aliasing", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused", "-fmax-errors=5"),
)
UNIT = "kernels.cu"  # the name of a source in messages
ORDERS = {"forward": 0, "reverse": 1}
KINDS = ("matrix_loads", "loads", "stores", "copies")


class DeviceError(RuntimeError):
    """A kernel does not compile, or has done something that the machine forbids."""


class NoCompiler(DeviceError):
    """There is no C++ compiler on this computer."""


class Wavefronts(NamedTuple):
    """Cycles of shared memory, and how many of them are due to bank conflicts."""

    wavefronts: int
    conflicts: int


class Counts(NamedTuple):
    """Bytes and operations of a launch. The wavefronts of shared memory are None unless they were counted."""

    bytes_read: int
    bytes_written: int
    matrix_multiplies: int
    matrix_loads: Wavefronts | None = None
    loads: Wavefronts | None = None
    stores: Wavefronts | None = None
    copies: Wavefronts | None = None


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("writable", ctypes.c_uint32),
    )


class _Request(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("thread_order", ctypes.c_uint32),
        ("block_order", ctypes.c_uint32),
        ("thread_seed", ctypes.c_uint64),
        ("block_seed", ctypes.c_uint64),
        ("count", ctypes.c_uint32),
        ("check_races", ctypes.c_uint32),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("number_of_buffers", ctypes.c_uint64),
        ("arguments", ctypes.c_char_p),
        ("argument_bytes", ctypes.c_uint64),
    )


class _Counts(ctypes.Structure):
    _fields_ = (
        ("bytes_read", ctypes.c_uint64),
        ("bytes_written", ctypes.c_uint64),
        ("matrix_multiplies", ctypes.c_uint64),
        ("wavefronts", ctypes.c_uint64 * 4),
        ("conflicts", ctypes.c_uint64 * 4),
    )


def _three(sizes: int | Sequence[int]) -> tuple[int, int, int]:
    given = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    x, y, z = (*given, 1, 1, 1)[:3]
    return x, y, z


def _order(order: str | int) -> tuple[int, int]:
    """Return an order as the machine's number for it and a seed."""
    if isinstance(order, int):
        return 2, order
    if order not in ORDERS:
        raise ValueError(f"launch: an order must be 'forward', 'reverse' or a seed, got {order!r}")
    return ORDERS[order], 0


class Library:
    """Compiled kernels."""

    def __init__(self, path: Path, source: str) -> None:
        self._library = ctypes.CDLL(str(path))
        self._lines = source.splitlines()

    def _quote(self, message: str) -> str:
        """Return a message with the text of the lines that it names: line numbers of a spliced source say little."""
        for number in dict.fromkeys(re.findall(rf"{UNIT}:(\d+)", message)):
            if 0 < int(number) <= len(self._lines):
                message += f"\n  {UNIT}:{number}: {self._lines[int(number) - 1].strip()}"
        return message

    def launch(
        self,
        entry: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        arguments: bytes,
        shared_bytes: int = 0,
        buffers: Sequence[tuple[str, np.ndarray, bool]] = (),
        order: str | int = "forward",
        count: bool = False,
        check_races: bool = True,
        block_order: str | int = "forward",
    ) -> Counts:
        """Run one kernel to its end.

        Args:
            entry: the kernel's name, one of those given to `compile`.
            grid, block: numbers of blocks and of threads, one to three each.
            arguments: the bytes of the kernel's only parameter, a struct.
            shared_bytes: dynamic shared memory of a block, at most 227 KB.
            buffers: (name, contiguous array, writable) of all global memory that the kernel may access.
            order: which ready thread runs first: "forward", "reverse", or random by this seed.
            count: also count the wavefronts of shared memory (slower).
            check_races: also look for races in shared memory and in the writable buffers (slower).
            block_order: the order of the blocks, in the same form.

        Raises:
            DeviceError: the kernel did something forbidden; the message names it, the source line, the block and the
                thread. Buffers are then partly written.
        """
        function = getattr(self._library, f"cuda_on_cpu_launch_{entry}")
        table = (_Buffer * len(buffers))()
        for row, (name, array, writable) in zip(table, buffers, strict=True):
            if not array.flags.c_contiguous:
                raise ValueError(f"launch: buffer {name!r} must be contiguous")
            if writable and not array.flags.writeable:
                raise ValueError(f"launch: buffer {name!r} must be a writable array")
            row.name, row.address, row.bytes, row.writable = name.encode(), array.ctypes.data, array.nbytes, writable
        thread_order, thread_seed = _order(order)
        blocks_order, block_seed = _order(block_order)
        request = _Request(
            *(_three(grid), _three(block), shared_bytes),
            *(thread_order, blocks_order, thread_seed, block_seed, count, check_races),
            *(table, len(buffers), arguments, len(arguments)),
        )
        counts = _Counts()
        message = ctypes.create_string_buffer(1024)
        if not function(ctypes.byref(request), ctypes.byref(counts), message, ctypes.c_size_t(len(message))):
            raise DeviceError(f"{entry}: {self._quote(message.value.decode())}")
        shared = [Wavefronts(*pair) for pair in zip(counts.wavefronts, counts.conflicts, strict=True)] if count else []
        return Counts(
            counts.bytes_read,
            counts.bytes_written,
            counts.matrix_multiplies,
            **dict(zip(KINDS, shared, strict=False)),
        )


@functools.cache
def compiler() -> str:
    """Return the path of g++.

    Raises:
        NoCompiler: there is none.
    """
    path = shutil.which("g++")
    if path is None:
        raise NoCompiler("cuda_on_cpu: g++ must be on the PATH to compile kernels for the CPU; install it")
    return path


@functools.cache
def _toolchain() -> str:
    """Return everything but the kernel's source that a compiled library depends on: compiler, flags and headers."""
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    headers = "".join((HERE / name).read_text() for name in (*HEADERS, "primitives.cuh"))
    return "\0".join((compiler(), version, platform.machine(), " ".join(FLAGS), headers))


def sanitizer_runtime() -> str | None:
    """Return the path of AddressSanitizer's library, which a process must preload to load sanitized kernels."""
    found = subprocess.run([compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    path = found.stdout.strip()
    return path if os.path.isabs(path) else None


def _build(source: str, path: Path, flags: Sequence[str]) -> None:
    """Compile a unit to the library `path`."""
    # The headers are half of a small library's work; g++ takes them compiled for the same flags alone.
    compiled = [f"-I{_compiled_headers()}"] if [*flags] == [*FLAGS] else []
    _compile(source, path, [*flags, *compiled, f"-I{HERE}"])


@functools.cache
def _compiled_headers() -> Path:
    """Return a folder with launch.h and all that it includes as g++ compiled it once, with `FLAGS`."""
    folder = CACHE / hashlib.sha256(_toolchain().encode()).hexdigest()[:32]
    path = folder / "launch.h.gch"
    if not path.exists():
        flags = [flag for flag in FLAGS if flag != "-shared"]
        _compile('#include "launch.h"\n', path, [*flags, f"-I{HERE}", "-x", "c++-header"])
    return folder


def _compile(source: str, path: Path, arguments: Sequence[str]) -> None:
    """Run g++ and write `path` atomically: other processes may build the same file at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unit, built = Path(folder) / "kernels.cpp", Path(folder) / path.name
        unit.write_text(source)
        command = [compiler(), *arguments, str(unit), "-o", str(built)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            errors = [line for line in result.stderr.splitlines() if "error" in line]
            raise DeviceError("compile: " + "\n".join(errors[:5] or result.stderr.splitlines()[:5]))
        built.replace(path)


@functools.cache
def _load(path: Path, source: str) -> Library:
    return Library(path, source)


def compile(source: str, entries: Sequence[str], sanitize: bool = False, definitions: Sequence[str] = ()) -> Library:
    """Return the compiled kernels of a source that uses this folder's primitives.cuh.

    `source` is one translation unit with `#include "primitives.cuh"`, or with the text of this folder's primitives.cuh
    instead. Every kernel takes one struct by value. The result is cached in build/cuda_on_cpu under a hash of
    everything that it depends on.

    Args:
        source: CUDA C++.
        entries: names of the kernels to launch, declared `extern "C" __global__`.
        sanitize: build with AddressSanitizer; the process must have its library preloaded (`sanitizer_runtime`).
        definitions: macros, "NAME" or "NAME=value".

    Raises:
        NoCompiler: there is no g++.
        DeviceError: the compiler's first errors; or `sanitize` without the library.
    """
    if sanitize and "libasan" not in Path("/proc/self/maps").read_text():
        raise DeviceError("compile: sanitize needs a process with libasan in LD_PRELOAD")
    flags = [*FLAGS, *(f"-D{definition}" for definition in definitions)]
    if sanitize:
        flags.append("-fsanitize=address")
    unit = "\n".join(
        ['#include "launch.h"', f'#line 1 "{UNIT}"', source, *(f"CUDA_ON_CPU_ENTRY({name})" for name in entries), ""]
    )
    key = hashlib.sha256("\0".join((_toolchain(), *flags, unit)).encode()).hexdigest()[:32]
    path = CACHE / f"{key}.so"
    if not path.exists():
        _build(unit, path, flags)
    return _load(path, source)
