"""Arrays with `__dlpack__` in `ccgpu.cca`, calls with several kinds of arrays, and an example of each kind.

test_numpy.py tests NumPy's arrays, test_device.py CuPy's and Numba's.
"""

import sys
import types

import numpy as np
import pytest
import torch

import ccgpu
from ccgpu import arrays
from tests.ccgpu.arrays.problems import inputs, record_tensors
from tests.forked import run_forked


@pytest.fixture
def seen(monkeypatch):
    return record_tensors(monkeypatch)


class Exporter:
    """An array with `__dlpack__`, of a library that has no `from_dlpack`: this module."""

    def __init__(self, x, device=None, error=None):
        self.x, self.device, self.error = x, device, error

    def __dlpack__(self, **options):
        if self.error is not None:
            raise self.error
        return self.x.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device or self.x.__dlpack_device__()


@pytest.fixture
def strict():
    return pytest.importorskip("array_api_strict", reason="array-api-strict (extra test) is not installed")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_other_libraries_arrays_give_their_kind(strict, seen, dtype):
    values = [x.numpy().astype(dtype) for x in inputs()]
    ours = [strict.asarray(x) for x in values]
    out, lse = ccgpu.cca(*ours, return_lse=True)
    expected, expected_lse = ccgpu.cca(*values, return_lse=True)
    assert type(out) is type(lse) is type(ours[0])
    np.testing.assert_array_equal(np.from_dlpack(out), expected)
    np.testing.assert_array_equal(np.from_dlpack(lse), expected_lse)
    assert [x.data_ptr() for x in seen[:3]] == [np.from_dlpack(x).ctypes.data for x in ours]
    assert np.from_dlpack(out).ctypes.data == seen[3].data_ptr()
    weights = ccgpu.affinity(*ours[:2])
    assert type(weights) is type(ccgpu.aggregate(weights, ours[2])) is type(ours[0])


def test_reversed_and_read_only_arrays_by_dlpack(strict):
    """With reversed arrays torch.from_dlpack would end the process."""
    values = [x.numpy() for x in inputs()]
    expected = np.flip(ccgpu.cca(*values), 3)
    turned = [strict.flip(strict.asarray(x), axis=3) for x in values]
    np.testing.assert_allclose(np.from_dlpack(ccgpu.cca(*turned)), expected, rtol=1e-5, atol=1e-6)
    frozen = values[0].copy()
    frozen.flags.writeable = False
    out = ccgpu.cca(strict.asarray(frozen, copy=False), *map(strict.asarray, values[1:]))
    np.testing.assert_array_equal(np.from_dlpack(out), ccgpu.cca(*values))


def test_an_exporter_without_an_importer_gets_tensors():
    for dtype in (torch.float32, torch.bfloat16):  # NumPy cannot share the latter
        tensors = inputs(dtype)
        out, lse = ccgpu.cca(*map(Exporter, tensors), return_lse=True)
        expected, expected_lse = ccgpu.cca(*tensors, return_lse=True)
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("place", ["namespace", "library", "library.dlpack"])
def test_from_dlpack_is_looked_up_in_three_places(monkeypatch, place):
    """In the array's namespace first, then in its library, then in the library's module dlpack."""
    made_by = []

    class Array(Exporter):
        pass

    def importer(name):
        def from_dlpack(x):
            made_by.append(name)
            return Array(x)

        return types.SimpleNamespace(from_dlpack=from_dlpack, __name__=name)

    names = ["namespace", "library", "library.dlpack"]
    there = {name: importer(name) for name in names[names.index(place) :]}
    library = there.get("library") or types.SimpleNamespace()
    library.dlpack = there["library.dlpack"]
    Array.__module__ = "library.arrays"
    monkeypatch.setitem(sys.modules, "library", library)
    if place == "namespace":
        Array.__array_namespace__ = lambda self: there["namespace"]
    out = ccgpu.cca(*map(Array, inputs()))
    assert type(out) is Array
    assert made_by == [place]
    message = f"got q library.arrays.*Array, k torch.Tensor; convert k with {place}.from_dlpack, or q with torch"
    with pytest.raises(TypeError, match=message):
        ccgpu.affinity(Array(inputs()[0]), inputs()[1])


@pytest.mark.parametrize(
    ("exporter", "error", "message"),
    [
        ({"error": BufferError("not now")}, ValueError, r"\(not now\); copy it"),
        ({"error": TypeError("no stream")}, TypeError, r"\(no stream\); copy it"),
        ({"error": ImportError("no jaxlib")}, ValueError, r"\(no jaxlib\); copy it"),
        ({"device": (7, 0)}, ValueError, r"\(.*\); copy it"),
    ],
)
def test_errors_of_dlpack_are_in_the_message(exporter, error, message):
    q, k, v = inputs()
    message = (
        rf"cca: k must be an array whose memory torch can share by __dlpack__, got .*\.Exporter {message} into an "
        r"array that exports its memory, or into a tensor"
    )
    if exporter.get("device"):
        exporter["error"] = BufferError("unknown device")
    with pytest.raises(error, match=message) as caught:
        ccgpu.cca(Exporter(q), Exporter(k, **exporter), Exporter(v))
    assert caught.value.__cause__ is not None


def test_negative_strides_on_a_device_are_refused_before_torch_gets_them():
    q, k, v = (Exporter(x, device=(14, 0)) for x in inputs())
    k.strides = (60, -1, 4, 1)
    k.error = AssertionError("torch would end the process here")
    message = r"cca: k must be an array .*\(torch has no negative strides, these are \(60, -1, 4, 1\)\); copy it"
    q.device = v.device = None
    with pytest.raises(ValueError, match=message):
        ccgpu.cca(q, k, v)


def test_checks_in_the_librarys_words(strict):
    q, k, v = (strict.asarray(x.numpy()) for x in inputs())
    convert = r"array_api_strict\.astype\({}, array_api_strict\.float32\)"
    with pytest.raises(TypeError, match=r"cca: k must be float32, .*got int64; .*example " + convert.format("k")):
        ccgpu.cca(q, strict.astype(k, strict.int64), v)
    with pytest.raises(TypeError, match=r"cca: v must have q's dtype float32, got float64; .* " + convert.format("v")):
        ccgpu.cca(q, k, strict.astype(v, strict.float64))
    with pytest.raises(TypeError, match=r"cca: q must be float32, .*got int64; .*example q to float32 in tests"):
        ccgpu.cca(*[Exporter(inputs()[0].long())] * 3)


# Kinds together -------------------------------------------------------------------------------------------------------


def test_libraries_with_dlpack_do_not_mix(strict):
    q, k, _ = inputs()
    message = r"convert q with array_api_strict\.from_dlpack$"  # the exporter's library has no from_dlpack
    with pytest.raises(TypeError, match=message):
        ccgpu.affinity(Exporter(q), strict.asarray(k.numpy()))


def test_arguments_that_are_no_arrays_have_their_own_message():
    q, k, v = inputs()
    with pytest.raises(TypeError, match=r"cca: v must be a torch\.Tensor, got builtins\.list; "):
        ccgpu.cca(q, k, v.tolist())
    with pytest.raises(TypeError, match=r"affinity: q must be a torch\.Tensor, got builtins\.list; "):
        ccgpu.affinity(q.tolist(), k.tolist())
    assert arrays.kind_of("cca", q=q, k=k, v=v) is None


def test_calls_import_no_library():
    """Not even if it is installed, on the backend `cpu`: the CPU kernels import Numba, torch's products nothing."""
    code = (
        "import sys, warnings, torch; warnings.simplefilter('error'); import ccgpu\n"
        "x = torch.zeros(1, 2, 3, 4); ccgpu.cca(x, x, x); ccgpu.cca(*[x.numpy()] * 3)\n"
        "try: ccgpu.cca(x.numpy(), x, x)\n"
        "except TypeError: pass\n"
        "assert not {'cupy', 'numba', 'numba.cuda', 'ml_dtypes', 'jax'} & set(sys.modules)"
    )
    answer = run_forked(code, CCGPU_BACKEND="cpu")
    assert answer.returncode == 0, answer.stderr


# An example for each library, as a user would write it.
EXAMPLES = {
    "numpy": """
        q, k, v = numpy.random.default_rng(0).standard_normal((3, 1, 8, 5, 6), dtype=numpy.float32)
        out, lse = ccgpu.cca(q, k, v, return_lse=True)
        assert type(out) is type(lse) is numpy.ndarray
        """,
    "array_api_strict": """
        q = k = v = array_api_strict.ones((1, 8, 5, 6), dtype=array_api_strict.float32)
        assert array_api_strict.all(ccgpu.cca(q, k, v) == 1)
        """,
    "jax": """
        q = k = v = jax.numpy.ones((1, 8, 5, 6))
        out = ccgpu.cca(q, k, v)
        assert isinstance(out, jax.Array) and out.shape == (1, 8, 5, 6)
        """,
    "numba.cuda": """
        q = k = v = numba.cuda.to_device(numpy.ones((1, 8, 5, 6), numpy.float32))
        assert (ccgpu.cca(q, k, v).copy_to_host() == 1).all()
        """,
    "cupy": """
        q, k, v = cupy.random.default_rng(0).standard_normal((3, 1, 8, 5, 6), dtype=cupy.float32)
        with cupy.cuda.Stream():
            out = ccgpu.cca(q, k, v)
        assert isinstance(out, cupy.ndarray)
        """,
}


@pytest.mark.parametrize("library", EXAMPLES)
def test_example(library):
    pytest.importorskip(library, reason=f"{library} is not installed")
    if library == "cupy" and not torch.cuda.is_available():
        pytest.skip("CuPy needs a CUDA device")
    names = {"numpy": np, "ccgpu": ccgpu, library.partition(".")[0]: sys.modules[library.partition(".")[0]]}
    exec("if True:" + EXAMPLES[library], names)
