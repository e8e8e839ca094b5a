"""Non-local, pyramid pooling and ASPP against reference implementations; gamma is 0 only where a test says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ccgpu.models.attention import RCCA, GatedAttention
from ccgpu.models.context import ASPP, CONTEXTS, FORMS, NonLocal, PyramidPooling, build_context, convolution
from tests.models.problems import features, gradients, make

# Non-local


def dense(module: NonLocal, x: Tensor) -> Tensor:
    """Return the result of non-local attention, computed position by position."""

    def project(convolution: Any) -> Tensor:
        return torch.einsum("oc,bcn->bon", convolution.weight.flatten(1), x.flatten(2)) + convolution.bias[:, None]

    q, k, v = (project(c) for c in (module.query_conv, module.key_conv, module.value_conv))
    columns = []
    for position in range(q.shape[-1]):
        weights = (q[:, :, position, None] * k).sum(1).exp()
        columns.append((v * weights[:, None]).sum(-1) / weights.sum(-1, keepdim=True))
    return module.gamma * torch.stack(columns, -1).reshape(x.shape) + x


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_non_local_equals_the_dense_reference(dims: int, form: str) -> None:
    module, x = make(NonLocal, 8, dims=dims, reduction=2, form=form), features(dims).requires_grad_()
    out, expected = module(x), dense(module, x)
    torch.testing.assert_close(out, expected)
    assert (out - x).abs().max() > 0.1
    for ours, theirs in zip(gradients(out, x, module), gradients(expected, x, module), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_non_local_on_one_line_is_criss_cross_attention(form: str) -> None:
    """In a map with one row, every position is on that row."""
    module, rcca = make(NonLocal, 8, form=form), make(RCCA, 8, 1)
    module.load_state_dict(rcca.state_dict(), strict=True)
    x = features(1).unsqueeze(2)
    torch.testing.assert_close(module(x), rcca(x))


def test_forms_interchange_state_dicts_and_agree_in_every_layout() -> None:
    materialised, fused = make(NonLocal, 8), NonLocal(8, form="sdpa").double()
    fused.load_state_dict(materialised.state_dict(), strict=True)
    x = features(2)
    for layout in (torch.contiguous_format, torch.channels_last):
        strided = x.to(memory_format=layout).requires_grad_()
        ours, theirs = fused(strided), materialised(strided)
        torch.testing.assert_close(ours, theirs)
        for a, b in zip(gradients(ours, strided, fused), gradients(theirs, strided, materialised), strict=True):
            torch.testing.assert_close(a, b)
    # Clips as the head passes them: frames that follow each other, as a view.
    clips = make(NonLocal, 8, dims=3, form="sdpa")
    view = features(3).transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(clips(view), dense(clips, view))


@pytest.mark.parametrize("form", FORMS)
def test_non_local_gradcheck(form: str) -> None:
    module = make(NonLocal, 4, form=form)
    x = features(2, channels=4, batch=1)[..., :3].requires_grad_()
    assert torch.autograd.gradcheck(module, (x,), fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
def test_non_local_under_autocast_keeps_the_dtype_of_x(form: str) -> None:
    module, x = make(NonLocal, 8, form=form).float(), features(2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x.bfloat16()).dtype == torch.bfloat16
        out = module(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, module(x), rtol=0.05, atol=0.05)


def test_fresh_non_local_is_the_identity() -> None:
    x = features(2)
    for form in FORMS:
        assert torch.equal(NonLocal(8, form=form).double()(x), x)


# Pyramid pooling and ASPP


def with_statistics(module: nn.Module) -> nn.Module:
    """Return the module in float64 and eval mode, with random statistics and weights in its norms."""
    generator = torch.Generator().manual_seed(5)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
                assert isinstance(tensor, Tensor)
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return module.double().eval()


def normed(x: Tensor, layers: Any) -> Tensor:
    """Return x (B, C, H, W) after norm and activation of a `convolution`, by their formulas."""
    norm = layers[1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    x = (x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
    return torch.where(x >= 0, x, 0.01 * x)


def pointwise(x: Tensor, layers: Any) -> Tensor:
    return normed(torch.einsum("oc,bchw->bohw", layers[0].weight.flatten(1), x), layers)


def dilated(x: Tensor, layers: Any, rate: int) -> Tensor:
    """3x3 convolution: a sum over the nine shifts of x by `rate`; outside of the map there are zeros."""
    height, width = x.shape[2:]
    padded = x.new_zeros((*x.shape[:2], height + 2 * rate, width + 2 * rate))
    padded[:, :, rate : rate + height, rate : rate + width] = x
    out = torch.zeros((), dtype=x.dtype)
    for row in range(3):
        for column in range(3):
            shifted = padded[:, :, row * rate : row * rate + height, column * rate : column * rate + width]
            out = out + torch.einsum("oc,bchw->bohw", layers[0].weight[:, :, row, column], shifted)
    return normed(out, layers)


def enlarged(x: Tensor, size: int, axis: int) -> Tensor:
    """Return x resized linearly along one axis, with aligned first and last positions."""
    at = torch.arange(size, dtype=x.dtype) * (x.shape[axis] - 1) / (size - 1)
    low = at.floor().long().clamp(max=max(x.shape[axis] - 2, 0))
    high = (low + 1).clamp(max=x.shape[axis] - 1)
    share = (at - low).view([-1 if a == axis else 1 for a in range(4)])
    return x.index_select(axis, low) * (1 - share) + x.index_select(axis, high) * share


def test_pyramid_pooling_equals_its_parts() -> None:
    torch.manual_seed(6)
    module = with_statistics(PyramidPooling(8))
    x = torch.randn(2, 8, 12, 18, dtype=torch.float64)  # all numbers of parts divide these extents
    maps = [x]
    for parts, branch in zip((1, 2, 3, 6), module.branches, strict=True):
        means = x.reshape(2, 8, parts, 12 // parts, parts, 18 // parts).mean((3, 5))
        maps.append(enlarged(enlarged(pointwise(means, branch), 12, 2), 18, 3))
    assert all(part.shape == (2, 2, 12, 18) for part in maps[1:])
    torch.testing.assert_close(module(x), dilated(torch.cat(maps, 1), module.fuse, 1))


def test_aspp_equals_its_parts() -> None:
    torch.manual_seed(6)
    module = with_statistics(ASPP(4))
    x = torch.randn(2, 4, 13, 26, dtype=torch.float64)  # wider than rates of 12 and 24, narrower than 36
    views = [pointwise(x, module.point)]
    views += [dilated(x, branch, rate) for rate, branch in zip((12, 24, 36), module.dilated, strict=True)]
    views.append(pointwise(x.mean((2, 3), keepdim=True), module.pooled).expand(2, 4, 13, 26))
    torch.testing.assert_close(module(x), pointwise(torch.cat(views, 1), module.fuse))


@pytest.mark.parametrize("kind", [PyramidPooling, ASPP])
@pytest.mark.parametrize("size", [(1, 1), (5, 9)])
def test_pooling_modules_train_with_two_images_and_not_with_one(kind: type[nn.Module], size: tuple[int, int]) -> None:
    torch.manual_seed(7)
    module = kind(6)
    x = torch.randn(2, 6, *size, requires_grad=True)
    out = module(x)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    assert x.grad is not None
    assert x.grad.isfinite().all()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module(x[:1])


@pytest.mark.parametrize(("kind", "giga"), [(NonLocal, 108.1), (PyramidPooling, 88.8), (ASPP, 162.8)])
def test_flops_are_those_of_the_docstrings(kind: type[nn.Module], giga: float) -> None:
    with torch.device("meta"):
        module, x = kind(512).eval(), torch.empty(1, 512, 97, 97)
    with FlopCounterMode(display=False) as counter:
        module(x)
    assert counter.get_total_flops() == pytest.approx(giga * 1e9, rel=0.01)


def test_convolution_keeps_the_size_and_has_no_bias() -> None:
    for kernel, dilation in ((1, 1), (3, 1), (3, 4), (5, 2)):
        layers = convolution(3, 4, kernel, dilation=dilation)
        assert layers(torch.randn(2, 3, 7, 9)).shape == (2, 4, 7, 9)
        assert layers[0].bias is None


# build_context


def test_contexts_are_built_by_name() -> None:
    kinds = {"none": type(None), "rcca": RCCA, "nonlocal": NonLocal, "psp": PyramidPooling, "aspp": ASPP}
    assert tuple(kinds) == CONTEXTS
    for name, kind in kinds.items():
        for dims in (2, 3):
            module = build_context(name, 8, dims=dims)
            assert type(module) is kind
            # The head gives clips to attention for clips, and frames to all others.
            assert isinstance(module, GatedAttention) == (name in ("rcca", "nonlocal"))
            assert not isinstance(module, GatedAttention) or module.dims == dims


def test_settings_reach_the_modules() -> None:
    rcca = build_context("rcca", 8, recurrence=3, recompute=True, backend="torch")
    assert isinstance(rcca, RCCA)
    assert (rcca.in_channels, rcca.recurrence, rcca.recompute, rcca.backend) == (8, 3, True, "torch")
    assert build_context("rcca", 8, recurrence=0) is None
    for form in FORMS:
        module = build_context("nonlocal", 8, nonlocal_form=form, recompute=True)
        assert isinstance(module, NonLocal)
        assert (module.form, module.recompute) == (form, True)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: build_context("ocr", 8), ValueError, r"name must be one of \('none', 'rcca', .*got 'ocr'"),
        (lambda: build_context("psp", 8, recompute=True), ValueError, "recompute must be False for 'psp', got True"),
        (lambda: build_context("none", 8, recompute=True), ValueError, "recompute must be False for 'none', got True"),
        (lambda: build_context("rcca", 8, recurrence=-1), ValueError, "recurrence must be 0 or more, got -1"),
        (lambda: build_context("nonlocal", 8, nonlocal_form="dense"), ValueError, r"form must be one of .*got 'dense'"),
        (lambda: NonLocal(0), ValueError, "NonLocal: in_channels must be 1 or more, got 0"),
        (lambda: PyramidPooling(0), ValueError, "PyramidPooling: in_channels must be 1 or more, got 0"),
        (lambda: ASPP(2.0), TypeError, "ASPP: in_channels must be an int, got float"),
        (lambda: NonLocal(8)(torch.zeros(1, 8, 4)), ValueError, r"NonLocal: x must be \(B, C, H, W\) for dims=2"),
    ],
)
def test_mistakes_are_named(build: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
