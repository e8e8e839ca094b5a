"""NumPy arrays in `ccgpu.cca` and its stages: memory, dtypes, refusals, and the same values as for tensors."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ccgpu
from ccgpu import autograd, dispatch, stage_ops
from tests.ccgpu.arrays.problems import record_tensors
from tests.forked import run_forked


def inputs(dtype=np.float32, sizes=(3, 4), batch=2):
    generator = np.random.default_rng(0)
    return tuple(generator.standard_normal((batch, n, *sizes)).astype(dtype) for n in (4, 4, 5))


def attend(*arrays, **options):
    """Return out and lse for arrays, and for tensors with the same values."""
    tensors = [torch.from_numpy(np.array(x, dtype=x.dtype.newbyteorder("="), order="C")) for x in arrays]
    return ccgpu.cca(*arrays, return_lse=True, **options), ccgpu.cca(*tensors, return_lse=True, **options)


def check(*arrays, **options):
    """Return out and lse; raise unless they are plain arrays on memory of their own, with the values of tensors."""
    ours, theirs = attend(*arrays, **options)
    for a, b in zip(ours, theirs, strict=True):
        assert type(a) is np.ndarray
        assert a.dtype == b.numpy().dtype
        assert a.flags.writeable
        assert not any(np.shares_memory(a, x) for x in arrays)
        rtol = 1e-3 if a.dtype == np.float16 else 1e-5  # other layouts may round differently
        np.testing.assert_allclose(a, b.numpy(), rtol=rtol, atol=rtol)
    assert ours[1].flags.c_contiguous
    return ours


@pytest.fixture
def seen(monkeypatch):
    return record_tensors(monkeypatch)


def assert_not_copied(seen, arrays):
    assert [x.data_ptr() for x in seen[:3]] == [x.ctypes.data for x in arrays]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("sizes", [(5,), (3, 4), (2, 3, 4)])
def test_arrays_give_arrays(seen, dtype, sizes):
    arrays = inputs(dtype, sizes)
    out, lse = check(*arrays, scale=0.5)
    assert out.dtype == dtype
    assert lse.dtype == (np.float64 if dtype == np.float64 else np.float32)
    assert_not_copied(seen, arrays)
    assert type(ccgpu.cca(*arrays)) is np.ndarray


@given(st.permutations(range(4)), st.integers(0, 2))
@settings(max_examples=40, deadline=None)
def test_out_has_the_memory_order_of_v(order, batch):
    q, k, v = inputs(batch=batch)
    v = np.copy(v.transpose(order), order="C").transpose(np.argsort(order))
    out, _ = check(q, k, v)
    if batch > 1:  # NumPy and torch choose other strides for an axis of length 1
        assert out.strides == np.empty_like(v).strides


@pytest.mark.parametrize(
    ("name", "view", "copied"),
    [
        ("channels last", lambda x: np.moveaxis(np.moveaxis(x, 1, -1).copy(), -1, 1), False),
        ("Fortran order", np.asfortranarray, False),
        ("every second", lambda x: np.repeat(x, 2, axis=3)[..., ::2], False),
        ("broadcast", lambda x: np.broadcast_to(x[:, :, :1], x.shape), False),
        ("reversed", lambda x: x[:, ::-1, :, ::-1], True),
        ("reversed and of one element", lambda x: x[::-2, :, ::-1][:, :, :1], True),
        ("misaligned", lambda x: _field(x, np.dtype([("pad", "u1"), ("x", x.dtype)])), True),
        ("no multiple of an element apart", lambda x: _field(x, np.dtype([("x", x.dtype), ("pad", "i2")])), True),
        ("big-endian", lambda x: x.astype(x.dtype.newbyteorder(">")), True),
    ],
)
def test_strides_and_bytes(seen, name, view, copied):
    arrays = tuple(view(x) for x in inputs())
    before = [x.copy() for x in arrays]
    out, _ = check(*arrays)
    assert [x.data_ptr() != y.ctypes.data for x, y in zip(seen, arrays, strict=False)] == [copied] * 3
    for a, b in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(a, b)
    if name in ("channels last", "Fortran order"):
        assert out.strides == np.empty_like(arrays[2]).strides


def _field(x, dtype):
    """Return the same values as a field of packed records."""
    records = np.zeros(x.shape, dtype)
    records["x"] = x
    return records["x"]


def test_read_only_arrays_are_not_copied(seen):
    arrays = inputs()
    for x in arrays:
        x.flags.writeable = False
    check(*arrays)
    assert_not_copied(seen, arrays)
    assert not any(x.flags.writeable for x in arrays)


def test_read_only_arrays_do_not_warn_in_a_fresh_process():
    """torch warns of read-only memory once in a process."""
    code = (
        "import warnings; warnings.simplefilter('error'); import numpy, ccgpu;"
        "x = numpy.ones((1, 2, 3, 4)); x.flags.writeable = False;"
        "y = numpy.broadcast_to(numpy.ones(4), (1, 2, 3, 4)); ccgpu.cca(x, y, x); ccgpu.affinity(x, y)"
    )
    answer = run_forked(code)
    assert answer.returncode == 0, answer.stderr


def test_read_only_file_in_memory(seen, tmp_path):
    """A write into the mapped file would end the process."""
    arrays = []
    for i, x in enumerate(inputs()):
        np.save(tmp_path / f"{i}.npy", x)
        arrays.append(np.load(tmp_path / f"{i}.npy", mmap_mode="r"))
    assert type(arrays[0]) is np.memmap
    check(*arrays)
    assert_not_copied(seen, arrays)


def test_the_memory_outlives_the_array(seen):
    q, k, v = (np.array(x) for x in inputs())
    q.flags.writeable = False
    expected = q.copy()
    ccgpu.cca(q, k, v)
    del q
    np.testing.assert_array_equal(seen[0].numpy(), expected)


def test_empty_batch():
    out, lse = check(*inputs(batch=0))
    assert out.shape == (0, 5, 3, 4)
    assert lse.shape == (0, 3, 4)
    reversed_ones = tuple(x[..., ::-1] for x in inputs(batch=0))
    assert ccgpu.cca(*reversed_ones).shape == (0, 5, 3, 4)


def test_bfloat16_of_ml_dtypes(seen):
    bfloat16 = pytest.importorskip("ml_dtypes", reason="NumPy has bfloat16 by ml_dtypes only").bfloat16
    arrays = tuple(x.astype(bfloat16) for x in inputs())
    out, lse = ccgpu.cca(*arrays, return_lse=True)
    expected, expected_lse = ccgpu.cca(*(torch.from_numpy(x).bfloat16() for x in inputs()), return_lse=True)
    assert out.dtype == bfloat16
    assert lse.dtype == np.float32
    np.testing.assert_array_equal(out.astype(np.float32), expected.float().numpy())
    np.testing.assert_array_equal(lse, expected_lse.numpy())
    assert_not_copied(seen, arrays)
    weights = ccgpu.affinity(*arrays[:2])
    assert weights.dtype == np.float32
    assert ccgpu.aggregate(weights, arrays[2]).dtype == bfloat16
    reversed_out = ccgpu.cca(*(x[..., ::-1] for x in arrays))[..., ::-1]
    np.testing.assert_allclose(reversed_out.astype(np.float32), expected.float().numpy(), atol=0.05)


def test_stages():
    q, k, v = inputs()
    energies = ccgpu.affinity(q, k)
    weights = np.exp(energies) / np.exp(energies).sum(1, keepdims=True)
    out = ccgpu.aggregate(weights, v)
    assert type(energies) is type(out) is np.ndarray
    np.testing.assert_allclose(out, ccgpu.cca(q, k, v), rtol=1e-5, atol=1e-6)
    half = ccgpu.aggregate(weights, v.astype(np.float16))  # weights in the energies' dtype
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, out, atol=1e-2)


def test_autocast_does_not_change_arrays():
    arrays = inputs()
    expected = ccgpu.cca(*arrays)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ccgpu.cca(*arrays)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, expected)


def test_matrix_is_refused_as_an_array_of_two_axes():
    with pytest.raises(ValueError, match=r"cca: q must be \(B, D, L\), .*got 2 axes \(2, 3\); "):
        ccgpu.cca(*[np.ones((2, 3)).view(np.matrix)] * 3)


def test_subclasses_give_plain_arrays():
    class Named(np.ndarray):
        pass

    check(*(x.view(Named) for x in inputs()))


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (1, 2, 3, 4, 5, 6)])
def test_wrong_rank(shape):
    with pytest.raises(ValueError, match=rf"cca: q must be .*, got {len(shape)} axes {re.escape(str(shape))}; "):
        ccgpu.cca(*[np.ones(shape)] * 3)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (np.int64, "int64"),
        (np.uint16, "uint16"),
        (np.bool_, "bool"),
        (np.complex64, "complex64"),
        (np.longdouble, np.dtype(np.longdouble).name),
        (object, "object"),
        ("U3", "str96"),
        ([("x", "f4")], "void32"),
    ],
)
def test_other_dtypes(dtype, name):
    x = np.zeros((1, 2, 3, 4))
    message = (
        rf"cca: k must be float32, bfloat16, float16 or float64, got {name}; convert it, for example "
        r"k\.astype\(numpy\.float32\)"
    )
    with pytest.raises(TypeError, match=message):
        ccgpu.cca(x, np.zeros(x.shape, dtype), x)


def test_masked_arrays_are_refused():
    x = np.ma.masked_invalid(np.zeros((1, 2, 3, 4)))
    message = (
        r"affinity: q must be an array without a mask, got numpy\.ma.*\.MaskedArray, whose mask would be ignored; "
        r"pass q\.filled\(0\), or q\.data to attend"
    )
    with pytest.raises(TypeError, match=message):
        ccgpu.affinity(x, x)
    assert ccgpu.affinity(x.filled(0), x.data).shape == (1, 6, 3, 4)


def test_dtypes_that_differ():
    q, k, v = inputs()
    message = (
        r"cca: v must have q's dtype float32, got float64; convert one of them, for example "
        r"v\.astype\(numpy\.float32\)"
    )
    with pytest.raises(TypeError, match=message):
        ccgpu.cca(q, k, v.astype(np.float64))
    weights = ccgpu.affinity(q, k).astype(np.float64)
    message = (
        r"aggregate: weights must have v's dtype float16 or float32, that of energies, got float64; convert one of "
        r"them, for example weights\.astype\(numpy\.float16\)"
    )
    with pytest.raises(TypeError, match=message):
        ccgpu.aggregate(weights, v.astype(np.float16))
    with pytest.raises(TypeError, match=r"aggregate: weights must have v's dtype float32, got float64; "):
        ccgpu.aggregate(weights, v)


def test_arrays_get_the_checks_of_tensors():
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"cca: k must have q's shape \(2, 4, 3, 4\), got \(2, 4, 3, 3\)"):
        ccgpu.cca(q, k[..., :3], v)
    with pytest.raises(ValueError, match="cca: scale must be finite"):
        ccgpu.cca(q, k, v, scale=np.inf)
    with pytest.raises(ValueError, match="cca: backend must be one of"):
        ccgpu.cca(q, k, v, backend="gpu")
    with pytest.raises(ValueError, match="affinity: backend must be one of"):
        ccgpu.affinity(q, k, backend="gpu")
    with pytest.raises(ValueError, match=r"aggregate: weights must be \(2, 6, 3, 4\)"):
        ccgpu.aggregate(q, v)


def test_the_backend_asked_for_runs(monkeypatch):
    used = []
    real = autograd.choose
    monkeypatch.setattr(autograd, "choose", lambda *x: used.append(real(*x)) or used[-1])
    check(*inputs(), backend="reference")
    assert [backend.name for backend in used] == ["reference"] * 2


def test_backend_is_chosen_as_for_tensors(monkeypatch):
    """By what suits a backend, here a dtype, and by CCGPU_BACKEND."""
    names = []
    for module in (autograd, stage_ops):
        choose = module.choose
        record = lambda *x, choose=choose, **y: names.append(choose(*x, **y).name) or choose(*x, **y)  # noqa: E731
        monkeypatch.setattr(module, "choose", record)
    monkeypatch.delenv("CCGPU_BACKEND", raising=False)
    float32_alone = dispatch.BACKENDS[0]._replace(suits=lambda call: call.dtype == torch.float32)
    monkeypatch.setattr(dispatch, "BACKENDS", (float32_alone, *dispatch.BACKENDS[1:]))
    q, k, v = inputs()
    calls = (
        lambda: ccgpu.cca(q, k, v),
        lambda: ccgpu.affinity(q, k),
        lambda: ccgpu.aggregate(ccgpu.affinity(q, k, backend="cpu"), v),
    )

    def chosen(call):
        del names[:]
        call()
        return names[-1]

    assert [chosen(call) for call in calls] == ["numba_cpu"] * 3
    assert chosen(lambda: ccgpu.cca(*inputs(np.float16))) == "cpu"
    monkeypatch.setenv("CCGPU_BACKEND", "reference")
    assert [chosen(call) for call in calls] == ["reference"] * 3
    monkeypatch.setenv("CCGPU_BACKEND", "cupy")
    with pytest.raises(RuntimeError, match="affinity: CCGPU_BACKEND='cupy' cannot run this call: "):
        ccgpu.affinity(q, k)


def test_arrays_in_torch_compile():
    """torch.compile makes tensors of NumPy arrays, and cannot trace the kernels."""
    q, k, v = inputs()

    def attend(q, k, v):
        energies = ccgpu.affinity(q, k)
        return ccgpu.cca(q, k, v), ccgpu.aggregate(energies, v)

    torch.compiler.reset()
    for compiled, eager in zip(torch.compile(attend, backend="eager")(q, k, v), attend(q, k, v), strict=True):
        np.testing.assert_allclose(compiled, eager, rtol=1e-5, atol=1e-5)
