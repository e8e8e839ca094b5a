"""The depthwise convolution and its derivatives, against torch's convolution in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ccgpu.models.depthwise import depthwise
from ccgpu.models.efficientnet import SameConv2d


def problem(size: int, shape: tuple[int, ...] = (2, 3, 7, 9), dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Return a map, a weight, and a gradient of the output."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight = torch.randn((shape[1], 1, size, size), generator=generator, dtype=torch.float64)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    return tuple(t.to(dtype) for t in (x, weight, grad))


def results(function: object, x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = function(x, weight)  # type: ignore[operator]
    return (out.detach(), *torch.autograd.grad(out, (x, weight), grad))


def plain(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2 * dilation, dilation=dilation, groups=x.shape[1])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dilation", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [3, 5, 7, 9])
def test_values_and_gradients_are_those_of_the_convolution(
    size: int, dilation: int, layout: torch.memory_format
) -> None:
    x, weight, grad = problem(size)
    ours = results(lambda x, w: depthwise(x, w, dilation), x.to(memory_format=layout), weight, grad)
    for own, expected in zip(ours, results(lambda x, w: plain(x, w, dilation), x, weight, grad), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 1, 8), (3, 2, 5, 1), (2, 4, 2, 3)])
def test_maps_smaller_than_the_kernel(shape: tuple[int, ...]) -> None:
    x, weight, grad = problem(5, shape)
    ours = results(lambda x, w: depthwise(x, w, 4), x, weight, grad)
    for own, expected in zip(ours, results(lambda x, w: plain(x, w, 4), x, weight, grad), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


def test_second_derivatives_are_right() -> None:
    x, weight, _ = problem(5, (1, 2, 4, 5))
    inputs = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x, w: depthwise(x, w, 2), inputs)


@pytest.mark.parametrize(("size", "dilation"), [(5, 1), (3, 2), (5, 2), (5, 4)])
def test_gradients_in_bfloat16_are_as_exact_as_bfloat16(size: int, dilation: int) -> None:
    # torch's own gradient of the weight of a dilated one had nothing in common with the right one.
    x, weight, grad = problem(size, (4, 32, 23, 30), torch.bfloat16)
    x, grad = (t.to(memory_format=torch.channels_last) for t in (x, grad))
    ours = results(lambda x, w: depthwise(x, w, dilation), x, weight, grad)
    exact = results(lambda x, w: plain(x, w, dilation), x.double(), weight.double(), grad.double())
    for own, expected in zip(ours, exact, strict=True):
        assert own.dtype == torch.bfloat16
        assert (own.double() - expected).norm() < 4e-3 * expected.norm()  # half a unit in the last place is 2 ** -9


def test_autocast_converts_as_for_a_convolution() -> None:
    x, weight, _ = problem(5, dtype=torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = depthwise(x, weight, 2)
        torch.testing.assert_close(out, plain(x, weight, 2), rtol=0, atol=0)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_functional_transforms_take_it() -> None:
    x, weight, _ = problem(5)
    own = torch.func.vmap(torch.func.grad(lambda w, x: depthwise(x[None], w, 2).square().sum()), (None, 0))(weight, x)
    expected = torch.func.vmap(torch.func.grad(lambda w, x: plain(x[None], w, 2).square().sum()), (None, 0))(weight, x)
    torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 1, 4, 4), (3, 1, 1, 1), (3, 3, 3, 3), (2, 1, 3, 3), (3, 1, 3, 5)])
def test_other_kernels_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"depthwise: weight must be \(3, 1, k, k\) with k odd and 3 or more, got"):
        depthwise(torch.zeros(1, 3, 4, 4), torch.zeros(shape), 1)


@pytest.mark.parametrize("autocast", [True, False])
def test_a_backbone_in_bfloat16_has_the_right_derivatives(autocast: bool) -> None:
    torch.manual_seed(0)
    convolution = SameConv2d(32, 32, 5, dilation=4, groups=32)
    x = torch.randn(2, 32, 23, 30).bfloat16().to(memory_format=torch.channels_last)
    grad = torch.randn(x.shape).bfloat16()
    weight = convolution.weight.detach().bfloat16()
    _, _, expected = results(lambda x, w: plain(x, w, 4), x.double(), weight.double(), grad.double())
    if not autocast:
        convolution.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        convolution(x).backward(grad)
    assert convolution.weight.grad is not None
    assert (convolution.weight.grad.double() - expected).norm() < 4e-3 * expected.norm()


def test_backbones_in_float32_and_exported_ones_have_plain_convolutions() -> None:
    convolution = SameConv2d(2, 2, 5, dilation=2, groups=2)
    x = torch.randn(1, 2, 7, 7)
    assert type(convolution(x).grad_fn).__name__ == "ConvolutionBackward0"
    program = torch.export.export(convolution.bfloat16(), (x.bfloat16(),))
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [torch.ops.aten.conv2d.default]


def test_a_compiled_convolution_has_the_same_derivatives() -> None:
    torch.manual_seed(0)
    convolution = SameConv2d(4, 4, 5, dilation=2, groups=4).bfloat16()
    x = torch.randn(2, 4, 9, 11).bfloat16().to(memory_format=torch.channels_last)
    gradients = []
    for module in (convolution, torch.compile(convolution, backend="aot_eager", fullgraph=True)):
        module(x).square().sum().backward()
        assert convolution.weight.grad is not None
        gradients.append(convolution.weight.grad.clone())
        convolution.zero_grad()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
