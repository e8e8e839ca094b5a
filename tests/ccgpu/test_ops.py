"""`ccgpu.cca` against the NumPy reference: values and gradients by every backend, for any shape, layout and dtype."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import ccgpu
from ccgpu.bridges.torch_gemm import lines
from ccgpu.kernels import reference
from tests.ccgpu.problems import (
    SLOW,
    Problem,
    attend,
    attend_plainly,
    cells,
    check_backend,
    check_errors,
    cpu_backends,
    expected,
    layouts,
    problems,
    quick_cells,
    row_of,
    run,
    truth_in_float64,
    try_examples,
)

BACKENDS = cpu_backends()
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.parametrize(("backend", "dtype", "rank"), cells())
def test_cca_matches_reference(backend, dtype, rank):
    try_examples(check_backend, problems, backend, dtype, rank, 20)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "dtype", "rank"), cells())
def test_cca_matches_reference_sweep(backend, dtype, rank):
    try_examples(check_backend, problems, backend, dtype, rank, 300)


@pytest.mark.parametrize("limits", ["one query", "one line", "recomputed", "slabs"])
@given(problem=problems(dtypes=(torch.float64,)))
@settings(max_examples=60, deadline=None)
def test_cca_matches_reference_for_any_pieces(limits, problem):
    """Maps too large for one piece: single queries, single lines, energies computed twice, slabs of 2 channels."""
    cut = {
        "one query": lines.Limits(piece=8, cache=0, slab=2),
        "one line": lines.Limits(piece=8 * 49, cache=0, slab=2),
        "recomputed": lines.Limits(piece=2**20, cache=0, slab=2),
        "slabs": lines.Limits(piece=8 * 100, cache=2**20, slab=2),
    }[limits]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "CPU_LIMITS", cut)
        patch.setattr(lines, "SMALL_IMAGE_ENERGIES", 10)
        ours = attend(problem, "cpu")
    check_errors(ours, attend_plainly(problem), expected(problem), problem, row=row_of(problem, "cpu"))


@pytest.mark.parametrize(("backend", "dtype"), quick_cells((torch.float32, torch.bfloat16, torch.float16)))
@pytest.mark.parametrize("sizes", [(17, 19), (33, 16), (1, 65), (5, 9, 11), (130,)])
def test_cca_of_middle_sizes_matches_float64(backend, dtype, sizes):
    """Sizes with several pieces and lines, against einsum in float64."""
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, 16, *sizes, generator=generator, dtype=torch.float64) * 0.5 for _ in "qk")
    v, dout = (torch.randn(2, 24, *sizes, generator=generator, dtype=torch.float64) for _ in "vd")
    tensors, dout = tuple(x.to(dtype) for x in (q, k, v)), dout.to(dtype)
    dlse = torch.randn(2, *sizes, generator=generator)
    problem = Problem(tensors, dout, dlse, 1.0)
    ours, row = attend(problem, backend), row_of(problem, backend)
    check_errors(ours, attend_plainly(problem), truth_in_float64(problem), problem, row=row)


# Properties -----------------------------------------------------------------------------------------------------------


def tensors_of(sizes, c=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, n, *sizes, generator=generator, dtype=dtype) for n in (4, 4, c))


@every_backend
@pytest.mark.parametrize("sizes", [(6,), (4, 5), (2, 3, 4)])
def test_weights_sum_to_one_on_the_criss_cross(backend, sizes):
    q, k, _ = tensors_of(sizes)
    n = math.prod(sizes)
    weights = ccgpu.cca(
        q, k, torch.eye(n, dtype=torch.float64).view(1, n, *sizes).expand(2, n, *sizes), backend=backend
    )
    torch.testing.assert_close(weights.sum(1), torch.ones(2, *sizes, dtype=torch.float64))
    for u in np.ndindex(*sizes):
        support = {tuple(int(a) for a in i) for i in weights[(0, slice(None), *u)].view(*sizes).nonzero()}
        assert support == set(reference.neighbours(u, sizes))


@every_backend
def test_translating_all_energies_changes_lse_only(backend):
    q, k, v = tensors_of((4, 5))
    q = torch.cat([q, torch.ones_like(q[:, :1])], 1)
    out, lse = ccgpu.cca(q, torch.cat([k, torch.zeros_like(k[:, :1])], 1), v, return_lse=True, backend=backend)
    out2, lse2 = ccgpu.cca(q, torch.cat([k, torch.full_like(k[:, :1], 7.0)], 1), v, return_lse=True, backend=backend)
    torch.testing.assert_close(out2, out)
    torch.testing.assert_close(lse2, lse + 7.0)


@every_backend
def test_permuting_rows_commutes(backend):
    tensors = tensors_of((4, 5))
    rows = torch.tensor([2, 0, 3, 1])
    permuted = ccgpu.cca(*(x[:, :, rows] for x in tensors), backend=backend)
    torch.testing.assert_close(permuted, ccgpu.cca(*tensors, backend=backend)[:, :, rows])


@every_backend
def test_transposing_the_map_commutes(backend):
    tensors = tensors_of((4, 5))
    transposed = ccgpu.cca(*(x.transpose(2, 3) for x in tensors), backend=backend)
    torch.testing.assert_close(transposed, ccgpu.cca(*tensors, backend=backend).transpose(2, 3))


@every_backend
def test_linear_in_v(backend):
    q, k, v = tensors_of((4, 5))
    w = torch.randn_like(v)
    both, of_v, of_w = (ccgpu.cca(q, k, x, backend=backend) for x in (2 * v - w, v, w))
    torch.testing.assert_close(both, 2 * of_v - of_w)


@every_backend
def test_attention_parts_merge_by_lse(backend):
    """return_lse allows this: attention to the row and to the rest of the column, merged by their weights."""
    q, k, v = tensors_of((4, 5))
    whole, lse = ccgpu.cca(q, k, v, return_lse=True, backend=backend)
    row, row_lse = ccgpu.cca(*(x.movedim(2, 1).flatten(0, 1) for x in (q, k, v)), return_lse=True, backend=backend)
    row, row_lse = row.unflatten(0, (2, 4)).movedim(1, 2), row_lse.unflatten(0, (2, 4))
    energies = torch.einsum("bdhw,bdiw->bhiw", q, k)
    energies = energies.masked_fill(torch.eye(4, dtype=torch.bool)[None, :, :, None], -math.inf)
    column_lse = energies.logsumexp(2)
    column = torch.einsum("bhiw,bciw->bchw", (energies - column_lse.unsqueeze(2)).exp(), v)
    torch.testing.assert_close(lse, torch.logaddexp(row_lse, column_lse))
    merged = (row_lse - lse).exp().unsqueeze(1) * row + (column_lse - lse).exp().unsqueeze(1) * column
    torch.testing.assert_close(whole, merged)


@every_backend
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("sizes", [(4, 5), (2, 3, 4)])
def test_non_finite_inputs_behave_as_the_reference(backend, which, value, sizes):
    tensors = dict(zip("qkv", tensors_of(sizes), strict=True))
    at = (1, 1, *(s // 2 for s in sizes))
    tensors[which][at] = value
    q, k, v = tensors.values()
    out, lse = ccgpu.cca(q, k, v, return_lse=True, backend=backend)
    truth, truth_lse = reference.forward(q.numpy(), k.numpy(), v.numpy(), 1.0)
    np.testing.assert_allclose(out.numpy(), truth, rtol=1e-9, equal_nan=True)
    np.testing.assert_allclose(lse.numpy(), truth_lse, rtol=1e-9, equal_nan=True)
    assert bool(torch.isfinite(out[0]).all())  # the other image is untouched


@every_backend
def test_large_energies_do_not_overflow(backend):
    q, k, v = tensors_of((4, 5), dtype=torch.float32)
    out, lse = ccgpu.cca(100 * q, 100 * k, v, return_lse=True, backend=backend)
    assert bool(torch.isfinite(out).all())
    assert bool(torch.isfinite(lse).all())
    assert float(out.abs().max()) <= float(v.abs().max())


@every_backend
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_twice(backend, layout):
    sizes, c = ((5, 4), 3) if backend in SLOW else ((33, 29), 40)
    tensors = tuple(layouts(x, layout) for x in tensors_of(sizes, c=c, dtype=torch.float32))
    dout, dlse = torch.randn_like(tensors[2]), torch.randn(2, *sizes)
    first, second = (
        run(lambda *x: ccgpu.cca(*x, return_lse=True, backend=backend), tensors, dout, dlse) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_backend
def test_empty_batch_and_zero_gradients(backend):
    q, k, v = (x[:0].requires_grad_() for x in tensors_of((4, 5)))
    out, lse = ccgpu.cca(q, k, v, return_lse=True, backend=backend)
    assert out.shape == v.shape
    assert lse.shape == (0, 4, 5)
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.shape == q.shape
