"""The op in torch on a GPU: derivatives, opcheck, compile, autocast, layouts, a training step of a network."""

import pytest
import torch

import ccgpu
from ccgpu.models.ccnet import CCNet
from tests.gpu.device import DEVICE, gradients, inputs


@pytest.mark.parametrize("sizes", [(5,), (18,), (3, 4), (2, 3, 3)])
def test_gradcheck_in_float64(backend, sizes):
    tensors, _ = inputs(sizes, 3, 4, torch.float64, batch=1)
    leaves = tuple(x.requires_grad_() for x in tensors)
    assert torch.autograd.gradcheck(
        lambda *x: ccgpu.cca(*x, scale=0.7, return_lse=True, backend=backend), leaves, nondet_tol=0.0
    )


def test_gradgradcheck_in_float64(backend):
    tensors, _ = inputs((2, 3), 2, 2, torch.float64, batch=1)
    leaves = tuple(x.requires_grad_() for x in tensors)
    assert torch.autograd.gradgradcheck(lambda *x: ccgpu.cca(*x, return_lse=True, backend=backend), leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(backend, dtype):
    pytest.importorskip("expecttest", reason="torch's opcheck needs the package expecttest")
    tensors, dout = inputs((5, 6), 3, 4, dtype)
    leaves = tuple(x.requires_grad_() for x in tensors)
    close = {"rtol": 1e-2, "atol": 1e-2}
    torch.library.opcheck(torch.ops.ccgpu.cca_forward, (*leaves, 0.7, backend), **close)
    out, lse = (x.detach() for x in ccgpu.cca(*leaves, scale=0.7, return_lse=True, backend=backend))
    arguments = (dout, *leaves, out, lse, torch.randn_like(lse), 0.7, backend)
    torch.library.opcheck(torch.ops.ccgpu.cca_backward, arguments, **close)


def test_compile_with_dynamic_sizes(backend):
    torch._dynamo.reset()

    def block(q, k, v):
        return ccgpu.cca(q * 2, k, v, backend=backend).relu().sum()

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in [(6, 5), (8, 7), (35, 9)]:
        (q, k, v), _ = inputs(sizes, 3, 4)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        ours = torch.autograd.grad(compiled(*leaves), leaves)
        for a, b in zip(ours, torch.autograd.grad(block(*leaves), leaves), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_lowers_to_its_dtype(backend, dtype):
    (q, k, v), _ = inputs((9, 10))
    with torch.autocast("cuda", dtype=dtype):
        out, lse = ccgpu.cca(q, k.to(dtype), v, return_lse=True, backend=backend)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    lowered = ccgpu.cca(*(x.to(dtype) for x in (q, k, v)), backend=backend)
    torch.testing.assert_close(out, lowered, rtol=0, atol=0)


@pytest.mark.parametrize("sizes", [(20,), (6, 7), (3, 4, 5)])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [(16, 24), (3, 5)])
def test_results_have_the_layout_of_the_inputs(backend, half, sizes, last, channels):
    tensors, dout = inputs(sizes, *channels, half, last=last)
    out, lse, dq, dk, dv = gradients(tensors, dout, backend)
    for result, like in zip((out, dq, dk, dv), (tensors[2], *tensors), strict=True):
        assert result.stride() == like.stride()
    assert lse.is_contiguous()


@pytest.mark.parametrize("shift", [1, 2, 4])
def test_memory_that_begins_anywhere(backend, half, shift):
    """A tensor may begin at any element, but the kernels move 16 aligned bytes at a time."""
    tensors, dout = inputs((9, 12), 16, 16, half)
    moved = []
    for x in tensors:
        room = x.new_empty(x.numel() + shift)
        rows = room[shift:].view(x.shape[0], *x.shape[2:], x.shape[1])
        moved.append(rows.copy_(x.movedim(1, -1)).movedim(-1, 1))
        assert moved[-1].data_ptr() % 16 == 2 * shift % 16
    for a, b in zip(gradients(moved, dout, backend), gradients(tensors, dout, backend), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_empty_batch(backend):
    tensors, dout = inputs((4, 5), batch=0)
    out, lse, *grads = gradients(tensors, dout, backend)
    assert out.shape == tensors[2].shape
    assert lse.shape == (0, 4, 5)
    assert [g.shape for g in grads] == [x.shape for x in tensors]


def test_stages_compose_to_cca(backend):
    """softmax(affinity) and aggregate are the op in two steps, values and gradients."""
    tensors, dout = inputs((19, 33), 16, 24, torch.float64)
    results = []
    for two_steps in (False, True):
        leaves = tuple(x.detach().requires_grad_() for x in tensors)
        if two_steps:
            weights = torch.softmax(ccgpu.affinity(leaves[0], leaves[1], backend=backend), 1)
            out = ccgpu.aggregate(weights, leaves[2], backend=backend)
        else:
            out = ccgpu.cca(*leaves, backend=backend)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, dout)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_cuda_tensors_get_the_kernels(kernels, monkeypatch):
    """By default, the backend with the CUDA kernels is chosen."""
    monkeypatch.delenv("CCGPU_BACKEND", raising=False)
    tensors, dout = inputs((20, 30), dtype=torch.bfloat16)
    for a, b in zip(gradients(tensors, dout), gradients(tensors, dout, kernels), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_network_trains_a_step_under_autocast():
    net = CCNet("resnet18", 5, head_channels=16).to(DEVICE).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 65, 97, device=DEVICE).to(memory_format=torch.channels_last)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        main, auxiliary = net(images)
    (main.float().square().mean() + auxiliary.float().square().mean()).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in net.parameters() if p.grad is not None)
    assert net.head.cca.gamma.grad is not None
