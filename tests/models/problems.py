"""Attention modules, networks, inputs, gradients and tensors saved for backward, shared by the tests of models/."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ccgpu.models.attention import GatedAttention
from ccgpu.models.ccnet import CCNet

Module = TypeVar("Module", bound=GatedAttention)
SIZES = {1: (7,), 2: (4, 5), 3: (2, 3, 4)}


def make(kind: Callable[..., Module], *arguments: Any, **options: Any) -> Module:
    """Return a float64 module with gamma 0.7 and weights that are large enough for peaked attention."""
    torch.manual_seed(1)
    module = kind(*arguments, **options).double()
    with torch.no_grad():
        module.gamma.fill_(0.7)
        for convolution in (module.query_conv, module.key_conv):
            convolution.weight.mul_(3)
    return module


def features(dims: int, channels: int = 8, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, *SIZES[dims], generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def network(num_classes: Any = 5, *, backbone: str = "resnet18", gamma: float = 0.6, **options: Any) -> CCNet:
    """Return a small CCNet whose gamma is not 0, so that its attention has an effect."""
    torch.manual_seed(0)
    net = CCNet(backbone, num_classes, **{"head_channels": 16, **options})
    for module in net.modules():
        if isinstance(module, GatedAttention):
            nn.init.constant_(module.gamma, gamma)
    return net


def random_images(height: int = 33, width: int = 49, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def clips(frames: int = 2, height: int = 33, width: int = 49) -> Tensor:
    return torch.randn(2, 3, frames, height, width, generator=torch.Generator().manual_seed(6))


def gradients(out: Tensor, x: Tensor, module: nn.Module) -> list[Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)
    return list(torch.autograd.grad((out * weights).sum(), [x, *module.parameters()]))


def saved_for_backward(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the tensors that forward saves for backward, without parameters; tensors of one memory count once."""
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    parameters = {parameter.data_ptr() for parameter in module.parameters()}
    return [tensor for pointer, tensor in saved.items() if pointer not in parameters]
