"""What a crossing of memory between torch, NumPy, CuPy and Numba costs: `python -m benchmarks.interchange`.

Each function of `ccgpu.interchange` is timed on one array of 64 channels of 97x97, which no crossing reads: the size
does not matter. For comparison, the same crossings by DLPack, and what a copy of the array takes.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from ccgpu import interchange
from ccgpu.train.runs import records

SHAPE = (1, 64, 97, 97)
BATCHES, CALLS = 101, 200  # the median of so many means of so many calls
Crossings = dict[str, Callable[[], object]]


def on_host() -> Crossings:
    """Return the crossings of host memory."""
    tensor = torch.zeros(SHAPE)
    array = np.zeros(SHAPE, np.float32)
    read_only = np.zeros(SHAPE, np.float32)
    read_only.flags.writeable = False
    crossings: Crossings = {
        "numpy_view": lambda: interchange.numpy_view(tensor),
        "tensor to NumPy by DLPack": lambda: np.from_dlpack(tensor),  # type: ignore[arg-type]
        "address": lambda: interchange.address(tensor),
        "from_numpy": lambda: interchange.from_numpy(array),
        "NumPy to tensor by DLPack": lambda: torch.from_dlpack(array),
        "from_any_numpy": lambda: interchange.from_any_numpy(array),
        "from_any_numpy, read-only": lambda: interchange.from_any_numpy(read_only),
        "from_exporter": lambda: interchange.from_exporter(array),
        "a copy": lambda: array.copy(),
    }
    return crossings


def on_simulator() -> Crossings:
    """Return the crossings to Numba's simulator."""
    tensor = torch.zeros(SHAPE)
    simulated = interchange.simulated_numba_array(tensor)
    return {
        "simulated_numba_array": lambda: interchange.simulated_numba_array(tensor),
        "from_simulated_numba": lambda: interchange.from_simulated_numba(simulated),
    }


def on_numba() -> Crossings:
    """Return the crossings between CUDA tensors and Numba."""
    tensor = torch.zeros(SHAPE, device="cuda")
    array = interchange.numba_array(tensor)
    return {
        "numba_array": lambda: interchange.numba_array(tensor),
        "from_numba": lambda: interchange.from_numba(array),
    }


def on_cupy() -> Crossings:
    """Return the crossings between CUDA tensors and CuPy."""
    importlib.import_module("cupy")
    tensor = torch.zeros(SHAPE, device="cuda")
    array = interchange.cupy_array(tensor)
    return {
        "cupy_array": lambda: interchange.cupy_array(tensor),
        "from_cupy": lambda: interchange.from_cupy(array),
        "from_exporter, CUDA": lambda: interchange.from_exporter(array),
        "address, CUDA": lambda: interchange.address(tensor),
    }


GROUPS = {"host": on_host, "simulator": on_simulator, "Numba": on_numba, "CuPy": on_cupy}


def crossings() -> Iterator[tuple[str, Crossings | str]]:
    """Yield the name of each group with its crossings, or with why they cannot be measured here."""
    for name, group in GROUPS.items():
        try:
            yield name, group()
        except (ImportError, RuntimeError, AssertionError, AttributeError) as error:
            yield name, (str(error).strip() or type(error).__name__).splitlines()[0]


def microseconds(crossings: Crossings, batches: int = BATCHES, calls: int = CALLS) -> dict[str, float]:
    """Return for each crossing the median, over batches of calls, of the microseconds that a call takes.

    The crossings take turns, so that another process slows all of them down.
    """
    times: dict[str, list[float]] = {name: [] for name in crossings}
    for _ in range(batches + 1):
        for name, crossing in crossings.items():
            start = time.perf_counter()
            for _ in range(calls):
                crossing()
            times[name].append((time.perf_counter() - start) / calls * 1e6)
    return {name: round(statistics.median(values[1:]), 3) for name, values in times.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="interchange", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--record", type=Path, metavar="FILE", help="append the times to this file of JSON lines")
    parser.add_argument("--batches", type=int, default=BATCHES, help="of calls, whose median counts (%(default)s)")
    flags = parser.parse_args(argv)
    if not torch.cuda.is_available():
        os.environ.setdefault("NUMBA_ENABLE_CUDASIM", "1")  # Numba looks at it when it is imported
    times, unmeasured = {}, {}
    for name, group in crossings():
        if isinstance(group, str):
            unmeasured[name] = group
            print(f"{name}: not measured ({group})")
        else:
            times |= (measured := microseconds(group, flags.batches))
            print("\n".join(f"{value:9.3f} us  {crossing}" for crossing, value in measured.items()))
    if flags.record is not None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        record = {"kind": "interchange", "microseconds": times, "unmeasured": unmeasured}
        records.append_record(flags.record, {**record, "shape": list(SHAPE), **records.circumstances(device)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
