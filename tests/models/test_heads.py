"""The criss-cross head: the paper's figure 2 in plain torch, context modules, embedding, dropout. gamma is not 0."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccgpu.models.context import CONTEXTS
from ccgpu.models.heads import CCHead
from tests.models.problems import network, random_images


def randomise_norms(net: nn.Module) -> None:
    """Give every norm statistics and parameters of its own, so that leaving one out shows."""
    generator = torch.Generator().manual_seed(5)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            state = module.state_dict()
            for name, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.5)):
                state[name].copy_(torch.rand(state[name].shape, generator=generator) + low)


def norm_and_leaky_relu(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    state = norm.state_dict()
    scale = state["weight"] / (state["running_var"] + 1e-5).sqrt()
    x = x * scale[:, None, None] + (state["bias"] - state["running_mean"] * scale)[:, None, None]
    return torch.where(x > 0, x, 0.01 * x)


def test_head_equals_the_papers_figure() -> None:
    net = network(recurrence=2).eval()
    randomise_norms(net.head)
    head = net.head
    x = torch.randn(2, 512, 5, 7, generator=torch.Generator().manual_seed(2))
    attended = norm_and_leaky_relu(F.conv2d(x, head.conva[0].weight, padding=1), head.conva[1])
    before = attended
    for _ in range(2):
        q, k, v = (conv(attended) for conv in (head.cca.query_conv, head.cca.key_conv, head.cca.value_conv))
        energies = torch.einsum("bdhw,bdij->bhwij", q, k)
        same_row = torch.eye(5, dtype=torch.bool)[:, None, :, None]
        same_column = torch.eye(7, dtype=torch.bool)[None, :, None, :]
        energies = energies.masked_fill(~(same_row | same_column), -torch.inf)
        weights = energies.flatten(3).softmax(-1).unflatten(3, (5, 7))
        attended = 0.6 * torch.einsum("bhwij,bcij->bchw", weights, v) + attended
    assert (attended - before).abs().max() > 0.05
    attended = norm_and_leaky_relu(F.conv2d(attended, head.convb[0].weight, padding=1), head.convb[1])
    bottleneck = dict(head.bottleneck.named_children())
    merged = F.conv2d(torch.cat([x, attended], 1), bottleneck["0"].weight, padding=1)
    merged = norm_and_leaky_relu(merged, bottleneck["1"])
    expected = F.conv2d(merged, bottleneck["3"].weight, bottleneck["3"].bias)
    torch.testing.assert_close(head(x)[0], expected, rtol=1e-4, atol=1e-4)


def test_dropout_drops_whole_channels_in_train_mode_alone() -> None:
    head = CCHead(8, 3, channels=32, dropout=0.5)
    seen: list[Tensor] = []
    dict(head.bottleneck.named_children())["2"].register_forward_hook(lambda module, inputs, out: seen.append(out))
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(4))
    torch.manual_seed(0)
    head(x)
    empty = (seen[0] == 0).flatten(2).all(2)
    assert 0.2 < empty.float().mean() < 0.8
    assert (seen[0] != 0).flatten(2).any(2).logical_or(empty).all()
    head.eval()(x)
    assert not (seen[1] == 0).flatten(2).all(2).any()


@pytest.mark.parametrize("context", CONTEXTS)
def test_any_context_takes_the_place_of_the_attention(context: str) -> None:
    net = network(context=context)
    module = net.head.cca if context == "rcca" else net.head.context
    assert (module is None) == (context == "none")
    assert net.eval()(random_images()).shape == (2, 5, 33, 49)
    if module is not None:
        features = net.head.conva(net.backbone(random_images())[1])
        assert not torch.allclose(module(features), features, atol=1e-3)


def test_the_embedding_is_the_reduced_output_of_the_attention_in_train_mode_alone() -> None:
    net = network(embedding=16)
    seen: list[Tensor] = []
    net.head.cca.register_forward_hook(lambda module, inputs, out: seen.append(out))
    embedding = net(random_images()).embedding
    weight = net.head.embedding
    torch.testing.assert_close(embedding, F.conv2d(seen[0], weight.weight, weight.bias))
    assert embedding.shape == (2, 16, 5, 7)
    assert isinstance(net.eval()(random_images()), Tensor)
    assert network().head.embedding is None
