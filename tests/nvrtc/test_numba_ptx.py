"""numba-cuda compiles the Numba kernels for several generations of GPUs, on a machine without a GPU or the simulator.

The PTX must also have no array in local memory, since `Shape` is chosen so that the arrays fit in registers, no
function call, no float64 in kernels for float32, and as much shared memory as `Shape` says.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
GPUS = ("sm_75", "sm_80", "sm_90")
DTYPES = ("float16", "float32", "float64")
KERNELS = ("forward", "backward", "affinity", "aggregate", "aggregate_transposed", "copy")

pytestmark = [pytest.mark.nvrtc, pytest.mark.timeout(1800)]
if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("needs numba-cuda: pip install -e '.[test-cuda]'", allow_module_level=True)


def signatures(shape, dtype):
    """Return each kernel with the Numba types of its arguments."""
    import numba
    from numba import types as kinds

    from ccgpu.kernels.numba_cuda import calls, fused, stages
    from ccgpu.kernels.numba_cuda.schedule import phases

    phase, number = numba.typeof(phases((3, 4), 64)[0]), kinds.int64
    element, real = numba.from_dtype(dtype), numba.from_dtype(shape.real)
    x, wide, row = (kinds.Array(*a, "C") for a in ((element, 3), (real, 3), (real, 2)))
    forward, backward = fused.forward_kernel(shape), fused.backward_kernel(shape)
    affinity = stages.affinity_kernel(shape)
    sums = [stages.aggregate_kernel(shape, transposed) for transposed in (False, True)]
    strided = [kinds.Array(kind, 5, "A") for kind in (real, element)]
    return {
        "forward": (forward, (x, x, x, wide, row, number, number, phase, real, real)),
        "backward": (backward, (x, x, x, x, row, x, row, row, wide, wide, wide, number, number, phase, real, real)),
        "affinity": (affinity, (x, x, wide, number, phase)),
        "aggregate": (sums[0], (wide, x, wide, number, phase, real)),
        "aggregate_transposed": (sums[1], (wide, x, wide, number, phase, real)),
        "copy": (calls.copy_kernel(), (*strided, kinds.UniTuple(number, 3), number)),
    }


def print_ptx():
    """Compile everything and print it as JSON: {"kernel dtype gpu": PTX}."""
    import numpy as np
    from numba import cuda
    from numba.core import types as kinds
    from numba.cuda import dispatcher

    from ccgpu.kernels.dtypes import energy_dtype
    from ccgpu.kernels.numba_cuda import launch

    # Numba compiles device functions for the current device, so one is faked.
    dispatcher.get_current_device = lambda: types.SimpleNamespace(compute_capability=(7, 5))
    texts = {}
    for name in DTYPES:
        dtype = np.dtype(name)
        for kernel, (function, arguments) in signatures(launch.DEVICE_SHAPES[energy_dtype(dtype).type], dtype).items():
            for gpu in GPUS:
                capability = int(gpu[3]), int(gpu[4:])
                texts[f"{kernel} {name} {gpu}"], _ = cuda.compile_ptx(
                    function.py_func, kinds.void(*arguments), cc=capability
                )
    print(json.dumps(texts))


@pytest.fixture(scope="module")
def ptx():
    environment = {name: x for name, x in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}
    code = "from tests.nvrtc.test_numba_ptx import print_ptx; print_ptx()"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


def each(ptx):
    for kernel in KERNELS:
        for dtype in DTYPES:
            for gpu in GPUS:
                yield kernel, dtype, gpu, ptx[f"{kernel} {dtype} {gpu}"]


def test_kernels_compile_for_every_gpu(ptx):
    assert len(ptx) == len(KERNELS) * len(DTYPES) * len(GPUS)
    for kernel, _, gpu, text in each(ptx):
        assert f".target {gpu}" in text
        assert len(re.findall(r"\.visible \.entry", text)) == 1
        assert ("bar.sync" in text) == (kernel != "copy")


def test_kernels_keep_their_sums_in_registers(ptx):
    for *place, text in each(ptx):
        assert ".local" not in text, place
        assert not re.search(r"\bcall", text), place


def test_float32_is_not_computed_in_float64(ptx):
    for kernel, dtype, gpu, text in each(ptx):
        assert bool(re.search(r"\.f64\b", text)) == (dtype == "float64"), (kernel, dtype, gpu)


def test_shared_memory_is_what_the_shape_says(ptx):
    for kernel, dtype, _, text in each(ptx):
        size, tile = (8, 32) if dtype == "float64" else (4, 64)
        rows, sheet = tile * (32 + 1) * size, tile * (tile + 1) * size
        arrays = {"affinity": [rows, rows], "copy": []}.get(kernel, [rows, rows, sheet])
        if kernel.startswith("aggregate"):
            arrays = [rows, sheet]
        assert sorted(int(n) for n in re.findall(r"\.shared .*\[(\d+)\];", text)) == arrays
        assert sum(arrays) <= 48 * 1024
