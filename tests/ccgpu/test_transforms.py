"""torch.func's transforms and forward mode, for which custom ops can have no rule, against autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import ccgpu
from ccgpu.models.attention import RCCA

SIZES = [(5,), (3, 4), (1, 4), (4, 1), (2, 3, 2)]


def maps(sizes: tuple[int, ...], batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries, keys, values and a stage's weights."""
    generator = torch.Generator().manual_seed(sum(sizes))
    count = sum(sizes) - len(sizes) + 1

    def draw(channels: int) -> Tensor:
        return torch.randn(batch, channels, *sizes, generator=generator, dtype=torch.float64)

    return draw(3), draw(3), draw(2), draw(count)


def functions(sizes: tuple[int, ...]) -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Return each public op as a function that returns one tensor, with arguments for it."""
    q, k, v, weights = maps(sizes)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = ccgpu.cca(q, k, v, scale=0.7, return_lse=True)
        return torch.cat([out, lse.unsqueeze(1)], 1)

    return {
        "cca": (attend, (q, k, v)),
        "affinity": (ccgpu.affinity, (q, k)),
        "aggregate": (ccgpu.aggregate, (weights, v)),
    }


def every(test: Any) -> Any:
    test = pytest.mark.parametrize("sizes", SIZES, ids=str)(test)
    return pytest.mark.parametrize("name", ["cca", "affinity", "aggregate"])(test)


def loss_of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *inputs: function(*inputs).sin().sum()


@every
def test_grad_is_autograds(name: str, sizes: tuple[int, ...]) -> None:
    function, inputs = functions(sizes)[name]
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(loss_of(function)(*leaves), leaves)
    found = grad(loss_of(function), argnums=tuple(range(len(inputs))))(*inputs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(function(*inputs), jvp(function, inputs, inputs)[0])


@every
def test_forward_mode_is_reverse_mode(name: str, sizes: tuple[int, ...]) -> None:
    function, inputs = functions(sizes)[name]
    tangents = tuple(torch.cos(7 * x) for x in inputs)
    value, found = jvp(function, inputs, tangents)
    direction = torch.sin(3 * value)
    leaves = [x.clone().requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(function(*leaves), leaves, direction)
    expected = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    assert found.abs().max() > 0.01
    torch.testing.assert_close((found * direction).sum(), expected)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
        torch.testing.assert_close(forward_ad.unpack_dual(function(*duals)).tangent, found)
        # A derivative by one input alone: the others are constants.
        tangent = forward_ad.unpack_dual(function(duals[0], *inputs[1:])).tangent
    torch.testing.assert_close(tangent, jvp(lambda x: function(x, *inputs[1:]), inputs[:1], tangents[:1])[1])


def test_jacobians_and_second_derivatives() -> None:
    q, k, v, _ = maps((2, 3), batch=1)
    function = loss_of(ccgpu.cca)
    torch.testing.assert_close(jacfwd(ccgpu.cca)(q, k, v), jacrev(ccgpu.cca)(q, k, v))
    expected = torch.autograd.functional.hessian(lambda q: function(q, k, v), q)
    torch.testing.assert_close(hessian(function)(q, k, v), expected)


def test_gradients_of_each_sample() -> None:
    """vmap of grad through a module, as for influence functions or differentially private training."""
    torch.manual_seed(0)
    module = RCCA(8, gamma=0.8).double()
    x = torch.randn(3, 1, 8, 4, 5, dtype=torch.float64)
    parameters = dict(module.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, parameters, (x,)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for index in range(3):
        expected = torch.autograd.grad(module(x[index]).square().sum(), list(parameters.values()))
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found[name][index], gradient)


def assert_near(value, expected):
    """Compare results of about 1; those of kernels that round between the axes differ by a unit of such a number."""
    half = expected.dtype == torch.bfloat16
    torch.testing.assert_close(value, expected, rtol=0.016 if half else 1.3e-6, atol=2.0**-7 if half else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_are_the_ops(dtype: torch.dtype) -> None:
    q, k, v, weights = (x.to(dtype) for x in maps((3, 4)))
    value, tangent = jvp(lambda v: ccgpu.cca(q, k, v), (v,), (v,))
    assert value.dtype == tangent.dtype == dtype
    assert_near(value, ccgpu.cca(q, k, v))
    assert jvp(lambda q: ccgpu.affinity(q, k), (q,), (q,))[1].dtype == torch.float32
    assert jvp(lambda v: ccgpu.aggregate(weights, v), (v,), (v,))[1].dtype == dtype


def test_autocast_lowers_the_inputs_there_too() -> None:
    q, k, v, weights = (x.float() for x in maps((3, 4)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for function, inputs in [(ccgpu.cca, (q, k, v)), (ccgpu.affinity, (q, k)), (ccgpu.aggregate, (weights, v))]:
            value = jvp(function, inputs, inputs)[0]
            expected = function(*inputs)
            assert value.dtype == expected.dtype
            assert_near(value, expected)


def test_vmap_alone_runs_the_op() -> None:
    """The op has a rule for vmap, and is faster than the formula."""
    q, k, v, _ = maps((3, 4))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        vmap(ccgpu.cca)(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1))
    assert any("ccgpu::cca_forward" in event.key for event in profile.key_averages())


@pytest.mark.parametrize("name", ["cca", "affinity", "aggregate"])
def test_transforms_within_torch_compile(name: str) -> None:
    function, inputs = functions((3, 4))[name]

    def derivatives(*inputs: Tensor) -> tuple[Tensor, ...]:
        return (*grad(loss_of(function), argnums=(0, 1))(*inputs), jvp(function, inputs, inputs)[1])

    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(derivatives, backend="eager")(*inputs), derivatives(*inputs))


def test_torch_compile_within_a_transform() -> None:
    q, k, v, _ = maps((3, 4))
    torch.compiler.reset()
    compiled = torch.compile(ccgpu.cca, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), ccgpu.cca(q, k, v))  # compiled without a transform first
    function = loss_of(compiled)
    torch.testing.assert_close(grad(function)(q, k, v), grad(loss_of(ccgpu.cca))(q, k, v))
