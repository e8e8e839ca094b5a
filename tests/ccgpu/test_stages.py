"""affinity and aggregate against tables computed by hand, the NumPy reference (any shape, layout, dtype) and cca."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import ccgpu
from ccgpu.bridges.torch_gemm import lines
from ccgpu.kernels import reference
from ccgpu.layouts import energy_dtype
from tests.ccgpu.problems import DTYPES, EPSILON, SIMULATED, cells, cpu_backends, quick_cells, try_examples
from tests.ccgpu.stage_problems import (
    CHECKS,
    criss_cross,
    inputs,
    numpy,
    plain_affinity,
    plain_aggregate,
    problems,
    staged,
    transposed,
)

BACKENDS = cpu_backends()
every_backend = pytest.mark.parametrize("backend", BACKENDS)
RANKS = [(5,), (3, 4), (2, 3, 3)]


# Tables computed by hand ----------------------------------------------------------------------------------------------

# A 2x3 map. The powers of ten name the query, the primes the key.
TABLE_Q = torch.tensor([[1.0, 10, 100], [1000, 10000, 100000]]).view(1, 1, 2, 3)
TABLE_K = torch.tensor([[2.0, 3, 5], [7, 11, 13]]).view(1, 1, 2, 3)


@every_backend
def test_affinity_hand_table(backend):
    energies = ccgpu.affinity(TABLE_Q, TABLE_K, backend=backend)
    assert energies.shape == (1, 4, 2, 3)
    expected = {  # first the rest of the column, then the whole row
        (0, 0): [7, 2, 3, 5],
        (0, 1): [110, 20, 30, 50],
        (0, 2): [1300, 200, 300, 500],
        (1, 0): [2000, 7000, 11000, 13000],
        (1, 1): [30000, 70000, 110000, 130000],
        (1, 2): [500000, 700000, 1100000, 1300000],
    }
    for (y, x), row in expected.items():
        assert energies[0, :, y, x].tolist() == row


@every_backend
def test_order_on_three_axes_hand_table(backend):
    sizes = (3, 3, 2)
    place = torch.arange(18.0).view(1, 1, *sizes)  # (t, y, x) is 6 t + 2 y + x
    energies = ccgpu.affinity(torch.ones(1, 1, *sizes), place, backend=backend)
    assert energies[0, :, 1, 0, 1].tolist() == [1, 13, 9, 11, 6, 7]  # T: 0, 2; H: 1, 2; W: 0, 1
    assert energies[0, :, 2, 1, 0].tolist() == [2, 8, 12, 16, 14, 15]  # T: 0, 1; H: 0, 2; W: 0, 1
    one = ccgpu.affinity(torch.ones(1, 1, 4), torch.arange(4.0).view(1, 1, 4), backend=backend)
    assert one[0, :, 2].tolist() == [0, 1, 2, 3]


@every_backend
def test_aggregate_hand_table(backend):
    weights = torch.zeros(1, 4, 2, 3)
    weights[0, :, 0, 0] = torch.tensor([1.0, 2, 3, 4])  # on (1, 0), (0, 0), (0, 1), (0, 2)
    weights[0, :, 1, 1] = torch.tensor([5.0, 6, 7, 8])  # on (0, 1), (1, 0), (1, 1), (1, 2)
    out = ccgpu.aggregate(weights, TABLE_K, backend=backend)
    first, second = 1 * 7 + 2 * 2 + 3 * 3 + 4 * 5, 5 * 3 + 6 * 7 + 7 * 11 + 8 * 13
    assert out[0, 0].tolist() == [[first, 0, 0], [0, second, 0]]


@every_backend
def test_aggregate_transposed_hand_table(backend):
    weights = torch.zeros(1, 4, 2, 3)
    weights[0, :, 0, 0] = torch.tensor([1.0, 2, 3, 4])  # to (1, 0), (0, 0), (0, 1), (0, 2)
    weights[0, :, 1, 1] = torch.tensor([5.0, 6, 7, 8])  # to (0, 1), (1, 0), (1, 1), (1, 2)
    y = transposed(weights, TABLE_K, backend)  # x is 2 at (0, 0) and 11 at (1, 1)
    assert y[0, 0].tolist() == [[2 * 2, 2 * 3 + 11 * 5, 2 * 4], [2 * 1 + 11 * 6, 11 * 7, 11 * 8]]


# Against the reference ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", CHECKS)
@pytest.mark.parametrize(("backend", "dtype", "rank"), cells())
def test_stage_matches_reference(stage, backend, dtype, rank):
    try_examples(CHECKS[stage], problems, backend, dtype, rank, 10)


@pytest.mark.slow
@pytest.mark.parametrize("stage", CHECKS)
@pytest.mark.parametrize(("backend", "dtype", "rank"), cells())
def test_stage_matches_reference_sweep(stage, backend, dtype, rank):
    try_examples(CHECKS[stage], problems, backend, dtype, rank, 200)


@pytest.mark.parametrize("stage", CHECKS)
@pytest.mark.parametrize("piece", [8, 8 * 49], ids=["one query", "one line"])
@given(problem=problems(dtypes=(torch.float64,)))
@settings(max_examples=40, deadline=None)
def test_stage_matches_reference_for_any_pieces(stage, piece, problem):
    """Maps too large for one piece: single queries or single lines at a time, one image at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "CPU_LIMITS", lines.Limits(piece=piece, cache=0, slab=2))
        patch.setattr(lines, "SMALL_IMAGE_ENERGIES", 10)
        CHECKS[stage]("cpu", problem)


def middle_truth(stage, a, b, w):
    if stage == "affinity":
        return plain_affinity(a, b)
    v = a.clone().requires_grad_()
    out = plain_aggregate(w, v)
    return out.detach() if stage == "aggregate" else torch.autograd.grad(out, v, a)[0]


@pytest.mark.parametrize("stage", CHECKS)
@pytest.mark.parametrize(("backend", "dtype"), quick_cells(DTYPES))
@pytest.mark.parametrize("sizes", [(17, 19), (70, 3), (1, 65), (5, 9, 11), (130,)])
def test_stage_of_middle_sizes_matches_float64(stage, backend, dtype, sizes):
    """Several lines and images in a piece, against einsum in float64 on the same rounded inputs."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(2, 24, *sizes, generator=generator).to(dtype) for _ in "ab")
    w = torch.randn(2, criss_cross(sizes), *sizes, generator=generator)
    w = w.to(energy_dtype(dtype))
    ours = {
        "affinity": lambda: ccgpu.affinity(a, b, backend=backend),
        "aggregate": lambda: ccgpu.aggregate(w, a, backend=backend),
        "transposed": lambda: transposed(w, a, backend),
    }[stage]()
    truth, scale = (middle_truth(stage, *(f(x.double()) for x in (a, b, w))) for f in (torch.clone, torch.abs))
    allowed = EPSILON[ours.dtype] * truth.abs() + 4 * EPSILON[w.dtype] * scale
    assert bool(((ours.double() - truth).abs() <= allowed).all())


@every_backend
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("sizes", RANKS)
def test_non_finite_inputs_behave_as_the_reference(backend, which, value, sizes):
    """Also at the centre, where the matrix of an axis has an entry that the reference does not have."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 3, *sizes, generator=generator, dtype=torch.float64) for _ in "ab")
    w = torch.randn(2, criss_cross(sizes), *sizes, generator=generator, dtype=torch.float64)
    at = (1, 1, *(s // 2 for s in sizes))
    for function, arguments in ((ccgpu.affinity, (a, b)), (ccgpu.aggregate, (w, b)), (transposed, (w, b))):
        tensors = [x.clone() for x in arguments]
        tensors[which][at] = value
        truth = getattr(reference, "aggregate_transposed" if function is transposed else function.__name__)
        ours = function(*tensors, backend=backend)
        np.testing.assert_allclose(ours.numpy(), truth(*numpy(*tensors)), rtol=1e-9, atol=1e-12)


# The same function as cca ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "sizes"),
    [(b, sizes) for b in BACKENDS for sizes in (*RANKS, (1, 4), (17, 20)) if b not in SIMULATED or sizes != (17, 20)],
)
def test_softmax_of_affinity_aggregated_is_cca(backend, sizes):
    q, k, v, _ = inputs(sizes)
    ours = ccgpu.aggregate(ccgpu.affinity(0.7 * q, k, backend=backend).softmax(1), v, backend=backend)
    out, lse = ccgpu.cca(q, k, v, scale=0.7, return_lse=True)
    torch.testing.assert_close(ours, out)
    torch.testing.assert_close(ccgpu.affinity(0.7 * q, k, backend=backend).logsumexp(1), lse)
    dout = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(ours, (q, k, v), dout), torch.autograd.grad(out, (q, k, v), dout), strict=True):
        torch.testing.assert_close(a, b)


def test_gradient_penalty_equals_ccas():
    results = []
    for function in (staged, lambda q, k, v: ccgpu.cca(q, k, v)):
        q, k, v, _ = inputs((4, 3))
        (dq,) = torch.autograd.grad(function(q, k, v).square().sum(), q, create_graph=True)
        results.append(torch.autograd.grad(dq.square().sum(), (q, k, v)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@every_backend
def test_aggregate_of_one_map_sums_the_criss_cross(backend):
    sums = ccgpu.aggregate(torch.ones(1, 8, 4, 5), torch.ones(1, 2, 4, 5), backend=backend)
    torch.testing.assert_close(sums, torch.full((1, 2, 4, 5), 8.0))


@every_backend
def test_transposed_is_the_adjoint_of_aggregate(backend):
    _, _, v, weights = inputs((3, 4, 2), grad=False)
    x = torch.randn_like(v)
    out, y = ccgpu.aggregate(weights, v, backend=backend), transposed(weights, x, backend)
    torch.testing.assert_close((out * x).sum(), (v * y).sum())
