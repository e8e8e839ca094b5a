"""`ccgpu.kernels.forward` and `backward` on plain arrays: values, arrays of every kind, and error messages."""

import re
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from ccgpu import kernels
from ccgpu.kernels import array_checks, reference
from tests.ccgpu.problems import attend_plainly, check_errors, expected, problems

NUMPY_DTYPES = (torch.float64, torch.float32, torch.float16)


def arrays_of(problem):
    return [x.detach().numpy() for x in problem.tensors]


def attend(q, k, v, dout, dlse, scale, **options):
    """Return out, lse, dq, dk, dv."""
    out, lse = kernels.forward(q, k, v, scale, **options)
    return (out, lse, *kernels.backward(dout, q, k, v, out, lse, dlse, scale, **options))


@given(problems(NUMPY_DTYPES))
@settings(max_examples=60, deadline=None)
def test_the_pair_against_the_reference(problem):
    arrays = arrays_of(problem)
    ours = attend(*arrays, problem.dout.numpy(), problem.dlse.numpy(), problem.scale)
    check_errors([torch.from_numpy(x) for x in ours], attend_plainly(problem), expected(problem), problem)
    out, lse, *gradients = ours
    for result, like in zip((out, *gradients), (arrays[2], *arrays), strict=True):
        assert type(result) is np.ndarray
        assert (result.shape, result.dtype) == (like.shape, like.dtype)
    assert lse.dtype == (np.float64 if out.dtype == np.float64 else np.float32)
    assert lse.flags.c_contiguous


def inputs(dtype=np.float64, sizes=(3, 4), batch=2):
    generator = np.random.default_rng(0)
    return tuple(generator.standard_normal((batch, n, *sizes)).astype(dtype) for n in (3, 3, 5))


@pytest.mark.parametrize("sizes", [(5,), (3, 4), (2, 3, 2)])
def test_backward_is_the_derivative_of_forward(sizes):
    """The gradients of dout . out + dlse . lse match finite differences of forward in several random directions."""
    q, k, v = inputs(sizes=sizes)
    generator = np.random.default_rng(1)
    dout, dlse = generator.standard_normal(v.shape), generator.standard_normal((2, *sizes))

    def objective(*x):
        out, lse = kernels.forward(*x, scale=0.7)
        return (dout * out).sum() + (dlse * lse).sum()

    gradients = kernels.backward(dout, q, k, v, *kernels.forward(q, k, v, 0.7), dlse, 0.7)
    for which, gradient in enumerate(gradients):
        for _ in range(5):
            step = generator.standard_normal(gradient.shape)
            there, back = [q, k, v], [q, k, v]
            there[which], back[which] = there[which] + 1e-6 * step, back[which] - 1e-6 * step
            difference = (objective(*there) - objective(*back)) / 2e-6
            np.testing.assert_allclose((gradient * step).sum(), difference, rtol=1e-6, atol=1e-7)


def test_glue_for_a_framework():
    """The glue for a framework, here torch: forward, the arrays to save, and backward."""

    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            arrays = [x.numpy() for x in (q, k, v)]
            out, lse = kernels.forward(*arrays, scale=0.5)
            ctx.arrays = (*arrays, out, lse)
            return torch.from_numpy(out), torch.from_numpy(lse)

        @staticmethod
        def backward(ctx, dout, dlse):
            gradients = kernels.backward(dout.numpy(), *ctx.arrays, dlse.numpy(), scale=0.5)
            return tuple(torch.from_numpy(x) for x in gradients)

    leaves = [torch.from_numpy(x).requires_grad_() for x in inputs()]
    assert torch.autograd.gradcheck(Attend.apply, leaves)


def test_dlse_left_out_is_zero():
    q, k, v = inputs()
    out, lse = kernels.forward(q, k, v)
    ours = kernels.backward(out, q, k, v, out, lse)
    for a, b in zip(ours, kernels.backward(out, q, k, v, out, lse, np.zeros_like(lse)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_arrays_of_every_kind_are_taken_and_not_changed():
    """Read-only, reversed, big-endian, fields of records, subclasses; results are plain, writable, in native order."""
    expected = kernels.forward(*inputs(np.float32))

    def field(x):
        records = np.zeros(x.shape, [("pad", "u1"), ("x", x.dtype)])
        records["x"] = x
        return records["x"]

    views = [
        lambda x: x[..., ::-1].copy()[..., ::-1],
        lambda x: x.astype(">f4"),
        field,
        lambda x: np.moveaxis(np.moveaxis(x, 1, -1).copy(), -1, 1),
        lambda x: x.view(np.recarray),
    ]
    for view in views:
        arrays = [view(x) for x in inputs(np.float32)]
        for x in arrays:
            x.flags.writeable = False
        before = [x.copy() for x in arrays]
        out, lse = kernels.forward(*arrays)
        gradients = kernels.backward(out, *arrays, out, lse)
        np.testing.assert_allclose(out, expected[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(lse, expected[1], rtol=1e-5, atol=1e-6)
        for result in (out, lse, *gradients):
            assert type(result) is np.ndarray
            assert result.flags.writeable
            assert result.dtype.isnative
        for a, b in zip(arrays, before, strict=True):
            np.testing.assert_array_equal(a, b)
    last = [views[3](x) for x in inputs()]
    assert kernels.forward(*last)[0].strides == np.empty_like(last[2]).strides


def test_host_arrays_are_not_copied():
    (x,) = inputs()[:1]
    assert array_checks.host_array(x) is x
    frozen = x[:]
    frozen.flags.writeable = False
    assert array_checks.host_array(frozen).ctypes.data == x.ctypes.data
    assert array_checks.host_array(x.T[::-1]).strides == x.T[::-1].strides


def test_empty_batch():
    out, lse = kernels.forward(*inputs(batch=0))
    assert (out.shape, lse.shape) == ((0, 5, 3, 4), (0, 3, 4))
    assert [x.shape[0] for x in kernels.backward(out, *inputs(batch=0), out, lse)] == [0, 0, 0]


# Device arrays --------------------------------------------------------------------------------------------------------


@pytest.fixture
def simulator():
    """numba.cuda, if it runs in the simulator."""
    numba = pytest.importorskip("numba")
    if not numba.config.ENABLE_CUDASIM:
        pytest.skip("Numba's simulator is off: there is a CUDA device (or NUMBA_ENABLE_CUDASIM=0)")
    from numba import cuda

    return cuda


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numba_arrays_give_numba_arrays(simulator, dtype):
    q, k, v = inputs(dtype)
    generator = np.random.default_rng(1)
    dout, dlse = generator.standard_normal(v.shape).astype(dtype), generator.standard_normal((2, 3, 4)).astype(dtype)
    results = attend(*map(simulator.to_device, (q, k, v, dout, dlse)), 0.5)
    truth, truth_lse = reference.forward(q, k, v, 0.5)
    truths = truth, truth_lse, *reference.backward(dout, q, k, v, truth, truth_lse, dlse, 0.5)
    for ours, theirs in zip(results, truths, strict=True):
        assert type(ours) is type(simulator.to_device(q))
        np.testing.assert_allclose(ours.copy_to_host(), theirs, rtol=1e-4, atol=1e-5)


class DeviceArray:
    """Stands for another library's device array: only the interface, without memory."""

    def __init__(self, shape, dtype="<f4", stream=None):
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": dtype,
            "data": (0, False),
            "stream": stream,
            "version": 3,
        }


@pytest.fixture
def calls(monkeypatch):
    """The calls of the CUDA kernels, recorded by a module that replaces them."""
    record = []

    def forward(q, k, v, scale, *, stream):
        record.append((scale, stream))
        return "out", "lse"

    def backward(dout, q, k, v, out, lse, dlse, scale, *, stream):
        record.append((dlse, scale, stream))
        return "dq", "dk", "dv"

    module = types.SimpleNamespace(forward=forward, backward=backward)
    monkeypatch.setitem(sys.modules, "ccgpu.kernels.numba_cuda.calls", module)
    monkeypatch.setattr(kernels.numba_cuda, "calls", module, raising=False)
    return record


def test_streams_of_device_arrays(calls):
    """The `stream` argument comes first, then the stream that v names, then the default stream."""
    q, named = DeviceArray((1, 2, 3, 4)), DeviceArray((1, 5, 3, 4), stream=0x70)
    lse = DeviceArray((1, 3, 4))
    assert kernels.forward(q, q, q, 0.5) == ("out", "lse")
    kernels.forward(q, q, named)
    kernels.forward(q, q, named, stream=0x40)
    assert kernels.backward(named, q, q, named, named, lse) == ("dq", "dk", "dv")
    kernels.backward(q, q, q, q, q, lse, lse, 2.0, stream=0x40)
    assert calls == [(0.5, 0), (1.0, 0x70), (1.0, 0x40), (None, 1.0, 0x70), (lse, 2.0, 0x40)]


def test_cupy_arrays_give_cupy_arrays(calls, monkeypatch):
    """Results are CuPy arrays on the same memory that name no stream, because CuPy would wait for it."""
    out, lse = (DeviceArray(shape, stream=0x70) for shape in ((1, 2, 3, 4), (1, 3, 4)))
    module = types.SimpleNamespace(forward=lambda *arguments, **options: (out, lse))
    monkeypatch.setitem(sys.modules, "ccgpu.kernels.numba_cuda.calls", module)
    monkeypatch.setattr(kernels.numba_cuda, "calls", module, raising=False)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(ndarray=DeviceArray, asarray=lambda x: x))
    q = DeviceArray((1, 2, 3, 4))
    for result, made in zip(kernels.forward(q, q, q), (out, lse), strict=True):
        assert result.__cuda_array_interface__ == {**made.__cuda_array_interface__, "stream": None}
        assert result is not made


# Errors ---------------------------------------------------------------------------------------------------------------

X = np.zeros((1, 2, 3, 4))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.tolist(), X, X), TypeError, r"q must be a numpy\.ndarray or .*, got builtins\.list; convert it with numpy"),
        ((X, X, torch.zeros(1)), TypeError, r"v must be a numpy\.ndarray or .*, got torch\.Tensor; .*call ccgpu\.cca"),
        ((X, np.ma.array(X), X), TypeError, r"k must be an array without a mask, got .*; pass k\.filled\(0\)"),
        ((X, DeviceArray(X.shape), X), TypeError, r"q, k, v must all be on the host .*, got q, v on the host; copy"),
        ((X.astype(int),) * 3, TypeError, r"q must be float32, float16 or float64, got int64; .*q\.astype\(numpy\.fl"),
        (
            (X, X.astype("f2"), X),
            TypeError,
            r"k must have q's dtype float64, got float16; .*k\.astype\(numpy\.float64\)",
        ),
        ((X, X, X.astype("f4")), TypeError, r"v must have q's dtype float64, got float32; "),
        ((X[0, 0],) * 3, ValueError, r"q must be \(B, D, L\), .*, got 2 axes \(3, 4\); add or flatten"),
        ((X, X[..., :3], X), ValueError, r"k must have q's shape \(1, 2, 3, 4\), got \(1, 2, 3, 3\); "),
        (
            (X, X, X[:, :, :2]),
            ValueError,
            r"v must have q's batch and map size \(1, C, 3, 4\), got \(1, 2, 2, 4\); only",
        ),
        ((X[:, :0], X[:, :0], X), ValueError, r"q, k and v must have at least one channel .*, got \(1, 0, 3, 4\) and"),
        ((X[..., :0],) * 3, ValueError, r".* at least one channel and one position, got \(1, 2, 3, 0\) and"),
        ((X, X, X, "1"), TypeError, r"scale must be a number, got str; "),
        ((X, X, X, np.inf), ValueError, r"scale must be finite, got inf; "),
    ],
)
def test_forward_refuses(arguments, error, message):
    with pytest.raises(error, match=r"^kernels\.forward: " + message):
        kernels.forward(*arguments)


@pytest.mark.parametrize(
    ("stream", "error", "message"),
    [
        ("1", TypeError, r"must be the address of a CUDA stream, got builtins\.str; pass an integer"),
        (True, TypeError, r"must be the address of a CUDA stream, got builtins\.bool; "),
        (64, ValueError, r"must be 0 for arrays on the host, got 64; leave it out"),
    ],
)
def test_streams_refused(stream, error, message):
    with pytest.raises(error, match=r"kernels\.forward: stream " + message):
        kernels.forward(X, X, X, stream=stream)
    with pytest.raises(ValueError, match=r"kernels\.forward: stream must be an address, got -1; leave it out"):
        kernels.forward(*[DeviceArray(X.shape)] * 3, stream=-1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dout": X[:, :1]}, ValueError, r"dout must have v's shape \(1, 2, 3, 4\), got \(1, 1, 3, 4\); "),
        ({"out": X.astype("f4")}, TypeError, r"out must have v's dtype float64, got float32; .*out\.astype"),
        ({"lse": X[:, 0, :2]}, ValueError, r"lse must have the log-sum-exp's shape \(1, 3, 4\), got \(1, 2, 4\); "),
        ({"lse": X[:, 0].astype("f4")}, TypeError, r"lse must have the log-sum-exp's dtype float64, got float32; "),
        ({"dlse": X}, ValueError, r"dlse must have the log-sum-exp's shape \(1, 3, 4\), got \(1, 2, 3, 4\); "),
        ({"dlse": 0.0}, TypeError, r"dlse must be a numpy\.ndarray or .*, got builtins\.float; "),
        ({"dout": DeviceArray(X.shape)}, TypeError, r"q, k, v, dout, out, lse must all be on the host or all on"),
        ({"scale": np.nan}, ValueError, r"scale must be finite, got nan; "),
    ],
)
def test_backward_refuses(changes, error, message):
    arguments = {"dout": X, "q": X, "k": X, "v": X, "out": X, "lse": X[:, 0], **changes}
    with pytest.raises(error, match=r"^kernels\.backward: " + message):
        kernels.backward(**arguments)


def test_lse_of_half_precision_is_float32():
    half = X.astype(np.float16)
    message = "lse must have the log-sum-exp's dtype float32, got float16"
    with pytest.raises(TypeError, match=re.escape(message)):
        kernels.backward(half, half, half, half, half, half[:, 0])


def test_nothing_imports_torch():
    """The kernels work in a process without torch, because they are for other frameworks too."""
    code = (
        "import sys, types, pathlib; root = pathlib.Path(sys.argv[1]); package = types.ModuleType('ccgpu');"
        "package.__path__ = [str(root)]; sys.modules['ccgpu'] = package; sys.modules['torch'] = None\n"
        "import numpy; from ccgpu import kernels\n"
        "assert 'numba' not in sys.modules\n"
        "x = numpy.ones((1, 2, 3, 4)); out, lse = kernels.forward(x, x, x)\n"
        "assert (out == 1).all()"
    )
    root = array_checks.__file__.rpartition("kernels")[0]
    subprocess.run([sys.executable, "-c", code, root], check=True)
