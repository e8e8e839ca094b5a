"""Arrays of other libraries in `ccgpu.cca`: the same memory, the library's stream, and no mixing."""

import contextlib
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import ccgpu
from ccgpu import arrays


class ndarray:
    """A CuPy array on the CPU: what DLPack and the bridge see of one."""

    def __init__(self, tensor, index=0):
        self.tensor = tensor
        self.device = Device(index)
        self.strides = tuple(s * tensor.element_size() for s in tensor.stride())
        self.copies = 0

    def copy(self):
        self.copies += 1
        return ndarray(self.tensor.clone(), self.device.id)

    def __dlpack__(self, stream=None, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


class Device(contextlib.AbstractContextManager):
    current = 0

    def __init__(self, index):
        self.id = index

    def __enter__(self):
        self._before, Device.current = Device.current, self.id

    def __exit__(self, *error):
        Device.current = self._before


@pytest.fixture
def cupy(monkeypatch):
    """A module in the place of CuPy, and a record of torch's stream while something ran."""
    module = types.ModuleType("cupy")
    module.pointers = {0: 0, 1: 0x50}
    module.entered = []
    module.ndarray = ndarray
    module.from_dlpack = lambda x: ndarray(torch.from_dlpack(x))
    current = lambda: types.SimpleNamespace(ptr=module.pointers[Device.current])  # noqa: E731
    module.cuda = types.SimpleNamespace(get_current_stream=current)
    ndarray.__module__ = "cupy"
    monkeypatch.setitem(sys.modules, "cupy", module)

    @contextlib.contextmanager
    def stream(which):
        module.entered.append(which)
        yield

    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda pointer, device: (pointer, str(device)))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: ("default", str(device)))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    return module


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, n, 3, 4, generator=generator).to(dtype) for n in (4, 4, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_cupy_arrays_give_cupy_arrays(cupy, dtype):
    tensors = inputs(dtype)
    out, lse = ccgpu.cca(*map(ndarray, tensors), scale=0.5, return_lse=True)
    expected, expected_lse = ccgpu.cca(*tensors, scale=0.5, return_lse=True)
    assert type(out) is type(lse) is ndarray
    assert torch.equal(out.tensor, expected)
    assert torch.equal(lse.tensor, expected_lse)
    assert type(ccgpu.cca(*map(ndarray, tensors))) is ndarray


def test_cupy_arrays_are_not_copied(cupy, monkeypatch):
    seen = []
    real = torch.ops.ccgpu.cca_forward

    def record(q, k, v, *rest):
        seen.extend((q, k, v))
        seen.append(real(q, k, v, *rest))
        return seen[-1]

    monkeypatch.setattr(torch.ops.ccgpu, "cca_forward", record)
    tensors = inputs()
    out = ccgpu.cca(*map(ndarray, tensors))
    assert [x.data_ptr() for x in seen[:3]] == [x.data_ptr() for x in tensors]
    assert out.tensor.data_ptr() == seen[3][0].data_ptr()


def test_cupys_current_stream_becomes_torchs(cupy):
    tensors = inputs()
    ccgpu.cca(*map(ndarray, tensors))
    cupy.pointers[0] = 0x40
    ccgpu.cca(*map(ndarray, tensors))
    ccgpu.cca(*(ndarray(x, index=1) for x in tensors))
    assert cupy.entered == [("default", "cuda:0"), (0x40, "cuda:0"), (0x50, "cuda:1")]
    assert Device.current == 0


def test_cupy_results_carry_no_gradient(cupy):
    tensors = inputs()
    with torch.enable_grad():
        assert not ccgpu.cca(*map(ndarray, tensors)).tensor.requires_grad


def test_reversed_cupy_array_is_copied(cupy):
    q, k, v = map(ndarray, inputs())
    q.strides = tuple(-s for s in q.strides)
    ccgpu.cca(q, k, v)
    assert (q.copies, k.copies) == (1, 0)


def test_kinds_do_not_mix(cupy):
    q, k, v = inputs()
    message = (
        r"cca: q, k, v must be arrays of one kind, got q cupy\.ndarray, k torch\.Tensor, v torch\.Tensor; "
        r"convert k and v with cupy\.from_dlpack, or the others with torch\.from_dlpack"
    )
    with pytest.raises(TypeError, match=message):
        ccgpu.cca(ndarray(q), k, v)
    with pytest.raises(TypeError, match=r"v numpy\.ndarray; convert v with cupy"):
        ccgpu.cca(ndarray(q), ndarray(k), v.numpy())


def test_checks_hold_for_cupy_arrays(cupy):
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"cca: k must have q's shape"):
        ccgpu.cca(ndarray(q), ndarray(k[..., :3]), ndarray(v))
    with pytest.raises(ValueError, match="cca: scale must be finite"):
        ccgpu.cca(ndarray(q), ndarray(k), ndarray(v), scale=np.inf)
    with pytest.raises(ValueError, match="cca: backend must be one of"):
        ccgpu.cca(ndarray(q), ndarray(k), ndarray(v), backend="gpu")


def test_other_arguments_keep_their_message(cupy):
    q, k, v = inputs()
    with pytest.raises(TypeError, match=r"cca: q must be a torch\.Tensor, got numpy\.ndarray; "):
        ccgpu.cca(q.numpy(), k, v)
    assert arrays.kind_of("cca", q=q, k=k, v=v) is None


def test_calls_with_tensors_do_not_import_cupy():
    """Not even where it is installed."""
    code = (
        "import sys, torch, ccgpu; x = torch.zeros(1, 2, 3, 4); ccgpu.cca(x, x, x);"
        "assert 'cupy' not in sys.modules\n"
        "try: ccgpu.cca(x.numpy(), x, x)\n"
        "except TypeError: pass\n"
        "assert 'cupy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
