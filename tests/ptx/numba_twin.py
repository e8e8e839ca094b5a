"""The Numba kernels on the executed PTX: compiled in another process, launched by kernels/numba_cuda/launch.py.

A kernel's parameters are flat (numba-cuda, `numba.cuda.dispatcher`, "prepare arguments"): an array is two null
pointers, the number of elements, their size, the address, the shape and the strides; a tuple is its elements.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

from tests.ptx import machine
from tests.ptx.memory import Buffer
from tests.ptx.parse import Kernel, parse

ROOT = Path(__file__).resolve().parents[2]
# The arguments that each kernel writes, by their number.
WRITTEN = {"forward": (3, 4), "backward": (7, 8, 9, 10), "affinity": (2,), "aggregate": (2,)}
WRITTEN |= {"aggregate_transposed": (2,), "copy": (1,)}


def print_ptx(wanted: list[list[str]]) -> None:
    """Compile for (dtype, GPU) pairs and print the PTX as JSON: {"kernel dtype": text}."""
    from numba import cuda
    from numba.core import types as kinds
    from numba.cuda import dispatcher

    from ccgpu.kernels.dtypes import energy_dtype
    from ccgpu.kernels.numba_cuda import launch
    from tests.nvrtc.test_numba_ptx import signatures

    # Numba compiles device functions for the current device, so one is faked.
    dispatcher.get_current_device = lambda: types.SimpleNamespace(compute_capability=(7, 5))
    texts = {}
    for name, gpu in wanted:
        dtype = np.dtype(name)
        shape = launch.DEVICE_SHAPES[energy_dtype(dtype).type]
        for kernel, (function, arguments) in signatures(shape, dtype).items():
            texts[f"{kernel} {name}"], _ = cuda.compile_ptx(
                function.py_func, kinds.void(*arguments), cc=(int(gpu[3]), int(gpu[4:]))
            )
    print(json.dumps(texts))


def compile_kernels(wanted: list[tuple[str, str]]) -> dict[str, Kernel]:
    """Return the kernels as {"kernel dtype": kernel}; this process may have Numba's simulator in the compiler's place.

    Raises:
        RuntimeError: the compilation failed.
    """
    environment = {name: x for name, x in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}
    code = f"from tests.ptx.numba_twin import print_ptx; print_ptx({wanted!r})"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )
    if answer.returncode:
        raise RuntimeError(f"compile_kernels: Numba must compile its kernels, got\n{answer.stderr}")
    texts = json.loads(answer.stdout.splitlines()[-1])
    return {name: next(iter(parse(text).values())) for name, text in texts.items()}


def _flat(argument: Any) -> bytes:
    """Return an argument as it lies among the parameters."""
    if isinstance(argument, np.ndarray):
        numbers = (0, 0, argument.size, argument.itemsize, argument.ctypes.data, *argument.shape, *argument.strides)
        return struct.pack(f"{len(numbers)}q", *numbers)
    if isinstance(argument, tuple):
        return b"".join(_flat(x) for x in argument)
    if isinstance(argument, np.floating):
        return argument.tobytes()
    return struct.pack("q", argument)


def _bytes(array: np.ndarray) -> np.ndarray:
    """Return the memory of an array of any strides without gaps, as bytes."""
    order = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
    return np.transpose(array, order).reshape(-1).view(np.uint8)


class PtxKernel:
    """Stands for a compiled Numba kernel: `kernel[grid, block, stream](*arguments)` executes its PTX."""

    def __init__(self, name: str, kernel: Kernel, **options: Any) -> None:
        self._name, self._kernel, self._options = name, kernel, options
        self._held: set[int] = set()  # addresses of results that earlier launches have written

    def __getitem__(self, configuration: tuple[Any, ...]) -> Any:
        grid, block = configuration[:2]
        threads = (*block, 1) if isinstance(block, tuple) else (block, 1, 1)

        def launch(*arguments: Any) -> None:
            written = WRITTEN[self._name]
            parameters, buffers = b"", []
            for number, argument in enumerate(arguments):
                flat = _flat(argument)
                step = 8 if len(flat) % 8 == 0 else 4
                parameters += b"\0" * (-len(parameters) % step) + flat
                if isinstance(argument, np.ndarray):
                    fresh = number in written and argument.ctypes.data not in self._held
                    buffers.append(Buffer(f"argument {number}", _bytes(argument), number in written, fresh))
            machine.run(self._kernel, (grid, 1, 1), threads, parameters, buffers, **self._options)
            self._held |= {arguments[number].ctypes.data for number in written}

        return launch
