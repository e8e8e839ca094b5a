"""The local backbone: its field of view, by gradients; and that of a network around it."""

from __future__ import annotations

import pytest
import torch

from ccgpu.models.backbones import build_backbone, load_imagenet
from ccgpu.models.ccnet import CCNet
from ccgpu.models.local import LocalBackbone

HEAD = 3 * 2 * 8  # pixels that three 3x3 convolutions at stride 8 add
UPSAMPLING = 8  # between two positions, logits are interpolated


def seen(outputs: torch.Tensor, images: torch.Tensor) -> list[tuple[int, int]]:
    """Return first and last of the rows, and of the columns, of the image on which an output depends."""
    (gradient,) = torch.autograd.grad(outputs.sum(), images, retain_graph=True)
    changed = gradient[0].abs().sum(0) != 0
    return [(int(line.nonzero().min()), int(line.nonzero().max())) for line in (changed.any(1), changed.any(0))]


def test_field_of_view_is_what_the_gradient_says() -> None:
    torch.manual_seed(0)
    backbone = LocalBackbone().double().eval()
    images = torch.randn(1, 3, 96, 104, dtype=torch.double, requires_grad=True)
    before, last = backbone(images)
    assert before.shape == last.shape == (1, 32, 12, 13)
    assert backbone.field_of_view == 15
    for features in (before, last):
        for y, x in ((5, 6), (4, 3)):
            rows, columns = seen(features[..., y, x], images)
            assert rows == (8 * y - 7, 8 * y + 7)
            assert columns == (8 * x - 7, 8 * x + 7)
    assert seen(last[..., 0, 12], images) == [(0, 7), (8 * 12 - 7, 8 * 12 + 7)]  # cut at the borders


@pytest.mark.parametrize(("context", "sees_all"), [("none", False), ("rcca", True), ("nonlocal", True), ("psp", True)])
def test_a_network_without_context_sees_less_than_half_of_the_image(context: str, sees_all: bool) -> None:
    """The limit is that of the convolutions: at most 71 of 160 pixels; with a context module it is the whole image."""
    torch.manual_seed(0)
    gamma = {"gamma": 1.0} if context in ("rcca", "nonlocal") else {}
    net = CCNet("local", 5, context=context, head_channels=8, backend="cpu", **gamma).double().eval()  # type: ignore[arg-type]
    images = torch.randn(1, 3, 160, 160, dtype=torch.double, requires_grad=True)
    for pixel in ((80, 80), (77, 92)):
        for first, last in seen(net(images)[(0, slice(None), *pixel)], images):
            extent = last - first + 1
            if sees_all:
                assert extent == 160
            else:
                limit = LocalBackbone().field_of_view + HEAD + UPSAMPLING
                assert limit == 71
                assert limit - UPSAMPLING <= extent <= limit


def test_there_are_no_published_weights() -> None:
    with pytest.raises(ValueError, match="backbone must be one with published weights, got a LocalBackbone and 'pack"):
        load_imagenet(build_backbone("local"), "package")
    with pytest.raises(ValueError, match="stem must be None for 'local', got 'deep'"):
        build_backbone("local", stem="deep")


def test_other_numbers_of_channels_have_their_own_statistics() -> None:
    backbone = build_backbone("local", in_channels=5)
    assert backbone.mean == backbone.std == (127.5,) * 5
    assert backbone(torch.zeros(2, 5, 16, 16))[1].shape == (2, 32, 2, 2)
    assert sum(parameter.numel() for parameter in LocalBackbone().parameters()) == 15504
