"""The choice of a backend: the first that suits a call and can run it, or the named one, never another."""

import ast
import importlib

import pytest
import torch

import ccgpu
from ccgpu import dispatch
from ccgpu.bridges import numba_cpu, numba_cuda
from ccgpu.bridges.cupy_cuda import device
from ccgpu.kernels.numba_cpu import dot_products
from tests.forked import run_forked

Q = torch.randn(1, 2, 3, 4)
META = torch.empty(1, 2, 3, 4, device="meta")


@pytest.fixture(autouse=True)
def _two_threads_and_no_environment(monkeypatch):
    monkeypatch.delenv("CCGPU_BACKEND", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.fixture
def ran(monkeypatch):
    """Record the backends that run, and what they run."""
    names = []

    class Recorder:
        def __init__(self, backend):
            self.backend = backend

        def __getattr__(self, name):
            if name == "why_not":
                return self.backend.module.why_not

            def record(*arguments):
                names.append(self.backend.name if name == "forward" else f"{self.backend.name} {name}")
                return getattr(self.backend.module, name)(*arguments)

            return record

    monkeypatch.setattr(dispatch, "BACKENDS", tuple(b._replace(module=Recorder(b)) for b in dispatch.BACKENDS))
    return names


def test_first_that_can_run(ran):
    q = Q.clone().requires_grad_()
    ccgpu.cca(q, Q, Q).sum().backward()
    assert ran == ["numba_cpu", "numba_cpu backward"]


def test_other_devices_take_the_torch_formulation():
    assert dispatch.choose(META, v=META).name == "torch"


@pytest.mark.parametrize("name", ["numba_cpu", "cpu", "torch", "reference"])
def test_argument_forces_forward_and_backward(ran, name):
    q = Q.clone().requires_grad_()
    ccgpu.cca(q, Q, Q, backend=name).sum().backward()
    assert ran == [name, f"{name} backward"]


def test_environment_variable_forces_and_the_argument_wins(ran, monkeypatch):
    monkeypatch.setenv("CCGPU_BACKEND", "reference")
    ccgpu.cca(Q, Q, Q)
    ccgpu.cca(Q, Q, Q, backend="torch")
    assert ran == ["reference", "torch"]
    monkeypatch.setenv("CCGPU_BACKEND", "")
    ccgpu.cca(Q, Q, Q)
    assert ran[-1] == "numba_cpu"


# Backward runs on the backend that forward ran on ---------------------------------------------------------------------


def set_backend(monkeypatch):
    monkeypatch.setenv("CCGPU_BACKEND", "reference")


def refuse_kernels(monkeypatch):
    """The call no longer suits the kernels: the choice would now be `cpu`."""
    backends = [b._replace(suits=lambda call: False) if b.name == "numba_cpu" else b for b in dispatch.BACKENDS]
    monkeypatch.setattr(dispatch, "BACKENDS", tuple(backends))


changes = pytest.mark.parametrize("change", [set_backend, refuse_kernels])


def stages_of(q, k, v):
    return ccgpu.aggregate(ccgpu.affinity(q, k).softmax(1), v)


@changes
def test_backward_runs_on_what_forward_ran_on(ran, monkeypatch, change):
    q = Q.clone().requires_grad_()
    out = ccgpu.cca(q, Q, Q)
    change(monkeypatch)
    out.sum().backward()
    assert ran == ["numba_cpu", "numba_cpu backward"]
    ccgpu.cca(Q, Q, Q)
    assert ran[2] in ("reference", "cpu")


@changes
def test_derivatives_of_the_stages_run_on_what_they_ran_on(ran, monkeypatch, change):
    q, k, v = (Q.clone().requires_grad_() for _ in "qkv")
    out = stages_of(q, k, v)
    change(monkeypatch)
    first = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
    torch.autograd.grad(sum(x.square().sum() for x in first), (q, k, v))
    assert len(ran) > 10
    assert {name.partition(" ")[0] for name in ran} == {"numba_cpu"}


@changes
def test_backward_of_lowered_inputs_runs_on_what_forward_ran_on(ran, monkeypatch, change):
    """The choice is made for the dtype of autocast."""
    backends = [
        b._replace(suits=lambda call: call.dtype == torch.float32) if b.name == "numba_cpu" else b
        for b in dispatch.BACKENDS
    ]
    monkeypatch.setattr(dispatch, "BACKENDS", tuple(backends))
    q = Q.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ccgpu.cca(q, Q, Q) + stages_of(q, Q, Q)
    change(monkeypatch)
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32
    assert {name.partition(" ")[0] for name in ran} == {"cpu"}


def test_second_derivatives_do_not_depend_on_a_change_between_the_passes(ran, monkeypatch):
    def penalty(change):
        q, k, v = (x.double().requires_grad_() for x in (Q, 2 * Q, 3 * Q))
        out = ccgpu.cca(q, k, v)
        change()
        (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        return torch.autograd.grad(dq.square().sum(), (q, k, v))

    unchanged, changed = penalty(lambda: None), penalty(lambda: set_backend(monkeypatch))
    assert ran == ["numba_cpu", "numba_cpu backward", "numba_cpu backward"] * 2  # of out, and of dout's own graph
    for a, b in zip(unchanged, changed, strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiled_program_chooses_at_each_run(ran, monkeypatch):
    """It is traced once, without a choice, which would add guards on the sizes."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: (ccgpu.cca(q, Q, Q) + stages_of(q, Q, Q)).sum(), backend="aot_eager")
    for name in ("cpu", "reference"):
        monkeypatch.setenv("CCGPU_BACKEND", name)
        del ran[:]
        compiled(Q.clone().requires_grad_()).backward()
        assert f"{name} backward" in ran
        assert {entry.partition(" ")[0] for entry in ran} == {name}


def test_bad_environment_variable_is_named(monkeypatch):
    monkeypatch.setenv("CCGPU_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"cca: CCGPU_BACKEND must be one of \[.*\], got 'cuda'; "):
        ccgpu.cca(Q, Q, Q)


@pytest.mark.parametrize("name", ["numba_cpu", "cpu", "cupy", "numba_cuda", "reference"])
def test_named_backend_that_cannot_run_raises(name):
    with pytest.raises(
        RuntimeError, match=rf"affinity: backend='{name}' cannot run this call: .*on meta; use one of \['torch'\]"
    ):
        dispatch.choose(META, name, function="affinity")


def test_backends_lists_all_with_reasons(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(numba_cuda, "simulated", lambda: False)
    for module in (device, numba_cuda):
        monkeypatch.setattr(module, "_REASONS", {0: f"no such thing: {module.__name__}"})
    on_cpu, on_cuda = ({b.name: b for b in ccgpu.backends(device)} for device in ("cpu", "cuda"))
    assert list(on_cpu) == list(on_cuda) == ["numba_cpu", "cpu", "cupy", "numba_cuda", "torch", "reference"]
    assert [b.name for b in on_cpu.values() if b.available] == ["numba_cpu", "cpu", "torch", "reference"]
    assert [b.name for b in on_cuda.values() if b.available] == ["torch"]
    assert "on cuda" in on_cuda["cpu"].reason
    assert on_cuda["cupy"].reason == "no such thing: ccgpu.bridges.cupy_cuda.device"
    assert on_cuda["numba_cuda"].reason == "no such thing: ccgpu.bridges.numba_cuda"
    assert "unavailable" in str(on_cuda["cpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module in (device, numba_cuda):
        monkeypatch.setattr(module, "_REASONS", {})
    on_cuda = {b.name: b for b in ccgpu.backends("cuda")}
    assert not any(b.available for b in on_cuda.values())
    assert all("no CUDA device" in on_cuda[name].reason for name in ("cupy", "numba_cuda", "torch"))


@pytest.mark.parametrize("name", ["float32", "float64", "float16", "bfloat16"])
def test_backends_say_which_arithmetic_a_dtype_gets(name, monkeypatch):
    def said():
        return ccgpu.backends("cpu", dtype=getattr(torch, name))[0].reason

    converted = dict.fromkeys(("float16", "bfloat16"), " converted to float32 in registers")
    expected = {True: {**converted, "bfloat16": " by dot-product instructions"}, False: converted}
    for available, endings in expected.items():
        monkeypatch.setattr(dot_products, "AVAILABLE", available)
        assert said() == f"CPU kernels, compiled by Numba at the first call: {name}{endings.get(name, '')}"


def test_backends_of_a_dtype_without_kernels():
    assert ccgpu.backends("cpu", dtype=torch.int8)[0].name == "numba_cpu"


# The kernels for the CPU: which calls they suit, and when they cannot run ---------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(100,), (1, 100), (100, 1), (7, 9), (1, 1), (2, 3, 4)])
def test_cpu_tensors_take_the_kernels_whatever_their_size_and_dtype(monkeypatch, sizes, dtype):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    x = torch.zeros(1, 2, *sizes, dtype=dtype)
    assert dispatch.choose(x, v=x).name == "numba_cpu"
    assert dispatch.choose(x).name == "numba_cpu"  # a stage


@pytest.fixture
def numba_reason(monkeypatch):
    """A function that returns why Numba cannot be used, looked up again."""
    dispatch._warn_once.cache_clear()
    numba_cpu._reason.cache_clear()
    yield lambda: next(b for b in ccgpu.backends("cpu") if b.name == "numba_cpu").reason
    numba_cpu._reason.cache_clear()


def test_numba_that_cannot_be_used_is_passed_over_with_one_warning(numba_reason, monkeypatch, caplog):
    def fail(name):
        raise ImportError("Numba needs NumPy 2.4 or less\nand more")

    monkeypatch.setattr(importlib, "import_module", fail)
    reason = numba_reason()
    assert reason.startswith("Numba cannot be used (Numba needs NumPy 2.4 or less); install a release of numba")
    for _ in range(2):
        assert dispatch.choose(Q, v=Q).name == "cpu"
    (record,) = caplog.records
    assert record.getMessage() == f"ccgpu: backend 'numba_cpu' cannot run, a slower one does: {reason}"
    with pytest.raises(RuntimeError, match="backend='numba_cpu' cannot run this call: Numba cannot be used"):
        dispatch.choose(Q, "numba_cpu", Q)


def test_numba_that_compiles_nothing_is_passed_over(numba_reason, monkeypatch):
    monkeypatch.setattr(importlib.import_module("numba").config, "DISABLE_JIT", 1)
    assert numba_reason() == "Numba compiles nothing, because NUMBA_DISABLE_JIT is set"
    assert dispatch.choose(Q, v=Q).name == "cpu"


def test_reference_backend_differs_in_bits_only():
    q, v = Q.clone().requires_grad_(), Q.clone().requires_grad_()
    a, b = ccgpu.cca(q, Q, v, backend="reference"), ccgpu.cca(q, Q, v, backend="cpu")
    torch.testing.assert_close(a, b)
    for x, y in zip(torch.autograd.grad(a.sum(), (q, v)), torch.autograd.grad(b.sum(), (q, v)), strict=True):
        torch.testing.assert_close(x, y)


def test_import_is_light():
    """No heavy or optional library is imported with ccgpu: no Numba, CuPy, TensorBoard or PIL."""
    code = (
        "import sys, torch; before = set(sys.modules); import ccgpu; new = set(sys.modules) - before;"
        "print(sorted({name.split('.')[0] for name in new}))"
    )
    answer = run_forked(code)
    assert answer.returncode == 0, answer.stderr
    assert set(ast.literal_eval(answer.stdout)) <= {"ccgpu", "numpy", "torch"}


def test_no_backend_for_a_device(monkeypatch):
    monkeypatch.setattr(dispatch, "BACKENDS", tuple(b for b in dispatch.BACKENDS if b.name != "torch"))
    with pytest.raises(
        RuntimeError, match=r"cca: a backend must be able to run on meta, got none \(numba_cpu: it runs CPU"
    ):
        dispatch.choose(META)
