"""The PTX of the Numba kernels, executed on small maps, against the NumPy reference."""

import importlib.util
import math

import numpy as np
import pytest

from ccgpu.kernels import reference
from ccgpu.kernels.dtypes import energy_dtype
from ccgpu.kernels.numba_cuda import launch
from tests.ptx.numba_twin import PtxKernel, compile_kernels

pytestmark = [pytest.mark.nvrtc, pytest.mark.timeout(900)]
if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("needs numba-cuda: pip install -e '.[test-cuda]'", allow_module_level=True)

TARGETS = [("float16", "sm_90"), ("float32", "sm_80"), ("float64", "sm_75")]
DTYPES = [name for name, _ in TARGETS]
# The last map of float32 and float64 has one position more than a tile.
MAPS = {"float16": [(2, 2, 3)], "float32": [(5,), (3, 4), (2, 2, 3), (65,)], "float64": [(5,), (3, 4), (33,)]}
TOLERANCE = {"float16": 3e-6, "float32": 3e-6, "float64": 1e-13}


@pytest.fixture(scope="module")
def kernels():
    return compile_kernels(TARGETS)


@pytest.fixture
def on_ptx(kernels, monkeypatch):
    """A function that lets launch.py launch the executed kernels of a dtype."""

    def use(dtype, **options):
        def kernel(name):
            return PtxKernel(name, kernels[f"{name} {dtype}"], **options)

        monkeypatch.setattr(launch, "forward_kernel", lambda shape: kernel("forward"))
        monkeypatch.setattr(launch, "backward_kernel", lambda shape: kernel("backward"))
        monkeypatch.setattr(launch, "affinity_kernel", lambda shape: kernel("affinity"))
        monkeypatch.setattr(
            *(launch, "aggregate_kernel"),
            lambda shape, transposed: kernel("aggregate_transposed" if transposed else "aggregate"),
        )
        return launch.DEVICE_SHAPES[energy_dtype(np.dtype(dtype)).type]

    return use


def arrays(dtype, sizes, *channels):
    """Return random arrays (B, P, channels) for two images, or one of a long line."""
    generator = np.random.default_rng(len(sizes))
    images = 2 if math.prod(sizes) < 20 else 1
    return [generator.standard_normal((images, math.prod(sizes), n)).astype(dtype) for n in channels]


def as_map(x, sizes):
    """Return (B, P, channels) as float64 (B, channels, *sizes)."""
    return np.moveaxis(x.astype(np.float64).reshape(x.shape[0], *sizes, x.shape[2]), -1, 1)


def as_rows(x):
    """Return (B, channels, *sizes) as (B, P, channels)."""
    return np.moveaxis(x, 1, -1).reshape(x.shape[0], -1, x.shape[1])


def close(a, b, dtype):
    scale = np.abs(b).max()
    return bool(np.abs(a.astype(np.float64) - b).max() <= TOLERANCE[dtype] * scale * 30)


@pytest.mark.parametrize(("dtype", "sizes"), [(dtype, sizes) for dtype in DTYPES for sizes in MAPS[dtype]])
def test_forward_and_backward(on_ptx, dtype, sizes):
    shape, scale = on_ptx(dtype, lockstep=sizes != (5,), seed=len(sizes)), 0.5
    q, k, v, dout = arrays(dtype, sizes, 5, 5, 7, 7)
    real = shape.real
    out, lse = np.full(v.shape, np.nan, real), np.full(v.shape[:2], np.nan, real)
    launch.launch_forward(q, k, v, out, lse, sizes, scale, shape=shape)
    exact = [as_map(x, sizes) for x in (q, k, v)]
    truth, truth_lse = reference.forward(*exact, scale)
    assert close(out, as_rows(truth), dtype)
    assert close(lse, truth_lse.reshape(lse.shape), dtype)

    saved, dlse = out.astype(dtype), np.linspace(-1, 1, lse.size).reshape(lse.shape).astype(real)
    delta = np.full(lse.shape, np.nan, real)
    gradients = [np.full(x.shape, np.nan, real) for x in (q, k, v)]
    launch.launch_backward(q, k, v, saved, lse, dout, dlse, delta, *gradients, sizes, scale, shape=shape)
    wide = dlse.astype(np.float64).reshape(truth_lse.shape)
    expected = reference.backward(as_map(dout, sizes), *exact, truth, truth_lse, wide, scale)
    # delta = dout . out has the rounding of the saved out.
    rounding = 2.0**-10 if dtype == "float16" else 0.0
    for a, b in zip(gradients, expected, strict=True):
        error = np.abs(a.astype(np.float64) - as_rows(b)).max()
        assert error <= (90 * TOLERANCE[dtype] + 8 * rounding) * np.abs(b).max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(5,), (2, 2, 3)])
def test_stages(on_ptx, dtype, sizes):
    shape = on_ptx(dtype)
    number = sum(sizes) - len(sizes) + 1
    q, k, v, weights = arrays(dtype, sizes, 5, 5, 7, number)
    weights = weights.astype(shape.real)
    energies = np.full((*q.shape[:2], number), np.nan, shape.real)
    launch.launch_affinity(q, k, energies, sizes, shape=shape)
    assert close(energies, as_rows(reference.affinity(as_map(q, sizes), as_map(k, sizes))), dtype)
    for transposed, function in ((False, reference.aggregate), (True, reference.aggregate_transposed)):
        out = np.full(v.shape, np.nan, shape.real)
        launch.launch_aggregate(weights, v, out, sizes, transposed=transposed, shape=shape)
        assert close(out, as_rows(function(as_map(weights, sizes), as_map(v, sizes))), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_copy(kernels, dtype):
    """From any strides to any others, rounded to the dtype."""
    source = np.random.default_rng(0).standard_normal((2, 7, 1, 3, 4)).astype(energy_dtype(np.dtype(dtype)))
    source = np.moveaxis(source, 1, -1)
    target = np.full(source.shape, np.nan, dtype)
    PtxKernel("copy", kernels[f"copy {dtype}"])[24, 64, 0](source, target, source.shape[1:4], 7)
    assert np.array_equal(target, source.astype(dtype))
