"""Convolutions and pooling of maps whose rows lie on several processes: each rank reads its neighbours' halo.

With `CrissCrossAttention(..., group=...)` and a batch norm over all processes (`ccgpu.train.distributed`) they make a
network of one that is larger than a device. The convolution of torch's DTensor does not: on two gloo ranks of torch
2.13 the result of convolving a sharded map claims to be whole and has the size of one shard.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ccgpu.models.attention import CrissCrossAttention
from ccgpu.shards import Choice, Fact, Group, OnGroup, Windows, agree, check_group

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _Exchange(torch.autograd.Function):
    """A rank's window of a map of which it holds a shard; transposed, its shard of the sum of all ranks' windows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, windows: Windows, transposed: bool) -> Tensor:
        ctx.windows, ctx.transposed = windows, transposed
        return windows.scatter(x) if transposed else windows.gather(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _Exchange.apply(gradients[0], ctx.windows, not ctx.transposed), None, None


def _pair(value: int | tuple[int, ...] | str) -> tuple[int, int]:
    """Return a layer's setting for both axes; `HaloConv2d` takes no padding by name."""
    assert not isinstance(value, str)
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _axis(name: str, dim: int) -> int:
    """Return the number, 0 or 1, of the spatial axis of (B, C, H, W) that `dim` names."""
    if dim not in (-2, -1, 2, 3):
        raise ValueError(f"{name}: dim must be -2 (rows) or -1 (columns), got {dim!r}; pass the sharded axis.")
    return dim % 2


class _Slide:
    """How a window of some positions slides along the sharded axis, and which rank computes which positions of it.

    Output j reads the inputs j s - p, j s - p + d, ..., for stride s, padding p and dilation d. It belongs to the rank
    that holds input j s, or to the last one beyond the map.
    """

    def __init__(self, kernel: int, stride: int, padding: int, dilation: int, ceil: bool = False) -> None:
        self.reach = dilation * (kernel - 1)
        self.stride, self.padding, self.ceil = stride, padding, ceil
        self.local = kernel == stride == 1 and padding == 0

    def outputs(self, size: int) -> int:
        """Return the number of outputs for a map of this size, as torch counts them."""
        last = size + 2 * self.padding - self.reach - 1
        number = (-(-last // self.stride) if self.ceil else last // self.stride) + 1
        if self.ceil and (number - 1) * self.stride >= size + self.padding:
            number -= 1  # a window that begins beyond the map does not count
        return max(0, number)

    def windows(self, extents: list[int]) -> list[tuple[int, int]]:
        """Return each rank's range of inputs for its outputs, which may leave the map; empty where it has none."""
        size, start, found = sum(extents), 0, []
        total = self.outputs(size)
        for rank, extent in enumerate(extents):
            first, last = -(-start // self.stride), -(-(start + extent) // self.stride)
            last = total if rank == len(extents) - 1 else min(last, total)
            begin = first * self.stride - self.padding
            end = (last - 1) * self.stride - self.padding + self.reach + 1
            found.append((begin, end) if first < last else (0, 0))
            start += extent
        return found


def _padded_window(name: str, x: Tensor, axis: int, group: Group, slide: _Slide, fill: float) -> Tensor:
    """Return the inputs of this rank's outputs along the sharded axis, with `fill` beyond the map."""
    check_group(name, group)
    problem: Exception | None = None
    if x.ndim != 4:
        problem = ValueError(f"{name}: x must be (B, C, H, W), got shape {tuple(x.shape)}; add the batch axis.")
    elif x.dtype not in _DTYPES:
        problem = TypeError(f"{name}: x must be float32, bfloat16, float16 or float64, got {x.dtype}; convert it.")
    needs = torch.is_grad_enabled() and x.requires_grad
    facts: dict[str, Fact] = {"dim": axis - 2, "B": 0, "C": 0, "the size that is not sharded": 0}
    own = 0
    if problem is None:
        facts |= {"B": x.shape[0], "C": x.shape[1], "the size that is not sharded": x.shape[3 - axis]}
        own = x.shape[2 + axis]
    layer = {"reach": slide.reach, "stride": slide.stride, "padding": slide.padding}
    dtype = Choice(x.dtype if problem is None else _DTYPES[0], _DTYPES)
    known: dict[str, Fact] = {**facts, **layer, "dtype": dtype, "requires_grad of x": Choice(needs, (False, True))}
    extents = agree(name, known, own, group, x.device, problem)
    size, windows = sum(extents), slide.windows(extents)
    for rank, (begin, end) in enumerate(windows):
        if begin >= end:
            raise ValueError(
                f"{name}: every rank must have outputs along the sharded axis, got none on rank {rank} for shards of "
                f"{extents} positions and stride {slide.stride}; use fewer ranks or a larger map."
            )
    inside = [(max(0, begin), min(size, end)) for begin, end in windows]
    inside = [(begin, end) if begin < end else (0, 0) for begin, end in inside]
    begin, end = windows[dist.get_rank(group)]
    window = _Exchange.apply(x, Windows(name, 2 + axis, extents, inside, group), False)
    before = min(max(0, -begin), end - begin)
    after = end - begin - before - window.shape[2 + axis]
    return F.pad(window, (0, 0, before, after) if axis == 0 else (before, after), value=fill)


def _with_halo(
    name: str, layer: HaloConv2d | HaloMaxPool2d, x: Tensor, fill: float, ceil: bool = False
) -> tuple[Tensor, tuple[int, int]]:
    """Return what this rank's outputs of a layer are computed from, and the padding of both axes that is left to do."""
    axis, padding = layer.axis, [*_pair(layer.padding)]
    kernel, stride, own, dilation = (
        _pair(setting)[axis] for setting in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    )
    slide = _Slide(kernel, stride, own, dilation, ceil)
    if not slide.local:
        x = _padded_window(name, x, axis, layer.group, slide, fill)
        padding[axis] = 0
    return x, (padding[0], padding[1])


class HaloConv2d(OnGroup, nn.Conv2d):
    """`torch.nn.Conv2d` of a map of which every rank holds a shard along one axis.

    The shards, one after another by rank, are the map, and the results the shards of the convolution of the map. With
    stride s, output j lies on the rank of input j s. A rank reads the rows that its outputs need from the ranks that
    hold them, however many these are; nothing is read twice by a rank.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in `torch.nn.Conv2d`;
            padding by zeros, as a number or two.
        group: a `torch.distributed` process group; None is the default group of all processes.
        dim: the sharded axis of (B, C, H, W), -2 or -1.

    Shape:
        x: (B, C, H, W), this rank's shard; the size along `dim` may differ from rank to rank.

    Raises:
        ValueError: dim, padding or padding_mode is another one; or, on all ranks, the shards do not fit one another or
            a rank has no outputs.
        RuntimeError: another rank has ended or does not answer.

    A call of a layer that is not 1x1 gathers 24 integers from every rank, and exchanges the halo; so does backward.
    Every rank must run both. The gradients of the weights are those of a rank's outputs: sum them over the ranks.

    Examples:
        >>> import torch, torch.distributed as dist
        >>> from ccgpu.models.halo import HaloConv2d
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun does it otherwise
        >>> HaloConv2d(3, 8, 3, stride=2, padding=1)(torch.zeros(1, 3, 7, 9)).shape
        torch.Size([1, 8, 4, 5])
        >>> dist.destroy_process_group()
    """

    def __init__(self, *args: Any, group: Group = None, dim: int = -2, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group, self.axis = group, _axis("HaloConv2d", dim)
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            raise ValueError(
                f"HaloConv2d: padding must be zeros and a number, got {self.padding!r} and padding_mode "
                f"{self.padding_mode!r}; pad the map before."
            )

    def forward(self, input: Tensor) -> Tensor:
        """Return this rank's shard of the convolution of the map."""
        input, padding = _with_halo("HaloConv2d", self, input, 0.0)
        return F.conv2d(input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


class HaloMaxPool2d(OnGroup, nn.MaxPool2d):
    """`torch.nn.MaxPool2d` of a map of which every rank holds a shard along one axis; see `HaloConv2d`.

    Args:
        kernel_size, stride, padding, dilation, ceil_mode: as in `torch.nn.MaxPool2d`.
        group, dim: as in `HaloConv2d`; so are shapes and errors.
    """

    def __init__(self, *args: Any, group: Group = None, dim: int = -2, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group, self.axis = group, _axis("HaloMaxPool2d", dim)
        if self.return_indices:
            raise ValueError("HaloMaxPool2d: return_indices must be False, got True; indices are not of the map.")

    def forward(self, input: Tensor) -> Tensor:
        """Return this rank's shard of the pooled map."""
        input, padding = _with_halo("HaloMaxPool2d", self, input, -torch.inf, self.ceil_mode)
        return F.max_pool2d(input, self.kernel_size, self.stride, padding, self.dilation, self.ceil_mode)


def convert_to_shards(net: nn.Module, group: Group, dim: int = -2) -> nn.Module:
    """Let a network's convolutions, max poolings and criss-cross attentions work on shards of maps, in place.

    Parameters, buffers and the state dict stay the same. Batch norms are converted by
    `ccgpu.train.distributed.convert_for_global_batch`.

    Args:
        net: a network of 2D maps.
        group: the process group over which they are sharded; `torch.distributed.group.WORLD` for all processes.
        dim: the sharded axis, -2 or -1.

    Returns:
        net.

    Raises:
        TypeError: a layer that reads other positions has no counterpart here: another convolution or pooling.
        ValueError: dim or a layer's padding is another one.
    """
    _axis("convert_to_shards", dim)
    for name, module in list(net.named_modules()):
        for child_name, child in list(module.named_children()):
            new = _converted(child, f"{name}.{child_name}".lstrip("."), group, dim)
            if new is not child:
                setattr(module, child_name, new)
    return net


def _converted(module: nn.Module, name: str, group: Group, dim: int) -> nn.Module:
    if isinstance(module, CrissCrossAttention):
        module.group, module.sharded_dim = group, dim
        return module
    new: nn.Module
    if type(module) is nn.MaxPool2d:
        window = (module.kernel_size, module.stride, module.padding, module.dilation)
        new = HaloMaxPool2d(*window, ceil_mode=module.ceil_mode, group=group, dim=dim)
    elif isinstance(module, nn.Conv2d) and module.kernel_size == module.stride == (1, 1) and module.padding == (0, 0):
        return module
    elif type(module) is nn.Conv2d:
        options = {"groups": module.groups, "padding_mode": module.padding_mode, "device": "meta"}
        sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
        channels = (module.in_channels, module.out_channels)
        new = HaloConv2d(*channels, *sizes, bias=module.bias is not None, **options, group=group, dim=dim)
        # The parameters themselves, not copies, because an optimiser may refer to them.
        new.weight, new.bias = module.weight, module.bias
    elif isinstance(module, (nn.modules.conv._ConvNd, *_POOLINGS)):
        raise TypeError(
            f"convert_to_shards: layers must be torch.nn.Conv2d and torch.nn.MaxPool2d, got {type(module).__name__} at "
            f"{name}; it would read a shard alone."
        )
    else:
        return module
    return new.train(module.training)


_POOLINGS = (
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)
