"""The program of one rank of `tests/models/test_halo.py`: layers and a network on shards of maps, saved to a file."""

import copy
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

import ccgpu
from ccgpu.models.attention import RCCA
from ccgpu.models.halo import HaloConv2d, convert_to_shards
from ccgpu.models.resnet import ResNet
from ccgpu.train.distributed import convert_for_global_batch

RANKS = 3


class Case(NamedTuple):
    """A layer on a map drawn from a seed."""

    layer: nn.Module
    extents: list  # of the ranks' shards
    dim: int = -2
    other: int = 5  # the size that is not sharded


def conv(*sizes, channels=(2, 4), **options):
    torch.manual_seed(0)
    return nn.Conv2d(*channels, *sizes, **options).double()


CASES = {
    "3x3": Case(conv(3, padding=1), [4, 2, 5]),
    "thin shards": Case(conv(3, padding=3, dilation=3), [1, 1, 2]),
    "a shard of none": Case(conv(3, padding=3), [3, 4, 0]),
    "columns": Case(conv((3, 5), padding=(1, 2)), [3, 4, 4], dim=-1),
    "stride": Case(conv(3, stride=2, padding=1), [3, 4, 4]),
    "7x7 stem": Case(conv(7, stride=2, padding=3), [5, 6, 2]),
    "1x1": Case(conv(1), [4, 1, 3]),
    "1x1 with stride": Case(conv(1, stride=2, bias=False), [3, 3, 3]),
    "depthwise": Case(conv(3, padding=1, groups=2), [2, 2, 3]),
    "no padding": Case(conv(5), [5, 2, 5]),
    "even kernel": Case(conv(4, stride=3, padding=1), [6, 4, 7]),
    "more padding than the layer reads": Case(conv(3, padding=4), [2, 2, 2]),
    "pooling": Case(nn.MaxPool2d(3, stride=2, padding=1), [3, 4, 4]),
    "pooling, ceil": Case(nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True), [4, 4, 4]),
}


def data_of(case):
    """Return the whole map of a case."""
    sizes = [sum(case.extents), case.other]
    shape = (2, 2, *(sizes if case.dim == -2 else sizes[::-1]))
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def run(layer, x):
    """Return the results, and the gradients of x and the weights in use for dout = 3 out^2."""
    x = x.detach().requires_grad_()
    out = layer(x)
    gradients = torch.autograd.grad(out.pow(3).sum(), (x, *layer.parameters()), allow_unused=True)
    return [out.detach(), *(gradient for gradient in gradients if gradient is not None)]


def network():
    """Return a small CCNet: strides, pooling, dilation, batch norm, recurrent attention."""
    torch.manual_seed(1)
    layers = [nn.Conv2d(2, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.MaxPool2d(3, stride=2, padding=1), nn.Conv2d(8, 16, 3, padding=2, dilation=2), nn.BatchNorm2d(16)]
    return nn.Sequential(*layers, RCCA(16, reduction=4, gamma=1.0, backend="cpu"), nn.Conv2d(16, 3, 1)).double()


IMAGE = Case(nn.Identity(), [12, 8, 20], other=14)
PHOTO = Case(nn.Identity(), [24, 16, 24], other=16)


def backbone():
    """Return layer3 of the ResNet-18 of this project, whose pooling and dilated convolutions read shards, too."""

    class Layer3(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.resnet = ResNet(18, in_channels=2)

        def forward(self, images):
            return self.resnet(images)[0]

    return Layer3().double()


def main(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    world = dist.group.WORLD

    def shard(case):
        return data_of(case).split(case.extents, case.dim)[rank]

    cases = {}
    for name, case in CASES.items():
        layer = convert_to_shards(nn.Sequential(copy.deepcopy(case.layer)), world, case.dim)
        cases[name] = run(layer, shard(case))
    net = convert_for_global_batch(convert_to_shards(network(), world))
    net = copy.deepcopy(net)  # an average of the weights is one
    photo = convert_for_global_batch(convert_to_shards(backbone(), world))
    errors = {}
    thin = torch.zeros(1, 2, 1, 3)
    calls = {
        "no outputs": lambda: HaloConv2d(2, 1, 3, stride=3, padding=1)(thin),
        "width": lambda: HaloConv2d(2, 1, 3, padding=1)(thin if rank else thin[..., :2]),
        "no batch": lambda: HaloConv2d(2, 1, 3, padding=1)(thin if rank else thin[0]),
        "other layer": lambda: HaloConv2d(2, 1, 3, padding=1 if rank else 2)(thin),
        "out_channels": lambda: HaloConv2d(2, 4 if rank else 2, 3, padding=1)(thin),
        "groups": lambda: HaloConv2d(2, 2, 3, padding=1, groups=2 if rank else 1)(thin),
        "no tensor": lambda: HaloConv2d(2, 1, 3, padding=1)(thin if rank else None),
        "meta": lambda: HaloConv2d(2, 1, 3, padding=1)(thin if rank else thin.to("meta")),
        "dtype": lambda: HaloConv2d(2, 1, 3, padding=1)(thin if rank else thin.double()),
        "channels": lambda: RCCA(2, group=world)(thin if rank else thin[:, :1]),
        "attention, meta": lambda: ccgpu.distributed.cca(*[thin if rank else thin.to("meta")] * 3),
        "attention, sparse": lambda: ccgpu.distributed.cca(*[thin if rank else thin.to_sparse()] * 3),
    }
    for name, call in calls.items():
        try:
            call()
        except (RuntimeError, ValueError, TypeError) as error:
            errors[name] = f"{type(error).__name__}: {error}"
    saved = {"cases": cases, "network": run(net, shard(IMAGE)), "state": net.state_dict(), "errors": errors}
    saved["backbone"] = run(photo, shard(PHOTO))
    torch.save(saved, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
