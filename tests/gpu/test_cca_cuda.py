"""What needs a CUDA device: the op and the network there, against the CPU in float64."""

import pytest
import torch

import ccgpu
from ccgpu.models.ccnet import CCNet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]

# In units of the result's size, several times what plain PyTorch loses in that dtype (float32 without TF32).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def run(tensors, dout, backend=None):
    leaves = tuple(x.detach().requires_grad_() for x in tensors)
    out, lse = ccgpu.cca(*leaves, return_lse=True, backend=backend)
    return (out, lse, *torch.autograd.grad((out, lse), leaves, (dout, torch.ones_like(lse))))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("sizes", [(1, 1), (17, 33), (97, 97), (130,), (3, 20, 31)])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_cca_on_the_device(sizes, dtype, last):
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(2, c, *sizes, generator=generator, dtype=torch.float64) for c in (16, 16, 40, 40))
    tensors = tuple(x.to(dtype) for x in (q / 2, k / 2, v))
    if last:
        tensors = tuple(x.movedim(1, -1).contiguous().movedim(-1, 1) for x in tensors)
    dout = dout.to(dtype)
    ours = run(tuple(x.cuda() for x in tensors), dout.cuda())
    truth = run(tuple(x.double() for x in tensors), dout.double(), backend="cpu")
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), ours, truth, strict=True):
        error = float((a.cpu().double() - b).abs().max() / b.abs().max().clamp(min=1.0))
        assert error <= TOLERANCE[dtype], f"{name}: {error:.3g}"
    assert ours[0].stride() == tensors[2].stride()


def test_opcheck_on_the_device():
    q, k, v = (torch.randn(2, c, 5, 6, device="cuda", requires_grad=True) for c in (3, 3, 4))
    torch.library.opcheck(torch.ops.ccgpu.cca_forward, (q, k, v, 1.0, None))


def test_same_bits_twice_on_the_device():
    q, k, v = (torch.randn(2, c, 33, 29, device="cuda") for c in (16, 16, 64))
    dout = torch.randn_like(v)
    assert all(torch.equal(a, b) for a, b in zip(run((q, k, v), dout), run((q, k, v), dout), strict=True))


def test_network_trains_a_step_under_autocast():
    net = CCNet("resnet18", 5, head_channels=16).cuda().to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 65, 97, device="cuda").to(memory_format=torch.channels_last)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        main, auxiliary = net(images)
    (main.float().square().mean() + auxiliary.float().square().mean()).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in net.parameters() if p.grad is not None)
    assert net.head.cca.gamma.grad is not None
