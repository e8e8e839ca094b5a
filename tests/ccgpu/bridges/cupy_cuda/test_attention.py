"""The bridge to the CUDA kernels, with CPU tensors and NumPy's reference behind the launcher.

The reference reads and writes the same memory as the kernels, so layouts, padding, alignment and dtypes are checked
exactly. One test runs the kernels themselves; tests/kernels/cuda/test_kernels.py runs all of them.
"""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ccgpu
from ccgpu import dispatch
from ccgpu.bridges.cupy_cuda.attention import Kernels
from ccgpu.bridges.cupy_cuda.stages import Stages
from ccgpu.kernels import reference
from ccgpu.kernels.cuda.configurations import Limits
from ccgpu.layouts import NAMES, empty_energies, energy_dtype
from tests.ccgpu.problems import Problem, attend_plainly, check_errors, check_form, expected, layouts
from tests.ccgpu.stage_problems import criss_cross, numpy
from tests.cuda_on_cpu.launcher import WRITTEN, MachineLauncher

DTYPES = list(NAMES)


class ReferenceLauncher:
    """A launcher that runs kernels.reference on a launch's memory, in the kernels' layout."""

    def __init__(self, capability=(9, 0)):
        self.launched = []
        self._limits = Limits(capability, 227 * 1024, 132, 50 * 2**20)

    def limits(self, device):
        return self._limits

    def launch(self, launches, tensors, counters, scale):
        assert counters.dtype == torch.int32
        assert counters.shape == (len(launches), launches[0].counters)
        assert not counters.any()
        kernel = launches[0].configuration.kernel
        self.launched.append(launches[0])
        images, positions, depth, channels, neighbours = struct.unpack_from("<5i", launches[0].numbers)
        columns = dict.fromkeys(("q", "k", "dq", "dk"), depth)
        columns |= dict.fromkeys(("v", "out", "dout", "dv"), channels)
        columns["weights"] = neighbours
        memory = {}
        for name, tensor in tensors.items():
            assert tensor.data_ptr() % 16 == 0, name
            width = columns.get(name, launches[0].scratch if name == "scratch" else 1)
            assert tensor.numel() == images * positions * width, name
            if name in ("weights", "lse", "scratch", "dlse", "delta"):
                assert tensor.dtype == energy_dtype(next(iter(tensors.values())).dtype), name
            elif name in columns:
                assert width * tensor.element_size() % 16 == 0, name
            memory[name] = tensor.as_strided((images, positions, width), (positions * width, width, 1))
            if name in WRITTEN[kernel]:
                memory[name].fill_(np.nan)
        sizes = self.sizes
        arrays = {name: x.double().numpy().transpose(0, 2, 1).reshape(images, -1, *sizes) for name, x in memory.items()}
        for name in ("lse", "dlse"):
            if name in arrays:
                arrays[name] = arrays[name][:, 0]
        results = getattr(self, "_" + kernel)(arrays, scale)
        for name, x in results.items():
            memory[name].copy_(torch.from_numpy(x.reshape(images, -1, positions).transpose(0, 2, 1).copy()))

    def _forward(self, a, scale):
        out, lse = reference.forward(a["q"], a["k"], a["v"], scale)
        return {"out": out, "lse": lse}

    def _backward(self, a, scale):
        names = ("dout", "q", "k", "v", "out", "lse", "dlse")
        gradients = reference.backward(*(a[name] for name in names), scale)
        delta = (a["dout"] * a["out"]).sum(1) - a["dlse"]
        return {"delta": delta, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}

    def _affinity(self, a, scale):
        return {"weights": reference.affinity(a["q"], a["k"])}

    def _aggregate(self, a, scale):
        return {"out": reference.aggregate(a["weights"], a["v"])}

    def _aggregate_transposed(self, a, scale):
        return {"out": reference.aggregate_transposed(a["weights"], a["v"])}


LAYOUTS = ["contiguous", "channels_last", "reversed", "sliced", "misaligned", "expanded"]


@st.composite
def problems(draw):
    sizes = draw(
        st.one_of(
            st.tuples(st.integers(1, 7)),
            st.tuples(st.integers(1, 4), st.integers(1, 4)),
            st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
        )
    )
    batch, dtype = draw(st.integers(0, 3)), draw(st.sampled_from(DTYPES))
    depth, channels = draw(st.sampled_from([1, 3, 4, 8, 16])), draw(st.sampled_from([1, 2, 5, 8, 9, 16, 24]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shapes = [(batch, n, *sizes) for n in (depth, depth, channels, channels)]
    kinds = draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 5))
    tensors = [
        layouts(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype), kind)
        for shape, kind in zip(shapes, kinds, strict=False)
    ]
    dlse = torch.randn(batch, 1, *sizes, generator=generator, dtype=torch.float64).to(energy_dtype(dtype))
    return *tensors, layouts(dlse, kinds[4])[:, 0], draw(st.sampled_from([1.0, -0.5]))


def check(name, ours, truth, like):
    assert ours.shape == truth.shape, name
    assert ours.stride() == like.stride(), name
    assert ours.dtype == like.dtype, name
    # One rounding of the reference's result; and sums over padded channels have another order.
    unit = torch.finfo(ours.dtype).eps
    atol = unit * np.abs(truth).max(initial=0.0) + 1e-13
    np.testing.assert_allclose(ours.double().numpy(), truth, rtol=unit, atol=atol, err_msg=name)


@given(problem=problems())
@settings(max_examples=300, deadline=None)
def test_every_layout_matches_reference(problem):
    q, k, v, dout, dlse, scale = problem
    before = [x.clone() for x in (q, k, v, dout, dlse)]
    launcher = ReferenceLauncher()
    launcher.sizes = tuple(q.shape[2:])
    bridge = Kernels(launcher)
    out, lse = bridge.forward(q, k, v, scale)
    gradients = bridge.backward(dout, q, k, v, out, lse, dlse, scale)
    arrays = [x.double().numpy() for x in (q, k, v)]
    truth, truth_lse = reference.forward(*arrays, scale)
    wide = reference.backward(dout.double().numpy(), *arrays, truth, truth_lse, dlse.double().numpy(), scale)
    check("out", out, truth, torch.empty_like(v))
    check("lse", lse, truth_lse, torch.empty(lse.shape, dtype=energy_dtype(q.dtype)))
    for name, ours, theirs, x in zip(("dq", "dk", "dv"), gradients, wide, (q, k, v), strict=True):
        check(name, ours, theirs, torch.empty_like(x))
    assert len(launcher.launched) == (2 if q.shape[0] else 0)
    for x, y in zip((q, k, v, dout, dlse), before, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("sizes", [(7,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_last_passes_without_a_copy(sizes, dtype):
    """The kernels get the addresses of the tensors themselves and of the result."""

    class Recorder(ReferenceLauncher):
        def launch(self, launches, tensors, counters, scale):
            self.addresses = {name: x.data_ptr() for name, x in tensors.items()}
            super().launch(launches, tensors, counters, scale)

    launcher = Recorder()
    launcher.sizes = sizes
    bridge = Kernels(launcher)
    q, k, v, dout = (layouts(torch.randn(2, n, *sizes).to(dtype), "channels_last") for n in (8, 8, 16, 16))
    out, lse = bridge.forward(q, k, v, 1.0)
    assert launcher.addresses == {
        name: x.data_ptr() for name, x in {"q": q, "k": k, "v": v, "out": out, "lse": lse}.items()
    }
    dlse = torch.zeros_like(lse)
    dq, dk, dv = bridge.backward(dout, q, k, v, out, lse, dlse, 1.0)
    delta = launcher.addresses.pop("delta")
    given = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "dout": dout, "dlse": dlse, "dq": dq, "dk": dk, "dv": dv}
    assert launcher.addresses == {name: x.data_ptr() for name, x in given.items()}
    assert delta not in launcher.addresses.values()


@pytest.mark.parametrize("batch_and_sizes", [(0, (3, 4)), (2, (0, 4)), (2, (3, 0)), (1, (0,))])
def test_nothing_to_compute_is_not_launched(batch_and_sizes):
    batch, sizes = batch_and_sizes
    launcher = ReferenceLauncher()
    q, v = torch.randn(batch, 8, *sizes), torch.randn(batch, 5, *sizes)
    out, lse = Kernels(launcher).forward(q, q, v, 1.0)
    assert (out.shape, lse.shape) == (v.shape, (batch, *sizes))
    gradients = Kernels(launcher).backward(v, q, q, v, out, lse, lse, 1.0)
    assert [x.shape for x in gradients] == [q.shape, q.shape, v.shape]
    assert launcher.launched == []


def arithmetic_of(dtype, capability=(9, 0)):
    launcher = ReferenceLauncher(capability)
    launcher.sizes = (2, 2)
    x = torch.randn(1, 8, 2, 2).to(dtype)
    Kernels(launcher).forward(x, x, x, 1.0)
    return launcher.launched[0].configuration.arithmetic


def test_arithmetic_follows_dtype_and_device():
    assert [arithmetic_of(dtype) for dtype in DTYPES] == ["f32", "bf16", "f16", "f64"]
    assert [arithmetic_of(dtype, (7, 5)) for dtype in DTYPES] == ["f32", "bf16_fma", "f16_fma", "f64"]


@pytest.fixture
def _float32_settings():
    yield
    torch.set_float32_matmul_precision("highest")
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.backends.fp32_precision = "none"


@pytest.mark.usefixtures("_float32_settings")
@pytest.mark.filterwarnings("error")
def test_tf32_follows_torchs_settings_at_the_call():
    assert arithmetic_of(torch.float32) == "f32"
    torch.set_float32_matmul_precision("high")
    assert arithmetic_of(torch.float32) == "tf32"
    assert arithmetic_of(torch.float32, (7, 5)) == "f32"
    assert arithmetic_of(torch.float64) == "f64"
    torch.set_float32_matmul_precision("highest")
    assert arithmetic_of(torch.float32) == "f32"
    torch.backends.cuda.matmul.allow_tf32 = True
    assert arithmetic_of(torch.float32) == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = False
    assert arithmetic_of(torch.float32) == "f32"


@pytest.mark.usefixtures("_float32_settings")
@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9 has no fp32_precision"
)
def test_tf32_follows_the_newer_settings_too():
    """The older two settings raise after these have been used."""
    torch.backends.fp32_precision = "tf32"
    assert arithmetic_of(torch.float32) == "tf32"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert arithmetic_of(torch.float32) == "f32"
    torch.backends.fp32_precision = "none"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert arithmetic_of(torch.float32) == "tf32"


# The stages and the kernels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(7,), (5, 4), (1, 6), (6, 1), (2, 3, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stages_on_every_layout(dtype, sizes):
    """With channels that fill 16 bytes and some that do not; weights in the dtype of energies, or of v."""
    generator = torch.Generator().manual_seed(1)
    for turn, (depth, channels) in enumerate([(16, 32), (5, 9)]):
        shapes = [(2, n, *sizes) for n in (depth, depth, channels, criss_cross(sizes))]
        for shift in range(len(LAYOUTS)):
            kinds = [LAYOUTS[(shift + turn + n) % len(LAYOUTS)] for n in range(4)]
            dtypes = (dtype, dtype, dtype, dtype if shift % 2 else energy_dtype(dtype))
            q, k, v, weights = (
                layouts(torch.randn(shape, generator=generator, dtype=torch.float64).to(wanted), kind)
                for shape, kind, wanted in zip(shapes, kinds, dtypes, strict=True)
            )
            launcher = ReferenceLauncher()
            launcher.sizes = sizes
            stages, arrays = Stages(launcher), numpy(q, k, v, weights)
            check("affinity", stages.affinity(q, k), reference.affinity(*arrays[:2]), empty_energies(q))
            for name in ("aggregate", "aggregate_transposed"):
                truth = getattr(reference, name)(arrays[3], arrays[2])
                check(name, getattr(stages, name)(weights, v), truth, torch.empty_like(v))
            kernels = [launch.configuration.kernel for launch in launcher.launched]
            assert kernels == ["affinity", "aggregate", "aggregate_transposed"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_on_every_layout(cuda_on_cpu, dtype):
    generator = torch.Generator().manual_seed(2)
    for turn, (sizes, depth, channels) in enumerate([((5, 4), 16, 32), ((2, 3, 4), 5, 9)]):
        shapes = [(2, n, *sizes) for n in (depth, depth, channels, channels)]
        for shift in range(len(LAYOUTS)):
            kinds = [LAYOUTS[(shift + turn + n) % len(LAYOUTS)] for n in range(4)]
            q, k, v, dout = (
                layouts(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype), kind)
                for shape, kind in zip(shapes, kinds, strict=True)
            )
            problem = Problem((q, k, v), dout, torch.randn(2, *sizes, generator=generator), 0.5)
            launcher = MachineLauncher(cuda_on_cpu)
            bridge = Kernels(launcher)
            out, lse = bridge.forward(q, k, v, 0.5)
            ours = (out, lse, *bridge.backward(dout, q, k, v, out, lse, problem.dlse, 0.5))
            check_errors(ours, attend_plainly(problem), expected(problem), problem)
            check_form(ours, problem)
            assert [launch.configuration.kernel for launch in launcher.launched] == ["forward", "backward"]


# The bridge behind cca ------------------------------------------------------------------------------------------------


class Behind:
    """A backend: the bridge for maps of given sizes, with the reference behind it."""

    def __init__(self, sizes):
        launcher = ReferenceLauncher()
        launcher.sizes = sizes
        bridge = Kernels(launcher)
        self.launcher, self.forward, self.backward = launcher, bridge.forward, bridge.backward
        self.why_not = lambda call: None


@pytest.fixture
def behind_cca(monkeypatch):
    """Put the bridge behind `ccgpu.cca` for CPU tensors."""
    module = Behind((3, 4))
    replaced = [b._replace(module=module) for b in dispatch.BACKENDS if b.name == "cupy"]
    monkeypatch.setattr(dispatch, "BACKENDS", tuple(replaced))
    return module


@pytest.mark.parametrize("last", [False, True])
def test_op_runs_on_the_bridge_with_autograd(behind_cca, last):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 4, generator=generator, dtype=torch.float64) for n in (5, 5, 6))
    if last:
        q, k, v = (layouts(x, "channels_last") for x in (q, k, v))
    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: ccgpu.cca(*x, return_lse=True), leaves)
    torch.library.opcheck(torch.ops.ccgpu.cca_forward, (*leaves, 1.0, None))
    assert {launch.configuration.kernel for launch in behind_cca.launcher.launched} == {"forward", "backward"}


def test_kernels_get_the_dtype_of_autocast_and_nothing_inside_is_cast(behind_cca):
    q = torch.randn(2, 5, 3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = ccgpu.cca(q, q, q, return_lse=True)
        assert behind_cca.launcher.launched[-1].configuration.arithmetic == "bf16"
        wide, _ = behind_cca.forward(q, q, q, 1.0)  # the bridge itself, with autocast on
    assert (out.dtype, lse.dtype, wide.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert behind_cca.launcher.launched[-1].configuration.arithmetic == "f32"
    torch.testing.assert_close(wide, ccgpu.cca(q, q, q), rtol=0, atol=0)


def test_expanded_gradient(behind_cca):
    """In `out.sum().backward()`, dout has strides 0."""
    q = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    ccgpu.cca(q, q.detach(), q.detach()).sum().backward()
    arrays = [q.detach().numpy()] * 3
    out, lse = reference.forward(*arrays, 1.0)
    dq, _, _ = reference.backward(np.ones_like(out), *arrays, out, lse, np.zeros_like(lse), 1.0)
    torch.testing.assert_close(q.grad, torch.from_numpy(dq))


def test_temporaries_of_native_calls_are_counters_and_delta():
    """The shapes of all tensors that the bridge allocates, results included."""
    launcher = ReferenceLauncher()
    launcher.sizes = (3, 4)
    sizes = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and ("empty" in str(function) or "zeros" in str(function)):
                sizes.append(tuple(result.shape))
            return result

    q, v = (layouts(torch.randn(2, n, 3, 4), "channels_last") for n in (8, 16))
    out, lse = Kernels(launcher).forward(q, q, v, 1.0)
    launcher.launch = lambda *arguments: None
    with Counting():
        Kernels(launcher).forward(q, q, v, 1.0)
    assert sorted(sizes) == sorted([(1, 96), (2, 3, 4), (2, 16, 3, 4)])
    sizes.clear()
    with Counting():
        Kernels(launcher).backward(out, q, q, v, out, lse, lse, 1.0)
    assert sorted(sizes) == sorted([(1, 96), (2, 3, 4), (2, 8, 3, 4), (2, 8, 3, 4), (2, 16, 3, 4)])
