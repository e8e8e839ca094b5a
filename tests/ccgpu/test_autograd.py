"""cca as an op of torch: derivatives, opcheck, compile, export, fake tensors, autocast, vmap, FLOP counts."""

import pytest
import torch
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import ccgpu
from ccgpu import formula
from tests.ccgpu.problems import check_compiled_once, layouts
from tests.forked import run_forked

RANKS = [(5,), (3, 4), (2, 3, 3)]


def inputs(sizes, dtype=torch.float64, batch=2, d=3, c=4, grad=True):
    generator = torch.Generator().manual_seed(len(sizes))
    channels = (d, d, c)
    tensors = (torch.randn(batch, n, *sizes, generator=generator, dtype=torch.float64) for n in channels)
    return tuple(x.to(dtype).requires_grad_(grad) for x in tensors)


def attend(q, k, v):
    return ccgpu.cca(q, k, v, scale=0.7, return_lse=True)


@pytest.mark.parametrize("sizes", RANKS)
def test_gradcheck_all_inputs_both_outputs(sizes):
    assert torch.autograd.gradcheck(attend, inputs(sizes))


@pytest.mark.parametrize("sizes", RANKS)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradcheck_one_input_at_a_time(sizes, which):
    tensors = [x.detach().requires_grad_(i == which) for i, x in enumerate(inputs(sizes))]
    assert torch.autograd.gradcheck(lambda q, k, v: ccgpu.cca(q, k, v), tensors)


@pytest.mark.parametrize("sizes", RANKS)
def test_gradgradcheck(sizes):
    assert torch.autograd.gradgradcheck(attend, inputs(sizes, batch=1))


def test_third_derivative():
    q, k, v = inputs((2, 2), batch=1, d=1, c=1)

    def gradient(q, k, v):
        return torch.autograd.grad(ccgpu.cca(q, k, v).sum(), (q, k), create_graph=True)

    assert torch.autograd.gradgradcheck(gradient, (q, k, v))


def test_gradient_penalty_against_the_formula():
    """The usual use of second derivatives: the norm of a gradient in the loss."""
    results = []
    for function in (lambda q, k, v: ccgpu.cca(q, k, v), lambda q, k, v: formula.attention(q, k, v, 1.0)[0]):
        q, k, v = inputs((4, 3))
        (dq,) = torch.autograd.grad(function(q, k, v).square().sum(), q, create_graph=True)
        results.append(torch.autograd.grad(dq.square().sum(), (q, k, v)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("sizes", RANKS)
def test_opcheck_forward(sizes):
    for dtype in (torch.float64, torch.bfloat16):
        q, k, v = inputs(sizes, dtype)
        torch.library.opcheck(torch.ops.ccgpu.cca_forward, (q, k, v, 1.0, None), rtol=1e-2, atol=1e-2)
    if len(sizes) == 2:
        last = tuple(layouts(x.detach(), "channels_last").requires_grad_() for x in inputs(sizes))
        torch.library.opcheck(torch.ops.ccgpu.cca_forward, (*last, 0.5, None))


@pytest.mark.parametrize("sizes", [pytest.param(s, marks=[pytest.mark.slow] if len(s) == 3 else []) for s in RANKS])
def test_opcheck_backward(sizes):
    q, k, v = inputs(sizes)
    out, lse = (x.detach() for x in attend(q, k, v))
    arguments = (torch.randn_like(out), q, k, v, out, lse, torch.randn_like(lse), 0.7, None)
    torch.library.opcheck(torch.ops.ccgpu.cca_backward, arguments)


def test_compile_without_graph_break_and_with_dynamic_sizes():
    def block(q, k, v):
        out, lse = ccgpu.cca(q * 2, k, v, scale=0.5, return_lse=True)
        return out.relu().sum() + lse.sum()

    check_compiled_once(block, inputs)


def test_compile_with_dynamic_sizes_and_the_default_scale():
    """torch.compile with dynamic=True traces a float default as a symbol."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: ccgpu.cca(q, k, v), fullgraph=True, dynamic=True)
    for sizes in [(6, 5), (8, 7)]:
        q, k, v = inputs(sizes, torch.float32, grad=False)
        torch.testing.assert_close(compiled(q, k, v), ccgpu.cca(q, k, v))


def test_compile_with_inductor():
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: ccgpu.cca(q, k, v) + 1, fullgraph=True)
    q, k, v = inputs((5, 6), torch.float32, grad=False)
    torch.testing.assert_close(compiled(q, k, v), ccgpu.cca(q, k, v) + 1)


class Module(torch.nn.Module):
    def forward(self, q, k, v):
        return ccgpu.cca(q, k, v, scale=0.5)


def test_compiled_autograd():
    """torch's compiler can trace backward of a forward pass that ran eagerly."""
    torch._dynamo.reset()
    maps = inputs((5, 6), torch.float32)
    expected = torch.autograd.grad(ccgpu.cca(*maps).square().sum(), maps)
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        ccgpu.cca(*maps).square().sum().backward()
    for x, gradient in zip(maps, expected, strict=True):
        torch.testing.assert_close(x.grad, gradient)


def test_export_with_dynamic_sizes():
    q, k, v = inputs((5, 6), torch.float32, grad=False)
    batch, h, w = torch.export.Dim("batch"), torch.export.Dim("h", min=2), torch.export.Dim("w", min=2)
    shape = {0: batch, 2: h, 3: w}
    program = torch.export.export(Module(), (q, k, v), dynamic_shapes={"q": shape, "k": shape, "v": shape})
    other = inputs((4, 9), torch.float32, batch=3, grad=False)
    torch.testing.assert_close(program.module()(*other), ccgpu.cca(*other, scale=0.5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fake_tensors_of_any_device(dtype):
    with FakeTensorMode():
        q = torch.empty(2, 3, 4, 5, device="cuda", dtype=dtype)
        v = torch.empty(2, 7, 4, 5, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
        out, lse = ccgpu.cca(q, q, v, return_lse=True)
    assert out.device.type == lse.device.type == "cuda"
    assert out.shape == v.shape
    assert out.stride() == v.stride()
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_autocast_lowers_to_its_dtype_and_leaves_float64():
    q, k, v = inputs((3, 4), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = ccgpu.cca(q, k.bfloat16(), v, return_lse=True)  # dtypes may differ: autocast makes them equal
        wide = ccgpu.cca(q.double(), k.double(), v.double())
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert wide.dtype == torch.float64
    torch.testing.assert_close(out, ccgpu.cca(q.bfloat16(), k.bfloat16(), v.bfloat16()))
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


def test_autocast_under_compile():
    torch._dynamo.reset()
    q, k, v = inputs((3, 4), torch.float32)

    def block(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return ccgpu.cca(q, k, v)

    out = torch.compile(block, fullgraph=True, backend="aot_eager")(q, k, v)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, block(q, k, v))


@pytest.mark.parametrize("dims", [(0, 0, 0), (1, None, 2), (None, None, 3)])
def test_vmap(dims):
    mapped = [torch.randn(3, 2, n, 4, 5) for n in (6, 6, 7)]
    arguments = [x[0] if d is None else x.movedim(0, d) for x, d in zip(mapped, dims, strict=True)]
    out, lse = torch.func.vmap(lambda *x: ccgpu.cca(*x, return_lse=True), in_dims=dims)(*arguments)
    for i in range(3):
        single = [x[0] if d is None else x[i] for x, d in zip(mapped, dims, strict=True)]
        expected, expected_lse = ccgpu.cca(*single, return_lse=True)
        torch.testing.assert_close(out[i], expected)
        torch.testing.assert_close(lse[i], expected_lse)


def test_batched_vector_jacobian_products():
    """The vmap rule of backward, for many output gradients at once, as for the attention maps of many pixels."""
    q, k, v = inputs((3, 4), torch.float32)
    out = ccgpu.cca(q, k, v)
    many = torch.randn(5, *out.shape)
    batched = torch.autograd.grad(out, (q, k, v), many, is_grads_batched=True, retain_graph=True)
    for i in range(5):
        for a, b in zip(batched, torch.autograd.grad(out, (q, k, v), many[i], retain_graph=True), strict=True):
            torch.testing.assert_close(a[i], b)


@pytest.mark.parametrize("call", ["ccgpu.cca(q, q, q)", "ccgpu.affinity(q, q)", "ccgpu.aggregate(w, q)", "net(q)"])
def test_flop_counter_that_is_open_at_the_first_call(call):
    """The ops are registered then, after the counter has copied the formulas."""
    program = f"""
        import ccgpu
        import torch
        from torch.utils.flop_counter import FlopCounterMode
        from ccgpu.models.attention import RCCA

        q, w, net, counts = torch.ones(1, 8, 4, 3), torch.ones(1, 6, 4, 3), RCCA(8), []
        for _ in range(2):
            with FlopCounterMode(display=False) as counter:
                {call}
            counts.append(counter.get_total_flops())
        print(counts[0] == counts[1] > 0)
    """
    answer = run_forked(program)
    assert answer.stdout.strip() == "True", answer.stderr


def test_flop_counter():
    q, k, v = inputs((3, 4), d=5, c=6)
    with FlopCounterMode(display=False) as counter:
        out = ccgpu.cca(q, k, v)
    assert counter.get_total_flops() == 2 * 2 * 12 * 7 * (5 + 6)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 12 * 7 * (3 * 5 + 2 * 6)


def test_profiler_names_the_ops_of_both_passes():
    maps = inputs((3, 4))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ccgpu.cca(*maps).sum().backward()
    assert {"ccgpu::cca_forward", "ccgpu::cca_backward"} <= {event.key for event in profile.key_averages()}


def test_gradient_of_one_output_or_of_one_input():
    """What needs no gradient gets none, and an output that is not used counts as zero."""
    q, k, v = inputs((3, 4))
    out, lse = attend(q, k, v)
    both = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
    from_out = torch.autograd.grad(attend(q, k, v)[0].sum(), (q, k, v))
    from_lse = torch.autograd.grad(attend(q, k, v)[1].sum(), (q, k), allow_unused=True)
    for whole, *parts in zip(both[:2], from_out[:2], from_lse, strict=True):
        torch.testing.assert_close(whole, sum(parts))
    for number in range(3):
        maps = [x.detach().requires_grad_(i == number) for i, x in enumerate((q, k, v))]
        attend(*maps)[0].sum().backward()
        assert [x.grad is not None for x in maps] == [i == number for i in range(3)]
        torch.testing.assert_close(maps[number].grad, from_out[number])


def test_saved_for_backward_is_q_k_v_out_lse():
    q, k, v = inputs((6, 7), torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        out, lse = ccgpu.cca(q, k, v, return_lse=True)
    assert sorted(saved) == sorted([q.shape, k.shape, v.shape, out.shape, lse.shape])


def test_inference_mode_and_no_grad():
    q, k, v = inputs((3, 4))
    expected = ccgpu.cca(q, k, v).detach()
    with torch.inference_mode():
        torch.testing.assert_close(ccgpu.cca(q, k, v), expected)
    with torch.no_grad():
        assert not ccgpu.cca(q, k, v).requires_grad
