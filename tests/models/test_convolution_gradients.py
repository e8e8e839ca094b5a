"""Dilated convolutions have the right gradients in bfloat16 on CPUs, where torch's own are wrong for some."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccgpu.models.context import ASPP
from ccgpu.models.convolution_gradients import right_gradients

HALF = 4e-3  # relative error of results rounded to bfloat16: half a unit in the last place is 2 ** -9
CALLS = [
    (F.conv2d, (32, 1, 3, 3), {"padding": 2, "dilation": 2, "groups": 32}),
    (F.conv2d, (32, 4, 3, 3), {"padding": "same", "dilation": 2, "groups": 8}),
    (F.conv2d, (32, 24, 3, 3), {"padding": 4, "dilation": 4}),
    (F.conv2d, (24, 24, 5, 3), {"padding": (8, 1), "dilation": (4, 1)}),
    (F.conv_transpose2d, (32, 4, 3, 3), {"padding": 2, "dilation": 2, "groups": 8}),
]


def gradients(
    function: object, x: Tensor, weight: Tensor, grad: Tensor, **how: object
) -> tuple[torch.autograd.graph.Node, list[Tensor]]:
    """Return the last node of the graph, and output and gradients."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    with right_gradients(x):
        out = function(x, weight, **how)  # type: ignore[operator]
    assert out.grad_fn is not None
    return out.grad_fn, [out.detach(), *torch.autograd.grad(out, (x, weight), grad)]


def problem(function: object, shape: tuple[int, ...], groups: int = 1, **_: object) -> list[Tensor]:
    """Return a map, a weight and a gradient of the output, channels_last and with values of bfloat16."""
    generator = torch.Generator().manual_seed(0)
    first, second = shape[0], shape[1] * groups
    inputs, outputs = (second, first) if function is F.conv2d else (first, second)
    shapes = ((2, inputs, 23, 30), shape, (2, outputs, 23, 30))
    tensors = (torch.randn(s, generator=generator).bfloat16() for s in shapes)
    return [t.to(memory_format=torch.channels_last) for t in tensors]


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize(("function", "shape", "how"), CALLS)
def test_gradients_are_as_exact_as_bfloat16(
    function: object, shape: tuple[int, ...], how: dict[str, object], autocast: bool
) -> None:
    x, weight, grad = problem(function, shape, **how)  # type: ignore[arg-type]
    _, exact = gradients(function, x.double(), weight.double(), grad.double(), **how)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        node, own = gradients(function, x, weight.float() if autocast else weight, grad, **how)
    # On a CPU where torch errs nowhere the errors alone would say nothing.
    assert type(node).__name__ == "ToCopyBackward0"
    assert own[0].dtype == own[1].dtype == torch.bfloat16
    for value, expected in zip(own, exact, strict=True):
        assert (value.double() - expected).norm() < HALF * expected.norm()


@pytest.mark.parametrize(
    ("dtype", "shape", "how"),
    [
        (torch.bfloat16, (32, 1, 3, 3), {"groups": 32}),  # without dilation
        (torch.bfloat16, (32, 32, 3, 3), {"dilation": 2}),  # the usual numbers of channels
        (torch.bfloat16, (64, 16, 3, 3), {"dilation": (2, 2), "groups": 4}),
        (torch.float32, (32, 1, 3, 3), {"dilation": 2, "groups": 32}),
    ],
)
def test_other_convolutions_stay_as_they_are(
    dtype: torch.dtype, shape: tuple[int, ...], how: dict[str, object]
) -> None:
    x, weight, _ = (t.to(dtype) for t in problem(F.conv2d, shape, **how))  # type: ignore[arg-type]
    with right_gradients(x.requires_grad_()):
        assert type(F.conv2d(x, weight, **how).grad_fn).__name__ == "ConvolutionBackward0"  # type: ignore[arg-type]


def test_without_gradients_nothing_changes() -> None:
    x, weight, _ = problem(F.conv2d, (32, 1, 3, 3), groups=32)
    expected = F.conv2d(x, weight, dilation=2, groups=32)
    with right_gradients(x), torch.no_grad():
        assert torch.equal(F.conv2d(x, weight, dilation=2, groups=32), expected)


def test_float64_stays_under_autocast() -> None:
    x, weight, _ = (t.double() for t in problem(F.conv2d, (32, 1, 3, 3), groups=32))
    with torch.autocast("cpu", torch.bfloat16), right_gradients(x.bfloat16()):
        out = F.conv2d(x.requires_grad_(), weight, dilation=2, groups=32)
    assert out.dtype == torch.float64


class Net(nn.Module):
    """A network with every kind of dilated convolution that torch gets wrong, one of them in a subclass of its own."""

    class Standardised(nn.Conv2d):
        """A convolution that normalises its weights, and so calls `conv2d` itself, like timm's."""

        def forward(self, input: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.Conv2d(32, 32, 3, padding=2, dilation=2, groups=32, bias=False),
            self.Standardised(32, 24, 3, padding=2, dilation=2, groups=4),
            nn.Conv2d(24, 24, 3, padding=4, dilation=4),
            nn.Conv2d(24, 8, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        with right_gradients(images):
            return self.layers(images)


def loss_gradients(net: nn.Module, images: Tensor, *, bf16: bool) -> dict[str, Tensor]:
    """Return the gradients of a loss of the network for its weights, computed in channels_last."""
    net = net.to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = net(images)
    out.float().square().mean().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def assert_close(own: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that gradients of weights agree but for the rounding of a few layers; wrong ones differ by 100 %."""
    assert own.keys() == expected.keys()
    for name, value in own.items():
        assert value.dtype == torch.float32
        assert (value - expected[name]).norm() < 0.05 * expected[name].norm(), name


def test_a_network_has_the_gradients_of_float32() -> None:
    torch.manual_seed(0)
    net, images = Net(), torch.randn(2, 3, 23, 30)
    assert_close(loss_gradients(net, images, bf16=True), loss_gradients(net, images, bf16=False))


@pytest.mark.parametrize("around", [True, False])
def test_a_compiled_network_has_the_same_gradients(around: bool) -> None:
    torch.manual_seed(0)
    net, images = Net(), torch.randn(2, 3, 23, 30)
    expected = loss_gradients(net, images, bf16=True)
    compiled = copy.deepcopy(net)
    compiled.layers.compile(backend="aot_eager", fullgraph=True) if around else compiled.compile(
        backend="aot_eager", fullgraph=True
    )
    for name, value in loss_gradients(compiled, images, bf16=True).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=1e-4 * expected[name].abs().max().item())


def test_an_exported_network_has_plain_convolutions() -> None:
    net = Net().bfloat16()
    program = torch.export.export(net, (torch.randn(1, 3, 23, 30).bfloat16(),))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.aten.conv2d.default) == 5
    assert torch.ops.aten.to.dtype not in targets


def test_aspp_has_the_gradients_of_float32() -> None:
    torch.manual_seed(0)
    module, x = ASPP(24), torch.randn(2, 24, 41, 48)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.eval()  # the mean over two images would magnify rounding errors
    assert_close(loss_gradients(module, x, bf16=True), loss_gradients(module, x, bf16=False))
