"""CrissCrossAttention, RCCA and attention_map against dense matrices; gamma is 0 only where a test says so."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ccgpu.models.attention import RCCA, CrissCrossAttention, attention_map
from ccgpu.models.context import NonLocal
from tests.models.problems import SIZES, features, gradients, make


def dense_weights(module: CrissCrossAttention, x: Tensor) -> Tensor:
    """Return attention weights (B, N, N) of all pairs of positions; pairs on no common line have weight 0."""

    def project(convolution: Any) -> Tensor:
        weight, bias = convolution.weight.flatten(1), convolution.bias
        return torch.einsum("oc,bcn->bon", weight, x.flatten(2)) + bias[:, None]

    positions = torch.tensor(list(itertools.product(*(range(extent) for extent in x.shape[2:]))))
    on_a_line = (positions[:, None] != positions[None]).sum(-1) <= 1
    energies = torch.einsum("bdu,bdi->bui", project(module.query_conv), project(module.key_conv))
    return energies.masked_fill(~on_a_line, -math.inf).softmax(-1)


def dense_loop(module: CrissCrossAttention, x: Tensor) -> Tensor:
    values = torch.einsum("oc,bcn->bon", module.value_conv.weight.flatten(1), x.flatten(2))
    values = values + module.value_conv.bias[:, None]
    out = torch.einsum("bui,bci->bcu", dense_weights(module, x), values)
    return module.gamma * out.reshape(x.shape) + x


def dense(module: CrissCrossAttention, x: Tensor, recurrence: int) -> Tensor:
    for _ in range(recurrence):
        x = dense_loop(module, x)
    return x


@pytest.mark.parametrize("recurrence", [1, 2, 3])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_rcca_equals_the_dense_reference(dims: int, recurrence: int) -> None:
    module = make(RCCA, 8, recurrence, dims=dims, reduction=2)
    x = features(dims).requires_grad_()
    out, expected = module(x), dense(module, x, recurrence)
    torch.testing.assert_close(out, expected)
    assert (out - x).abs().max() > 0.1
    for ours, theirs in zip(gradients(out, x, module), gradients(expected, x, module), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_criss_cross_attention_is_one_loop_of_rcca() -> None:
    once = make(CrissCrossAttention, 16)
    rcca = make(RCCA, 16, 1)
    x = features(2, channels=16)
    torch.testing.assert_close(once(x), rcca(x), rtol=0, atol=0)
    torch.testing.assert_close(once(x), dense_loop(once, x))
    rcca.recurrence = 2
    torch.testing.assert_close(once(once(x)), rcca(x), rtol=0, atol=0)


def test_rcca_without_loops_is_the_identity() -> None:
    x = features(2)
    assert torch.equal(make(RCCA, 8, 0)(x), x)


def test_fresh_module_is_the_identity_and_gamma_can_leave_zero() -> None:
    module = RCCA(8).double()
    x = features(2)
    out = module(x)
    assert torch.equal(out, x)
    (out * features(2)).sum().backward()
    assert module.gamma.shape == (1,)
    assert module.gamma.grad.abs().item() > 1e-3
    assert not module.value_conv.weight.grad.any()


@pytest.mark.parametrize("module", [CrissCrossAttention, RCCA, NonLocal])
def test_gamma_is_initialised_to_its_argument(module: Any) -> None:
    torch.manual_seed(2)
    nonzero = module(8, gamma=0.75)
    assert nonzero.gamma.item() == 0.75
    zero = module(8)
    zero.load_state_dict(nonzero.state_dict())
    torch.manual_seed(2)
    assert torch.equal(module(8).value_conv.weight, nonzero.value_conv.weight), (
        "gamma must not change the other weights"
    )
    torch.testing.assert_close(zero(features(2).float()), nonzero(features(2).float()), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"gamma must be finite, got nan; pass"):
        module(8, gamma=float("nan"))


@pytest.mark.parametrize("dims", [2, 3])
def test_rcca_gradcheck(dims: int) -> None:
    module = make(RCCA, 3, 2, dims=dims, reduction=1)
    x = features(dims, channels=3, batch=1)[..., :3].requires_grad_()
    parameters = dict(module.named_parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters.values()), fast_mode=True)


@pytest.mark.parametrize(("dims", "layout"), [(2, torch.channels_last), (3, torch.channels_last_3d)])
def test_channels_last_equals_contiguous(dims: int, layout: torch.memory_format) -> None:
    module = make(RCCA, 8, 2, dims=dims)
    contiguous = features(dims).requires_grad_()
    strided = features(dims).to(memory_format=layout).requires_grad_()
    assert not strided.is_contiguous()
    ours, theirs = module(strided), module(contiguous)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(gradients(ours, strided, module), gradients(theirs, contiguous, module), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_keeps_the_dtype_of_x() -> None:
    module = make(RCCA, 8, 2).float()
    x = features(2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x.bfloat16()).dtype == torch.bfloat16
        out = module(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, module(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_rcca_equals_eager(backend: str) -> None:
    module = make(RCCA, 8, 2).float()
    x = features(2).float().requires_grad_()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    ours, theirs = compiled(x), module(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for a, b in zip(gradients(ours, x, module), gradients(theirs, x, module), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("in_channels", "reduction", "expected"), [(64, 8, 8), (12, 8, 1), (5, 8, 1), (6, 3, 2)])
def test_query_and_key_channels(in_channels: int, reduction: int, expected: int) -> None:
    module = make(CrissCrossAttention, in_channels, reduction=reduction)
    assert module.query_conv.out_channels == module.key_conv.out_channels == expected
    x = features(2, channels=in_channels)
    torch.testing.assert_close(module(x), dense_loop(module, x))


# State dicts


def authors_state(channels: int) -> dict[str, Tensor]:
    """Return a state dict as that of the authors' CrissCrossAttention(in_dim)."""
    generator = torch.Generator().manual_seed(4)
    shapes: dict[str, tuple[int, ...]] = {"gamma": (1,)}
    for name, out_channels in (("query", channels // 8), ("key", channels // 8), ("value", channels)):
        shapes[f"{name}_conv.weight"] = (out_channels, channels, 1, 1)
        shapes[f"{name}_conv.bias"] = (out_channels,)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("kind", [CrissCrossAttention, RCCA])
def test_authors_state_dict_loads_strictly(kind: type[CrissCrossAttention]) -> None:
    state = authors_state(16)
    module = kind(16)
    module.load_state_dict(state, strict=True)
    assert module.state_dict().keys() == state.keys()
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_mmcv_state_dict_loads_strictly_and_is_saved_as_ours() -> None:
    state = authors_state(16)
    theirs = dict(state)
    theirs["gamma.scale"] = theirs.pop("gamma").squeeze()
    network = nn.ModuleDict({"cca": RCCA(16)})
    network.load_state_dict({f"cca.{name}": value for name, value in theirs.items()}, strict=True)
    saved = network["cca"].state_dict()
    assert saved.keys() == state.keys()
    assert torch.equal(saved["gamma"], state["gamma"])
    assert theirs["gamma.scale"].shape == ()


def test_misshapen_or_doubled_gamma_is_refused() -> None:
    state = authors_state(16)
    with pytest.raises(RuntimeError, match=r"gamma\.scale"):
        CrissCrossAttention(16).load_state_dict({**state, "gamma.scale": torch.tensor(1.0)})
    del state["gamma"]
    with pytest.raises(RuntimeError, match=r"gamma"):
        CrissCrossAttention(16).load_state_dict({**state, "gamma.scale": torch.ones(3)})


def test_state_dict_round_trip_gives_the_same_output(tmp_path: Any) -> None:
    module = make(RCCA, 8, 2)
    torch.save(module.state_dict(), tmp_path / "rcca.pth")
    other = RCCA(8, 2).double()
    other.load_state_dict(torch.load(tmp_path / "rcca.pth", weights_only=True))
    x = features(2)
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("other", [1, 2, 3])
def test_state_dict_loads_into_a_module_of_other_dims(dims: int, other: int) -> None:
    network = nn.Sequential(make(RCCA, 8, 2, dims=dims))
    loaded = nn.Sequential(RCCA(8, 2, dims=other).double())
    loaded.load_state_dict(network.state_dict(), strict=True)
    for ours, theirs in zip(loaded.parameters(), network.parameters(), strict=True):
        assert torch.equal(ours.flatten(), theirs.flatten())


def test_kernels_that_are_not_1x1_are_refused() -> None:
    state = authors_state(16)
    for shape in ((2, 16, 3, 3), (16, 2, 1, 1)):
        with pytest.raises(RuntimeError, match=r"size mismatch for query_conv\.weight"):
            RCCA(16, dims=3).load_state_dict({**state, "query_conv.weight": torch.zeros(shape)})


def test_clips_of_one_frame_are_images() -> None:
    images, clips = make(RCCA, 8, 2), RCCA(8, 2, dims=3).double()
    clips.load_state_dict(images.state_dict())
    x = features(2).requires_grad_()
    ours, theirs = clips(x.unsqueeze(2)).squeeze(2), images(x)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(gradients(ours, x, clips), gradients(theirs, x, images), strict=True):
        torch.testing.assert_close(a.flatten(), b.flatten())


# Errors


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: CrissCrossAttention(0), ValueError, "in_channels must be 1 or more, got 0"),
        (lambda: CrissCrossAttention(8.0), TypeError, "in_channels must be an int, got float"),
        (lambda: CrissCrossAttention(8, reduction=0), ValueError, "reduction must be 1 or more, got 0"),
        (lambda: CrissCrossAttention(8, dims=4), ValueError, "dims must be 1, 2 or 3, got 4"),
        (lambda: RCCA(8, -1), ValueError, "RCCA: recurrence must be 0 or more, got -1"),
        (lambda: RCCA(8, True), TypeError, "recurrence must be an int, got bool"),
        (
            lambda: RCCA(8)(torch.zeros(8, 4, 4)),
            ValueError,
            r"\(B, C, H, W\) for dims=2, got shape \(8, 4, 4\)",
        ),
        (lambda: RCCA(8, 0)(torch.zeros(1, 4, 4, 4)), ValueError, r"must have 8 channels.*\(1, 4, 4, 4\)"),
        (lambda: RCCA(8, dims=3)(torch.zeros(1, 8, 4, 4)), ValueError, r"\(B, C, T, H, W\) for dims=3"),
    ],
)
def test_mistakes_are_named(build: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


# Attention maps


@pytest.mark.parametrize("recurrence", [1, 2, 3])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_attention_map_equals_matrix_product(dims: int, recurrence: int) -> None:
    module = make(RCCA, 8, recurrence, dims=dims)
    x = features(dims)
    product = torch.eye(x[0, 0].numel(), dtype=x.dtype).expand(x.shape[0], -1, -1)
    inputs = x
    for _ in range(recurrence):
        product = dense_weights(module, inputs) @ product
        inputs = dense_loop(module, inputs)
    for u, at in enumerate(itertools.product(*(range(extent) for extent in SIZES[dims]))):
        ours = attention_map(module, x, at)
        torch.testing.assert_close(ours, product[:, u].reshape(x.shape[0], *SIZES[dims]))
        assert not ours.requires_grad
        assert ours.min() >= 0
        torch.testing.assert_close(ours.flatten(1).sum(1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("dims", [2, 3])
def test_attention_map_reaches_the_criss_cross_then_everything(dims: int) -> None:
    x, at = features(dims), (1,) * dims
    distance = torch.zeros(SIZES[dims])
    for axis, extent in enumerate(SIZES[dims]):
        differs = (torch.arange(extent) != 1).view([-1 if other == axis else 1 for other in range(dims)])
        distance = distance + differs
    for recurrence in range(dims + 1):
        reached = attention_map(make(RCCA, 8, recurrence, dims=dims), x, at) > 0
        assert torch.equal(reached, (distance <= recurrence).expand_as(reached))
    assert reached.all()


def test_attention_map_of_a_single_module_is_one_loop() -> None:
    module, x = make(CrissCrossAttention, 8), features(2)
    torch.testing.assert_close(attention_map(module, x, (2, 3)), dense_weights(module, x)[:, 13].reshape(2, 4, 5))


def test_attention_map_leaves_gradients_alone_and_works_without_grad_mode() -> None:
    module, x = make(RCCA, 8, 2), features(2)
    expected = attention_map(module, x, (1, 2))
    with torch.no_grad():
        assert torch.equal(attention_map(module, x, (1, 2)), expected)
    with torch.inference_mode():
        assert torch.equal(attention_map(module, module(x) * 0 + x, (1, 2)), expected)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_attention_map_keeps_its_precision_under_autocast() -> None:
    module, x = make(RCCA, 8, 3).float(), features(2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        row = attention_map(module, x, (1, 2))
    assert row.dtype == torch.float32
    # Features are 16 bit, but weights and their products are 32 bit: the sum is 1 to 32-bit precision.
    torch.testing.assert_close(row.sum((1, 2)), torch.ones(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(row, attention_map(module, x, (1, 2)), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("at", "error", "message"),
    [
        ((4, 0), ValueError, r"inside of \(4, 5\), got \(4, 0\)"),
        ((-1, 0), ValueError, "position inside of"),
        ((1,), ValueError, "position inside of"),
        ((1.0, 2), TypeError, "at must be ints"),
        (3, TypeError, "at must be ints"),
    ],
)
def test_attention_map_names_a_wrong_position(at: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention_map(make(RCCA, 8), features(2), at)


def test_attention_map_refuses_other_modules() -> None:
    with pytest.raises(TypeError, match="module must be a CrissCrossAttention or RCCA, got Conv2d"):
        attention_map(nn.Conv2d(8, 8, 1), features(2), (0, 0))
