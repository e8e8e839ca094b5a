"""The property tests of tests/ccgpu/test_ops.py on a GPU, for every backend and arithmetic."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ccgpu
from benchmarks.cases import precision
from benchmarks.first_gpu_run.values import poisoned_memory
from ccgpu.kernels import reference
from tests.ccgpu.problems import (
    MAPS,
    Problem,
    attend,
    attend_plainly,
    check_backend,
    check_errors,
    check_form,
    layouts,
    name_of,
    problems,
    row_of,
    truth_in_float64,
)
from tests.gpu.device import ARITHMETICS, DEVICE, gradients, inputs

# Lengths one below, at and one above multiples of 16, where the number of tiles, the configuration or the number of
# segments changes.
LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 79, 80, 81, 97, 112, 113, 128, 129, 144, 145, 192, 193, 256, 257]
LENGTHS += [400, 1000, 4096]
# D and C. Every class of D (16, 32, 64 ...) is another kernel to compile, so lengths are tested with D up to 16, and
# larger D with one size of map.
FEW_CHANNELS = [(1, 3), (3, 1), (7, 9), (9, 17), (9, 40), (16, 24), (16, 7)]
CHANNELS = [*FEW_CHANNELS, (8, 8), (17, 40), (40, 7), (64, 128), (128, 64), (256, 20)]


@pytest.mark.parametrize("name", ARITHMETICS)
@pytest.mark.parametrize("rank", MAPS)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_cca_matches_reference(backend, rank, name, data):
    arithmetic = ARITHMETICS[name]
    problem = data.draw(problems((arithmetic.dtype,), MAPS[rank]))
    with precision(name), poisoned_memory():
        check_backend(backend, problem, DEVICE, arithmetic.unit, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARITHMETICS)
@pytest.mark.parametrize("rank", MAPS)
@given(data=st.data())
@settings(max_examples=500, deadline=None)
def test_cca_matches_reference_sweep(backend, rank, name, data):
    test_cca_matches_reference.hypothesis.inner_test(backend, rank, name, data)


def check_size(backend, name, sizes, d, c, batch=2, layout="channels_last", seed=0):
    """Compare a backend with float64 on the GPU, on a map too large for the reference's loops."""
    arithmetic = ARITHMETICS[name]
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, n, *sizes) for n in (d, d, c, c))
    q, k, v, dout = (torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE) for shape in shapes)
    tensors = tuple(x.to(arithmetic.dtype) for x in (q * d**-0.25, k * d**-0.25, v))
    energies = torch.float64 if arithmetic.dtype == torch.float64 else torch.float32
    dlse = torch.randn(batch, *sizes, generator=generator, dtype=torch.float64).to(DEVICE, energies)
    tensors = tuple(layouts(x, layout) for x in tensors)
    problem = Problem(tensors, dout.to(arithmetic.dtype), dlse, 1.0)
    with precision(name), poisoned_memory():
        ours = attend(problem, backend)
        row = row_of(problem, backend, name)
        check_errors(ours, attend_plainly(problem), truth_in_float64(problem), problem, arithmetic.unit, row)
        check_form(ours, problem)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ARITHMETICS)
def test_lengths_around_tile_edges(backend, name, length):
    first, second, third = (FEW_CHANNELS[(LENGTHS.index(length) + i) % len(FEW_CHANNELS)] for i in range(3))
    check_size(backend, name, (length,), *first, batch=2 if length <= 400 else 1)
    if length <= 400:
        check_size(backend, name, (length, 5), *second)
        check_size(backend, name, (3, length), *third, layout="contiguous")


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("name", ARITHMETICS)
def test_channels(backend, name, channels):
    check_size(backend, name, (19, 34), *channels)


@pytest.mark.parametrize("sizes", [(97, 97), (65, 129), (129, 257), (40, 300), (5, 60, 80), (17, 16, 15)])
@pytest.mark.parametrize("name", ["bfloat16", "float16", "tf32", "float32"])
def test_sizes_of_networks(backend, name, sizes):
    check_size(backend, name, sizes, 64, 512, batch=2)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "reversed", "sliced"])
@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_layouts(backend, name, layout):
    check_size(backend, name, (33, 20), 17, 40, layout=layout)


def test_many_lines(backend, half):
    """More lines than a grid's second and third axis can count, 65,535."""
    check_size(backend, name_of(half), (3, 2), 8, 8, batch=30_000)


def test_offsets_beyond_two_to_the_31(backend, half):
    """The last of several images lies beyond element 2^31 of v."""
    free, _ = torch.cuda.mem_get_info()
    needed = 44 if backend == "numba_cuda" else 24  # numba_cuda holds results in float32 as well
    if free < needed * 2**30:
        pytest.skip(f"needs {needed} GB of free memory, and the device has {free / 2**30:.0f}")
    (q, k, v), dout = inputs((97, 97), 8, 512, half, batch=1)
    images = 2**31 // v.numel() + 2
    many = tuple(x.repeat(images, 1, 1, 1).contiguous(memory_format=torch.channels_last) for x in (q, k, v, dout))
    assert many[2].numel() > 2**31
    results = gradients(many[:3], many[3], backend)
    one = gradients((q, k, v), dout, backend)
    for a, b in zip(results, one, strict=True):
        for image in (0, images // 2, images - 1):
            torch.testing.assert_close(a[image : image + 1], b, rtol=2e-2, atol=2e-2)


def test_memory_is_poisoned():
    """The tests above rely on memory that is NaN until it is written."""
    with poisoned_memory():
        assert bool(torch.empty(1000, device=DEVICE).isnan().all())
        assert bool(torch.empty_like(torch.zeros(1000, device=DEVICE, dtype=torch.bfloat16)).isnan().all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("name", ARITHMETICS)
def test_non_finite_inputs_behave_as_the_reference(backend, name, which, value):
    (q, k, v), _ = inputs((4, 5), 4, 3, ARITHMETICS[name].dtype, last=False)
    tensors = {"q": q, "k": k, "v": v}
    tensors[which][1, 1, 2, 2] = value
    with precision(name):
        out, lse = (x.cpu().double() for x in ccgpu.cca(*tensors.values(), return_lse=True, backend=backend))
    wide = [x.cpu().double().numpy() for x in tensors.values()]
    truth, truth_lse = (torch.from_numpy(x) for x in reference.forward(*wide, 1.0))
    torch.testing.assert_close(out, truth, rtol=0.1, atol=0.05, equal_nan=True)
    torch.testing.assert_close(lse, truth_lse, rtol=0.1, atol=0.05, equal_nan=True)
    assert bool(torch.isfinite(out[0]).all())  # the other image is untouched


@pytest.mark.parametrize("name", ARITHMETICS)
def test_large_energies_do_not_overflow(backend, name):
    (q, k, v), _ = inputs((20, 33), 16, 24, ARITHMETICS[name].dtype)
    with precision(name):
        out, lse = ccgpu.cca(60 * q, 60 * k, v, return_lse=True, backend=backend)
    assert bool(torch.isfinite(out).all())
    assert bool(torch.isfinite(lse).all())
    assert float(out.abs().max()) <= 1.01 * float(v.abs().max())


def test_tf32_is_used_where_it_is_allowed(kernels):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no TF32")
    tensors, dout = inputs((33, 40), 64, 64)
    truth = gradients(tuple(x.double() for x in tensors), dout.double(), kernels)
    errors = {}
    for name in ("float32", "tf32"):
        with precision(name):
            results = gradients(tensors, dout, kernels)
        errors[name] = [float((a.double() - b).norm() / b.norm()) for a, b in zip(results, truth, strict=True)]
    assert max(errors["float32"]) < 1e-5
    assert all(1e-5 < error < 3e-3 for error in errors["tf32"][2:])
    assert 1e-5 < errors["tf32"][0] < 3e-3
