"""affinity and aggregate as ops of torch: derivatives, opcheck, compile, export, fake tensors, autocast, vmap."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import ccgpu
from benchmarks.measure import peak_bytes
from ccgpu.bridges import reference
from ccgpu.layouts import energy_dtype
from tests.ccgpu.problems import check_compiled_once, layouts
from tests.ccgpu.stage_problems import inputs, staged, transposed

BACKENDS = [b.name for b in ccgpu.backends("cpu") if b.available]
RANKS = [(5,), (3, 4), (2, 3, 3)]


@pytest.mark.parametrize("sizes", RANKS)
@pytest.mark.parametrize("stage", ["affinity", "aggregate", "transposed"])
def test_gradcheck_and_gradgradcheck(stage, sizes):
    q, k, v, weights = inputs(sizes, batch=1)
    function, arguments = {
        "affinity": (ccgpu.affinity, (q, k)),
        "aggregate": (ccgpu.aggregate, (weights, v)),
        "transposed": (transposed, (weights, v)),
    }[stage]
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize("needed", [0, 1])
def test_only_the_needed_gradient_is_computed(needed):
    q, k, v, weights = inputs((3, 4), grad=False)
    for function, arguments in ((ccgpu.affinity, (q, k)), (ccgpu.aggregate, (weights, v)), (transposed, (weights, v))):
        arguments = [x.clone().requires_grad_(i == needed) for i, x in enumerate(arguments)]
        out = function(*arguments)
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == 2 * arguments[1].numel() * 7


@pytest.mark.parametrize("sizes", RANKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(sizes, dtype):
    q, k, v, weights = inputs(sizes, dtype)
    ops = torch.ops.ccgpu
    wide = weights.detach().to(energy_dtype(dtype)).requires_grad_()
    for op, *arguments in (
        (ops.affinity, q, k),
        (ops.aggregate, weights, v),
        (ops.aggregate, wide, v),
        (ops.aggregate_transposed, wide, v),
    ):
        torch.library.opcheck(op, (*arguments, None), rtol=1e-2, atol=1e-2)
        last = [layouts(x.detach(), "channels_last").requires_grad_() for x in arguments]
        torch.library.opcheck(op, (*last, None), rtol=1e-2, atol=1e-2)


def test_compile_without_graph_break_and_with_dynamic_sizes():
    check_compiled_once(lambda q, k, v: staged(q * 2, k, v, 0.5).relu().sum(), lambda sizes: inputs(sizes)[:3])


def test_compile_with_inductor():
    torch._dynamo.reset()
    q, k, v, _ = inputs((5, 6), torch.float32, grad=False)
    torch.testing.assert_close(torch.compile(staged, fullgraph=True)(q, k, v), staged(q, k, v))


class Staged(torch.nn.Module):
    def forward(self, q, k, v):
        return staged(q, k, v, 0.5)


def test_export_with_dynamic_sizes():
    q, k, v, _ = inputs((5, 6), torch.float32, grad=False)
    batch, h, w = torch.export.Dim("batch"), torch.export.Dim("h", min=2), torch.export.Dim("w", min=2)
    shape = {0: batch, 2: h, 3: w}
    program = torch.export.export(Staged(), (q, k, v), dynamic_shapes={"q": shape, "k": shape, "v": shape})
    other = inputs((4, 9), torch.float32, batch=3, grad=False)[:3]
    torch.testing.assert_close(program.module()(*other), ccgpu.cca(*other, scale=0.5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_fake_tensors_of_any_device(dtype):
    with FakeTensorMode():
        q = torch.empty(2, 3, 4, 5, device="cuda", dtype=dtype)
        v = torch.empty(2, 7, 4, 5, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
        energies = ccgpu.affinity(q, q)
        out = ccgpu.aggregate(energies, v)
    assert energies.device.type == out.device.type == "cuda"
    assert energies.shape == (2, 8, 4, 5)
    assert energies.movedim(1, -1).is_contiguous()
    assert energies.dtype == energy_dtype(dtype)
    assert (out.shape, out.stride(), out.dtype) == (v.shape, v.stride(), dtype)


def test_autocast_lowers_maps_and_leaves_wide_weights_and_float64():
    q, k, v, weights = inputs((3, 4), torch.float32)
    low = [x.detach().bfloat16() for x in (q, k, v)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        energies = ccgpu.affinity(q, k.detach().bfloat16())  # dtypes may differ: autocast makes them equal
        out = ccgpu.aggregate(weights, v)
        half_weights = ccgpu.aggregate(weights.half(), v)
        wide = ccgpu.aggregate(weights.double(), v.double())
    assert energies.dtype == torch.float32
    torch.testing.assert_close(energies, ccgpu.affinity(low[0], low[1]), rtol=0, atol=0)
    assert out.dtype == half_weights.dtype == torch.bfloat16
    torch.testing.assert_close(out, ccgpu.aggregate(weights, low[2]), rtol=0, atol=0)
    assert not torch.equal(out, ccgpu.aggregate(weights.bfloat16(), low[2]))  # float32 weights were not rounded
    torch.testing.assert_close(half_weights, ccgpu.aggregate(weights.half().bfloat16(), low[2]), rtol=0, atol=0)
    assert wide.dtype == torch.float64
    (energies.sum() + out.float().sum()).backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in (q, v, weights))


def test_derivatives_are_not_lowered_by_autocast():
    q, k, v, weights = inputs((3, 4), torch.float32)
    outputs = (ccgpu.affinity(q, k), ccgpu.aggregate(weights, v))
    gradients = tuple(torch.randn_like(x) for x in outputs)
    expected = torch.autograd.grad(outputs, (q, k, v, weights), gradients, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = torch.autograd.grad(outputs, (q, k, v, weights), gradients)
    assert all(torch.equal(a, b) for a, b in zip(within, expected, strict=True))


@pytest.mark.parametrize("dims", [(0, 0, 0), (1, None, 2), (None, None, 3)])
def test_vmap(dims):
    mapped = [torch.randn(3, 2, n, 4, 5) for n in (6, 6, 7)]
    arguments = [x[0] if d is None else x.movedim(0, d) for x, d in zip(mapped, dims, strict=True)]
    out = torch.func.vmap(staged, in_dims=dims)(*arguments)
    for i in range(3):
        single = [x[0] if d is None else x[i] for x, d in zip(mapped, dims, strict=True)]
        torch.testing.assert_close(out[i], ccgpu.cca(*single))


def test_vmap_of_derivatives():
    """The vmap rules of all three ops, for many output gradients at once, to the second order."""
    q, k, v, _ = inputs((3, 4))
    out = staged(q, k, v)
    many = torch.randn(5, *out.shape, dtype=out.dtype)
    (dq,) = torch.autograd.grad(out, q, torch.ones_like(out), create_graph=True)
    for of, wanted in ((out, (q, k, v)), (dq, (q, k, v))):
        gradients = many if of is out else many[:, :, : q.shape[1]]
        batched = torch.autograd.grad(of, wanted, gradients, is_grads_batched=True, retain_graph=True)
        for i in range(5):
            for a, b in zip(batched, torch.autograd.grad(of, wanted, gradients[i], retain_graph=True), strict=True):
                torch.testing.assert_close(a[i], b)


def test_flop_counter_counts_as_for_cca():
    q, k, v, _ = inputs((3, 4), d=5, c=6, grad=False)
    counts = []
    for function in (staged, lambda *x: ccgpu.cca(*x)):
        with FlopCounterMode(display=False) as counter:
            function(q, k, v)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 2 * 12 * 7 * (5 + 6)


def test_temporaries_are_small_beside_the_energies():
    q, k, v = (layouts(torch.randn(1, 16, 128, 128), "channels_last") for _ in "qkv")
    energies = ccgpu.affinity(q, k)
    calls = {
        "affinity": (lambda: ccgpu.affinity(q, k), energies),
        "aggregate": (lambda: ccgpu.aggregate(energies, v), v),
        "transposed": (lambda: transposed(energies, v), v),
    }
    for name, (call, result) in calls.items():
        assert peak_bytes(call) - result.nbytes < energies.nbytes / 3, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_is_passed_on_to_the_derivatives(backend, monkeypatch):
    ran = []
    for name in ("affinity", "aggregate", "aggregate_transposed"):
        original = getattr(reference, name)
        monkeypatch.setattr(reference, name, lambda *x, f=original, n=name: ran.append(n) or f(*x))
    q, k, v, _ = inputs((2, 3), batch=1)
    ccgpu.aggregate(ccgpu.affinity(q, k, backend=backend), v, backend=backend).sum().backward()
    expected = {"affinity": 2, "aggregate": 2, "aggregate_transposed": 2} if backend == "reference" else {}
    assert {name: ran.count(name) for name in set(ran)} == expected


def test_empty_batch():
    q, k, v, _ = (x.detach()[:0].requires_grad_() for x in inputs((4, 5)))
    energies = ccgpu.affinity(q, k)
    assert energies.shape == (0, 8, 4, 5)
    out = ccgpu.aggregate(energies, v)
    out.sum().backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in (q, k, v))
