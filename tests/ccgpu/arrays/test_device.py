"""CuPy's and Numba's device arrays in `ccgpu.cca`, faked in host memory: crossings and streams."""

import contextlib
import sys
import types

import numpy as np
import pytest
import torch

import ccgpu
from ccgpu import arrays
from tests.ccgpu.arrays.problems import inputs, record_tensors


@pytest.fixture
def seen(monkeypatch):
    return record_tensors(monkeypatch)


class Stream:
    """A fake stream of torch, which records what it waits for."""

    def __init__(self, entered, name):
        self.entered, self.name = entered, name

    def wait_stream(self, other):
        self.entered.append((self.name, "waits for", other.name))


@pytest.fixture
def streams(monkeypatch):
    """A record of fake streams: made current, left, and waited for."""
    record = []

    @contextlib.contextmanager
    def current(stream):
        record.append(stream.name)
        try:
            yield
        finally:
            record.append("left")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda pointer, device: Stream(record, (pointer, str(device))))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream(record, ("default", str(device))))
    monkeypatch.setattr(torch.cuda, "stream", current)
    return record


# CuPy -----------------------------------------------------------------------------------------------------------------


class ndarray:
    """A fake CuPy array in host memory, with the attributes that DLPack and ccgpu read."""

    def __init__(self, array, index=0):
        self.array = array
        self.device = Device(index)
        self.dtype, self.strides = array.dtype, array.strides
        self.copies = 0

    def copy(self):
        self.copies += 1
        return ndarray(self.array.copy(), self.device.id)

    def view(self, dtype):
        return ndarray(self.array.view(dtype), self.device.id)

    def __dlpack__(self, stream=None, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Device(contextlib.AbstractContextManager):
    current = 0

    def __init__(self, index):
        self.id = index

    def __enter__(self):
        self._before, Device.current = Device.current, self.id

    def __exit__(self, *error):
        Device.current = self._before


def on_device(tensor, index=0):
    return ndarray(tensor.numpy(), index)


@pytest.fixture
def cupy(monkeypatch, streams):
    """A fake CuPy."""
    module = types.ModuleType("cupy")
    module.pointers = {0: 0, 1: 0x50}
    module.ndarray = ndarray
    module.from_dlpack = lambda x: ndarray(np.from_dlpack(x))
    current = lambda: types.SimpleNamespace(ptr=module.pointers[Device.current])  # noqa: E731
    module.cuda = types.SimpleNamespace(get_current_stream=current)
    ndarray.__module__ = "cupy"
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_cupy_arrays_give_cupy_arrays(cupy, dtype):
    tensors = inputs(dtype)
    out, lse = ccgpu.cca(*map(on_device, tensors), scale=0.5, return_lse=True)
    expected, expected_lse = ccgpu.cca(*tensors, scale=0.5, return_lse=True)
    assert type(out) is type(lse) is ndarray
    np.testing.assert_array_equal(out.array, expected.numpy())
    np.testing.assert_array_equal(lse.array, expected_lse.numpy())
    assert type(ccgpu.cca(*map(on_device, tensors))) is ndarray
    weights = ccgpu.affinity(*map(on_device, tensors[:2]))
    assert type(weights) is type(ccgpu.aggregate(weights, on_device(tensors[2]))) is ndarray


def test_cupy_arrays_of_bfloat16(cupy):
    bfloat16 = pytest.importorskip("ml_dtypes", reason="CuPy has bfloat16 by ml_dtypes").bfloat16
    tensors = inputs(torch.bfloat16)
    out = ccgpu.cca(*(ndarray(x.float().numpy().astype(bfloat16)) for x in tensors))
    assert out.array.dtype == bfloat16
    np.testing.assert_array_equal(out.array.astype(np.float32), ccgpu.cca(*tensors).float().numpy())


def test_cupy_arrays_are_not_copied(cupy, seen):
    tensors = inputs()
    out = ccgpu.cca(*map(on_device, tensors))
    assert [x.data_ptr() for x in seen[:3]] == [x.data_ptr() for x in tensors]
    assert out.array.ctypes.data == seen[3].data_ptr()


def test_cupys_current_stream_becomes_torchs(cupy, streams):
    tensors = inputs()
    ccgpu.cca(*map(on_device, tensors))
    cupy.pointers[0] = 0x40
    ccgpu.cca(*map(on_device, tensors))
    ccgpu.cca(*(on_device(x, index=1) for x in tensors))
    assert streams == [("default", "cuda:0"), "left", (0x40, "cuda:0"), "left", (0x50, "cuda:1"), "left"]
    assert Device.current == 0


def test_stream_is_left_after_an_error(cupy, streams):
    q, k, v = map(on_device, inputs())
    with pytest.raises(ValueError, match="cca: scale must be finite"):
        ccgpu.cca(q, k, v, scale=np.inf)
    assert streams == [("default", "cuda:0"), "left"]


def test_torch_without_cuda_says_so(cupy, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"cca: torch must see the CUDA device .*, got .*; install torch with CUDA"):
        ccgpu.cca(*map(on_device, inputs()))


def test_reversed_cupy_array_is_copied(cupy):
    q, k, v = map(on_device, inputs())
    turned = ndarray(q.array[..., ::-1].copy()[..., ::-1])
    np.testing.assert_array_equal(ccgpu.cca(turned, k, v).array, ccgpu.cca(q, k, v).array)
    assert (turned.copies, k.copies) == (1, 0)


def test_checks_in_cupys_words(cupy):
    q, k, v = map(on_device, inputs())
    with pytest.raises(ValueError, match=r"cca: k must have q's shape"):
        ccgpu.cca(q, ndarray(k.array[..., :3]), v)
    with pytest.raises(TypeError, match=r"cca: v must be float32, .*got int64; .*example v\.astype\(cupy\.float32\)"):
        ccgpu.cca(q, k, ndarray(v.array.astype(int)))
    with pytest.raises(
        TypeError, match=r"cca: k must have q's dtype float32, got float64; .*k\.astype\(cupy\.float32\)"
    ):
        ccgpu.cca(q, ndarray(k.array.astype(float)), v)


def test_arrays_on_two_devices(cupy, monkeypatch):
    q, k, v = map(on_device, inputs())
    real = torch.from_dlpack
    monkeypatch.setattr(arrays.torch, "from_dlpack", lambda x: real(x).to("meta") if x is k else real(x))
    with pytest.raises(ValueError, match="cca: k must be on q's device cpu, got meta; copy it there first"):
        ccgpu.cca(q, k, v)


def test_kinds_do_not_mix(cupy):
    q, k, v = inputs()
    message = (
        r"cca: q, k, v must be arrays of one kind, got q cupy\.ndarray, k torch\.Tensor, v torch\.Tensor; "
        r"convert k and v with cupy\.asarray, or q with torch\.as_tensor or torch\.from_dlpack$"
    )
    with pytest.raises(TypeError, match=message):
        ccgpu.cca(on_device(q), k, v)
    message = (
        r"got q cupy\.ndarray, k numpy\.ndarray, v torch\.Tensor; convert k and v with cupy\.asarray, or q and v with "
        r"numpy\.asarray, or q and k with torch\.as_tensor"
    )
    with pytest.raises(TypeError, match=message):
        ccgpu.cca(on_device(q), k.numpy(), v)
    with pytest.raises(TypeError, match=r"affinity: q, k must .* k builtins\.list; convert k with numpy\.asarray$"):
        ccgpu.affinity(q.numpy(), k.tolist())
    with pytest.raises(TypeError, match=r"aggregate: weights, v must .*convert v with numpy\.asarray, or weights with"):
        ccgpu.aggregate(q.numpy(), v)


# Numba ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def simulator():
    """numba.cuda of Numba's simulator."""
    numba = pytest.importorskip("numba")
    if not numba.config.ENABLE_CUDASIM:
        pytest.skip("Numba's simulator is off: there is a CUDA device (or NUMBA_ENABLE_CUDASIM=0)")
    from numba import cuda

    return cuda


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_numba_arrays_give_numba_arrays(simulator, seen, dtype):
    tensors = inputs(dtype)
    ours = [simulator.to_device(x.numpy()) for x in tensors]
    out, lse = ccgpu.cca(*ours, scale=0.5, return_lse=True)
    expected, expected_lse = ccgpu.cca(*tensors, scale=0.5, return_lse=True)
    assert type(out) is type(lse) is type(ours[0])
    np.testing.assert_array_equal(out.copy_to_host(), expected.numpy())
    np.testing.assert_array_equal(lse.copy_to_host(), expected_lse.numpy())
    assert [x.data_ptr() for x in seen[:3]] == [np.asarray(x).ctypes.data for x in ours]
    weights = ccgpu.affinity(*ours[:2])
    assert type(weights) is type(ccgpu.aggregate(weights, ours[2])) is type(ours[0])


def test_numba_arrays_in_a_kernel(simulator):
    """The result is an array that Numba's kernels accept."""

    @simulator.jit
    def double(x):
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                x[0, 0, i, j] *= 2

    out = ccgpu.cca(*(simulator.to_device(x.numpy()) for x in inputs()))
    before = out.copy_to_host()
    double[1, 1](out)
    np.testing.assert_array_equal(out.copy_to_host()[0, 0], 2 * before[0, 0])


def test_numba_arrays_of_bfloat16(simulator):
    bfloat16 = pytest.importorskip("ml_dtypes", reason="NumPy has bfloat16 by ml_dtypes only").bfloat16
    tensors = inputs(torch.bfloat16)
    out = ccgpu.cca(*(simulator.to_device(x.float().numpy().astype(bfloat16)) for x in tensors))
    np.testing.assert_array_equal(out.copy_to_host().astype(np.float32), ccgpu.cca(*tensors).float().numpy())


def test_checks_in_numbas_words(simulator):
    x = simulator.to_device(np.zeros((1, 2, 3, 4), int))
    with pytest.raises(
        TypeError,
        match=r"affinity: q must be float32, .*got int64; convert it, for example "
        r"numba\.cuda\.to_device\(q\.copy_to_host\(\)\.astype\(numpy\.float32\)\)",
    ):
        ccgpu.affinity(x, x)


class DeviceNDArrayBase:
    """A fake Numba device array in host memory."""

    def __init__(self, array, stream=0, index=1):
        self.array, self.stream = array, stream
        self.shape, self.strides, self.size, self.dtype = array.shape, array.strides, array.size, array.dtype
        device = types.SimpleNamespace(id=index)
        self.gpu_data = types.SimpleNamespace(context=types.SimpleNamespace(device=device))

    @property
    def __cuda_array_interface__(self):
        contiguous = self.array.flags.c_contiguous
        return {
            "shape": self.shape,
            "strides": None if contiguous else self.strides,
            "data": (self.array.ctypes.data, False),
            "typestr": self.dtype.str,
            "stream": self.stream or None,
            "version": 3,
        }

    def bind(self, stream):
        return DeviceNDArrayBase(self.array, stream)

    def view(self, dtype):
        return DeviceNDArrayBase(self.array.view(dtype), self.stream)


@pytest.fixture
def numba_cuda(monkeypatch, streams):
    """A fake numba.cuda with two devices, whose memory is on the host."""
    devices = []

    @contextlib.contextmanager
    def entered(index):
        devices.append(index)
        yield

    module = types.ModuleType("numba.cuda")
    module.devices = devices
    module.as_cuda_array = lambda x: DeviceNDArrayBase(x.numpy())
    gpus = types.SimpleNamespace(__getitem__=entered)
    module.gpus = type("Gpus", (), {"__getitem__": lambda self, index: gpus.__getitem__(index)})()
    library = types.ModuleType("numba.cuda.cudadrv.devicearray")
    library.DeviceNDArrayBase = DeviceNDArrayBase
    monkeypatch.setitem(sys.modules, "numba.cuda", module)
    monkeypatch.setitem(sys.modules, "numba.cuda.cudadrv.devicearray", library)

    def as_tensor(x, device):
        assert device == torch.device("cuda", 1)
        description = {**x.__cuda_array_interface__, "version": 3}
        del description["stream"]
        memory = types.SimpleNamespace(__array_interface__=description, owner=x)
        return torch.from_numpy(np.asarray(memory))  # refuses negative strides, as torch.as_tensor does

    monkeypatch.setattr(arrays.torch, "as_tensor", as_tensor)
    return module


def test_numba_device_arrays_give_device_arrays(numba_cuda, seen, streams):
    tensors = inputs()
    expected = ccgpu.cca(*tensors)
    del seen[:]
    out = ccgpu.cca(*(DeviceNDArrayBase(x.numpy()) for x in tensors))
    np.testing.assert_array_equal(out.array, expected.numpy())
    assert [x.data_ptr() for x in seen[:3]] == [x.data_ptr() for x in tensors]
    assert out.array.ctypes.data == seen[3].data_ptr()
    assert numba_cuda.devices == [None]  # the tensors are on the CPU, which has no index
    assert streams == [("default", "cuda:1"), "left"]


def test_numba_streams_wait_for_one_another(numba_cuda, streams):
    q, k, v = inputs()
    arguments = (DeviceNDArrayBase(x.numpy(), stream) for x, stream in ((q, 0x30), (k, 0), (v, 0x40)))
    out, lse = ccgpu.cca(*arguments, return_lse=True)
    own, legacy, other = (0x40, "cuda:1"), ("default", "cuda:1"), (0x30, "cuda:1")
    assert streams == [
        (own, "waits for", legacy),
        (own, "waits for", other),
        own,
        "left",
        (legacy, "waits for", own),
        (other, "waits for", own),
    ]
    assert out.stream == lse.stream == 0x40


@pytest.mark.parametrize("axes", [(3,), (1, 2), (0, 3)])
def test_reversed_numba_arrays(numba_cuda, axes):
    tensors = inputs()
    turned = (DeviceNDArrayBase(np.flip(np.flip(x.numpy(), axes).copy(), axes)) for x in tensors)
    out = ccgpu.cca(*turned)
    np.testing.assert_array_equal(out.array, ccgpu.cca(*tensors).numpy())
    empty = DeviceNDArrayBase(np.zeros((0, 2, 3, 4), np.float32)[..., ::-1])
    assert ccgpu.cca(empty, empty, empty).shape == (0, 2, 3, 4)


def test_numba_and_numpy_do_not_mix(simulator):
    q, k, _ = (x.numpy() for x in inputs())
    with pytest.raises(TypeError, match=r"convert k with numba\.cuda\.to_device, or q with numpy\.asarray$"):
        ccgpu.affinity(simulator.to_device(q), k)
