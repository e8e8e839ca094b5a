"""The CPU kernels against the reference: values, every way of dividing the work, infinity and NaN."""

import ctypes
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ccgpu.kernels import reference
from ccgpu.kernels.numba_cpu import calls, scratch
from tests.ccgpu import stage_problems
from tests.ccgpu.problems import attend_plainly, check_errors, expected, problems, truth_in_float64
from tests.error_table import VALUE_LIMIT
from tests.kernels.numba_cpu.problems import (
    DTYPES,
    LAYOUTS,
    arrays_of,
    attend,
    channels_last,
    cut_up,
    problem_of,
    tensors_of,
)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32", "float16"])


@given(problems(DTYPES), st.sampled_from([1, 3]))
@settings(max_examples=60, deadline=None)
def test_pair_against_the_reference(problem, threads):
    ours = attend(*arrays_of(problem), problem.scale, threads)
    check_errors(tensors_of(ours), attend_plainly(problem), expected(problem), problem)
    q, k, v = arrays_of(problem)[:3]
    out, lse, *gradients = ours
    for result, like in zip((out, *gradients), (v, q, k, v), strict=True):
        assert (result.shape, result.dtype) == (like.shape, like.dtype)
        assert result.strides == np.empty_like(like).strides
    assert lse.dtype == (np.float64 if out.dtype == np.float64 else np.float32)
    assert lse.flags.c_contiguous


def check_stages(problem, threads):
    """Compare the three stages with the reference."""
    (q, k), weights, _ = problem
    plain = stage_problems.plain_affinity(q, k), stage_problems.plain_aggregate(weights, q)
    v = torch.zeros_like(q).requires_grad_()
    (plain_transposed,) = torch.autograd.grad(stage_problems.plain_aggregate(weights, v), v, q)
    a, b, w = (x.numpy() for x in (q, k, weights))
    results = {
        "affinity": (calls.affinity(a, b, threads=threads), plain[0], (q, k)),
        "aggregate": (calls.aggregate(w, a, threads=threads), plain[1], (weights, q)),
        "aggregate_transposed": (calls.aggregate_transposed(w, a, threads=threads), plain_transposed, (weights, q)),
    }
    for name, (ours, theirs, arguments) in results.items():
        (tensor,) = tensors_of([ours])
        units = stage_problems.units_of(tensor, theirs, VALUE_LIMIT, getattr(reference, name), *arguments)
        assert units <= VALUE_LIMIT, f"{name}: {units:.3g} units"
        if name == "affinity":
            assert ours.dtype == (np.float64 if a.dtype == np.float64 else np.float32)
            assert np.moveaxis(ours, 1, -1).flags.c_contiguous
        else:
            assert ours.dtype == a.dtype
            assert ours.strides == np.empty_like(a).strides


@given(stage_problems.problems(DTYPES), st.sampled_from([1, 3]))
@settings(max_examples=60, deadline=None)
def test_stages_against_the_reference(problem, threads):
    check_stages(problem, threads)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_empty_batch(dtype):
    q, v = np.empty((0, 3, 4, 5), dtype), np.empty((0, 6, 4, 5), dtype)
    lse = np.empty((0, 4, 5), np.promote_types(dtype, np.float32))
    results = attend(q, q, v, v, lse, 1.0)
    for result, like in zip(results, (v, lse, q, q, v), strict=True):
        assert (result.shape, result.dtype) == (like.shape, like.dtype)
    energies = calls.affinity(q, q)
    assert (energies.shape, energies.dtype) == ((0, 8, 4, 5), lse.dtype)
    assert calls.aggregate(energies, v).shape == calls.aggregate_transposed(energies, v).shape == v.shape


# Divided work ---------------------------------------------------------------------------------------------------------

MAPS = st.one_of(
    st.tuples(st.integers(1, 40)),
    st.tuples(st.integers(1, 40), st.integers(1, 4)),
    st.tuples(st.integers(1, 4), st.integers(1, 40)),
    st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 3)),
)
# A few numbers instead of many: small blocks of queries, chunks of channels, groups of lines and images, tickets.
CUTS = st.fixed_dictionaries(
    {
        "SHEET_BYTES": st.sampled_from([1, 1000, 5000]),
        "CHUNK": st.sampled_from([8, 64, 128]),
        "CHUNK_GATHERED": st.sampled_from([8, 24, 64]),
        "TOGETHER": st.sampled_from([1, 100]),
        "PARTS": st.sampled_from([1, 3]),
        "SMALL": st.just(0),
    }
)


@given(problems(DTYPES, MAPS), CUTS, st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_pair_however_it_is_cut_up(problem, cuts, threads):
    with pytest.MonkeyPatch.context() as patch:
        cut_up(patch, **cuts)
        ours = attend(*arrays_of(problem), problem.scale, threads)
    check_errors(tensors_of(ours), attend_plainly(problem), expected(problem), problem)


@every_dtype
def test_chunks_of_fewer_channels_than_a_vector_has(monkeypatch, dtype):
    """Products write whole vectors: beside a chunk there must be nothing of another position."""
    cut_up(monkeypatch, SHEET_BYTES=1, CHUNK=8, CHUNK_GATHERED=8)
    problem = problem_of((20,), dtype, d=1, c=21)
    ours = attend(*arrays_of(problem), problem.scale)
    check_errors(tensors_of(ours), attend_plainly(problem), expected(problem), problem)


@given(stage_problems.problems(DTYPES, MAPS), CUTS, st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_stages_however_they_are_cut_up(problem, cuts, threads):
    with pytest.MonkeyPatch.context() as patch:
        cut_up(patch, **cuts)
        check_stages(problem, threads)


@every_dtype
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [(16, 48), (5, 37)], ids=["whole vectors", "parts of vectors"])
@pytest.mark.parametrize("sizes", [(40, 37), (6, 7, 33)])
def test_pair_on_larger_maps_cut_up(monkeypatch, sizes, channels, layout, dtype):
    """Several blocks, chunks and groups on every axis at once; the truth is the einsum formulation in float64."""
    cut_up(monkeypatch, SHEET_BYTES=20000, CHUNK=64, CHUNK_GATHERED=64, TOGETHER=1, SMALL=0)
    problem = problem_of(sizes, dtype, d=channels[0], c=channels[1])
    arrays = [x if layout == "contiguous" else channels_last(x) for x in arrays_of(problem)[:4]]
    ours = attend(*arrays, problem.dlse.numpy(), problem.scale, threads=3)
    truth = truth_in_float64(problem)
    check_errors(tensors_of(ours), attend_plainly(problem), truth, problem)


@every_dtype
@pytest.mark.parametrize("order", ["contiguous", "channels last"])
def test_what_memory_holds_before_a_call_does_not_matter(monkeypatch, order, dtype):
    """Even if it is NaN, and the channels are divided into chunks that are smaller than a vector."""
    cut_up(monkeypatch, SHEET_BYTES=1, CHUNK=8, CHUNK_GATHERED=8)
    problem = problem_of((75,), dtype, d=3, c=7)
    arrays = [LAYOUTS[order](x) for x in arrays_of(problem)]
    results = []
    for byte in (0x00, 0xFF):  # all bits of a number are 1: NaN in each dtype
        block = scratch.Block(scratch.KEPT)
        ctypes.memset(block.address, byte, block.size)
        scratch.give_back(block)
        results.append(attend(*arrays, problem.scale, threads=1))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)
    check_errors(tensors_of(results[0]), attend_plainly(problem), truth_in_float64(problem), problem)


@pytest.mark.parametrize("length", [777, 4000])
def test_long_sums_are_as_exact_as_those_of_torch(length):
    """With equal weights, the sums over a line have the most terms that count."""
    problem = problem_of((length,), torch.float32, batch=1, d=3, c=20)
    for x in problem.tensors[:2]:
        x.mul_(1e-3)
    dlse = torch.zeros_like(problem.dlse)
    ones = [torch.ones_like(x) for x in (problem.tensors[2], problem.dout)]
    problem = problem._replace(tensors=(*problem.tensors[:2], ones[0].add_(0.01)), dout=ones[1].add_(0.01), dlse=dlse)
    ours = tensors_of(attend(*arrays_of(problem), problem.scale, threads=2))
    check_errors(ours, attend_plainly(problem), truth_in_float64(problem), problem)


@pytest.mark.parametrize("order", ["contiguous", "channels last"])
@pytest.mark.parametrize("channels", [(16, 48), (5, 37)], ids=["whole vectors", "parts of vectors"])
def test_sums_of_16_bits_are_rounded_once(monkeypatch, channels, order):
    """However many parts the queries of a line are computed in: results are those of float32, rounded."""
    cut_up(monkeypatch, SHEET_BYTES=1, CHUNK=64, CHUNK_GATHERED=64)
    problem = problem_of((75,), torch.float16, d=channels[0], c=channels[1])
    q, k, v, dout, dlse = (LAYOUTS[order](x) for x in arrays_of(problem))
    out, lse = calls.forward(q, k, v, problem.scale)
    wide = [x.astype(np.float32) for x in (dout, q, k, v, out)]
    narrow = calls.backward(dout, q, k, v, out, lse, dlse, problem.scale)
    np.testing.assert_array_equal(out, calls.forward(*wide[1:4], problem.scale)[0].astype(np.float16))
    for ours, truth in zip(narrow, calls.backward(*wide, lse, dlse, problem.scale), strict=True):
        np.testing.assert_array_equal(ours, truth.astype(np.float16))


# Infinity and NaN -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("order", ["contiguous", "channels last"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["q", "k", "v", "dout", "dlse"])
@pytest.mark.parametrize("sizes", [(20,), (4, 19), (19, 4), (2, 3, 4)], ids=str)
def test_non_finite_inputs_as_the_reference(monkeypatch, sizes, which, value, order, dtype):
    cut_up(monkeypatch, SHEET_BYTES=1, CHUNK=64, CHUNK_GATHERED=64)
    arrays = dict(zip(("q", "k", "v", "dout", "dlse"), arrays_of(problem_of(sizes, torch.float64)), strict=True))
    at = tuple(n // 2 for n in sizes)
    arrays[which][(1, *at) if which == "dlse" else (1, 1, *at)] = value
    arguments = [LAYOUTS[order](x.astype(dtype)) for x in arrays.values()]
    compare_non_finite(arguments, 0.7)


def compare_non_finite(arguments, scale):
    """Compare out, lse and gradients with the reference, with infinities and NaN in place; return out and lse."""
    q, k, v, dout, dlse = arguments
    ours = attend(*arguments, scale)
    truth = reference.forward(q, k, v, scale)
    truth += reference.backward(dout, q, k, v, *truth, dlse, scale)
    tolerance = {2: 1e-2, 4: 1e-4, 8: 1e-9}[q.itemsize]
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), ours, truth, strict=True):
        if name in ("out", "lse"):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True, err_msg=name)
            continue
        # Whether it is infinity or NaN depends on which sum is subtracted, of weighted dout . v or of dout . out.
        finite = np.isfinite(b)
        np.testing.assert_array_equal(np.isfinite(a), finite, name)
        np.testing.assert_allclose(a[finite], b[finite], rtol=tolerance, atol=tolerance, err_msg=name)
    return ours[:2]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("order", ["contiguous", "channels last"])
@pytest.mark.parametrize("barred", ["row", "column", "row and column", "but one of the row", "but one of the column"])
def test_energies_of_minus_infinity_in_whole_lines(monkeypatch, barred, order, dtype):
    """Queries without weight on one axis, earlier or later than the one with weight, and a query without any weight."""
    cut_up(monkeypatch, SHEET_BYTES=1, SMALL=0)
    q, k, v, dout, dlse = arrays_of(problem_of((15, 17), torch.float64, batch=1, d=5, c=6))
    q[:, 0], k[:, 0] = 1, 0
    if "row" in barred:
        k[0, 0, 3, :] = -np.inf
    if "column" in barred:
        k[0, 0, :, 4] = -np.inf
    if barred == "but one of the row":
        k[0, 0, 3, 7] = 0
    if barred == "but one of the column":
        k[0, 0, 8, 4] = 0
    out, lse = compare_non_finite([LAYOUTS[order](x.astype(dtype)) for x in (q, k, v, dout, dlse)], 1.0)
    assert np.isneginf(lse).sum() == (barred == "row and column")
    assert np.isnan(out).any() == (barred == "row and column")
    assert np.isfinite(lse[0, 3, 4]) == (barred != "row and column")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_energies_do_not_overflow(dtype):
    q, k, v, dout, dlse = (x.astype(dtype) for x in arrays_of(problem_of((6, 7), torch.float64)))
    results = attend(300 * q, 300 * k, v, dout, dlse, 1.0)
    assert all(np.isfinite(x).all() for x in results)
    assert abs(results[0]).max() <= abs(v).max()
