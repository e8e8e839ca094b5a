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
from ccgpu.models.ccnet import CCNet
from ccgpu.models.context import ASPP, NonLocal, PyramidPooling
from ccgpu.shards import Choice, Fact, Group, OnGroup, Windows, agree, check_group, exchange_device, exchangeable

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


def _padded_window(
    name: str, x: Any, axis: int, group: Group, slide: _Slide, fill: float, weight: Tensor | None, groups: int
) -> Tensor:
    """Return the inputs of this rank's outputs along the sharded axis, with `fill` beyond the map."""
    check_group(name, group)
    problem = _problem(name, x, weight)
    facts: dict[str, Fact] = {"dim": axis - 2, "B": 0, "C": 0, "the size that is not sharded": 0}
    own, needs, dtype, device = 0, False, _DTYPES[0], exchange_device(group)
    if problem is None:
        facts |= {"B": x.shape[0], "C": x.shape[1], "the size that is not sharded": x.shape[3 - axis]}
        own, dtype, device = x.shape[2 + axis], x.dtype, x.device
        needs = torch.is_grad_enabled() and x.requires_grad
    layer = {"reach": slide.reach, "stride": slide.stride, "padding": slide.padding, "groups": groups}
    layer["out_channels"] = 0 if weight is None else weight.shape[0]
    known: dict[str, Fact] = {**facts, **layer, "dtype": Choice(dtype, _DTYPES)}
    known["requires_grad of x"] = Choice(needs, (False, True))
    extents = agree(name, known, own, group, device, problem)
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


def _problem(name: str, x: Any, weight: Tensor | None) -> Exception | None:
    """Return why a layer with these weights cannot take x, or None."""
    if not isinstance(x, Tensor):
        return TypeError(f"{name}: x must be a tensor, got {type(x).__name__}; pass this rank's shard of the map.")
    if x.ndim != 4:
        return ValueError(f"{name}: x must be (B, C, H, W), got shape {tuple(x.shape)}; add the batch axis.")
    if x.dtype not in _DTYPES:
        return TypeError(f"{name}: x must be float32, bfloat16, float16 or float64, got {x.dtype}; convert it.")
    if not exchangeable(x):
        return ValueError(f"{name}: x must be a dense tensor on a CPU or CUDA device, got {x.layout} on {x.device}.")
    if weight is not None and weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        return TypeError(f"{name}: x must have the dtype of the weights, {weight.dtype}, got {x.dtype}; convert one.")
    return None


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
        weight, groups = (layer.weight, layer.groups) if isinstance(layer, HaloConv2d) else (None, 1)
        x = _padded_window(name, x, axis, layer.group, slide, fill, weight, groups)
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
        _check_padding("HaloConv2d", self)

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
        _check_indices("HaloMaxPool2d", self)

    def forward(self, input: Tensor) -> Tensor:
        """Return this rank's shard of the pooled map."""
        input, padding = _with_halo("HaloMaxPool2d", self, input, -torch.inf, self.ceil_mode)
        return F.max_pool2d(input, self.kernel_size, self.stride, padding, self.dilation, self.ceil_mode)


def _check_padding(name: str, layer: nn.Conv2d) -> None:
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise ValueError(
            f"{name}: padding must be zeros and a number, got {layer.padding!r} and padding_mode "
            f"{layer.padding_mode!r}; pad the map before."
        )


def _check_indices(name: str, layer: nn.MaxPool2d) -> None:
    if layer.return_indices:
        raise ValueError(f"{name}: return_indices must be False, got True; indices are not of the map.")


def convert_to_shards(net: nn.Module, group: Group, dim: int = -2) -> nn.Module:
    """Let a network's convolutions, max poolings and criss-cross attentions work on shards of maps, in place.

    A layer becomes a `HaloConv2d` or `HaloMaxPool2d` without being replaced: parameters, hooks, submodules and the
    state dict stay the same. Batch norms are converted by `ccgpu.train.distributed.convert_for_global_batch`.

    Layers of torch that read one position at a time stay as they are: activations, dropout, linear layers, nearest
    neighbours by a whole factor. What a `forward` of your own calls is not seen: compare the network on shards with the
    whole one once.

    Args:
        net: a network of 2D maps, or a layer; also one that is converted already, whose group is then changed.
        group: the process group over which they are sharded; `torch.distributed.group.WORLD` for all processes.
        dim: the sharded axis, -2 or -1.

    Returns:
        net.

    Raises:
        TypeError: a layer that reads other positions has no counterpart here: another convolution, pooling or
            normalisation, resizing, padding; non-local attention; a whole CCNet, which resizes its logits. The network
            is as before.
        ValueError: dim or a layer's padding is another one.
    """
    axis = _axis("convert_to_shards", dim)
    found = [(module, _counterpart(module, name or "the network itself")) for name, module in net.named_modules()]
    for module, counterpart in found:
        if isinstance(module, CrissCrossAttention):
            module.group, module.sharded_dim = group, dim
        elif counterpart is not None:
            # Another class instead of another layer: hooks, submodules and other names of the layer stay valid.
            module.__class__ = counterpart
            assert isinstance(module, (HaloConv2d, HaloMaxPool2d))
            module.group, module.axis = group, axis
    return net


def _counterpart(module: nn.Module, name: str) -> type[nn.Module] | None:
    """Return the class that a module gets, or None for one that works on a shard as it is.

    Raises:
        TypeError, ValueError: it cannot work on shards.
    """
    if isinstance(module, (HaloConv2d, HaloMaxPool2d)):
        return type(module)
    if isinstance(module, nn.Conv2d) and module.kernel_size == module.stride == (1, 1) and module.padding == (0, 0):
        return None
    if type(module) is nn.Conv2d:
        _check_padding(f"convert_to_shards: {name}", module)
        return HaloConv2d
    if type(module) is nn.MaxPool2d:
        _check_indices(f"convert_to_shards: {name}", module)
        return HaloMaxPool2d
    if isinstance(module, _READ_WHOLE_MAPS) or not _is_pointwise(module):
        raise TypeError(
            "convert_to_shards: layers must be torch.nn.Conv2d, torch.nn.MaxPool2d or read one position at a time, "
            f"got {type(module).__name__} at {name}; it would read a shard alone."
        )
    return None


def _is_pointwise(module: nn.Module) -> bool:
    """Return whether a module of torch's computes each position from itself; True for classes of others."""
    kind = next(kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn."))
    if kind in _OVER_ONE_AXIS:
        return module.dim in (1, -3)
    if isinstance(module, nn.Upsample):
        scale = module.scale_factor
        factors = scale if isinstance(scale, tuple) else (scale,)
        return module.mode == "nearest" and all(factor is not None and factor % 1 == 0 for factor in factors)
    if isinstance(module, nn.LayerNorm):
        return len(module.normalized_shape) == 1  # over channels, of maps in channels-last layout
    return kind in _POINTWISE or (kind.__module__ in _POINTWISE_MODULES and kind is not nn.MultiheadAttention)


_READ_WHOLE_MAPS = (CCNet, NonLocal, PyramidPooling, ASPP)
_OVER_ONE_AXIS = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.GLU)
_POINTWISE_MODULES = tuple(
    f"torch.nn.modules.{name}" for name in ("activation", "batchnorm", "container", "dropout", "linear", "module")
)
_POINTWISE = (nn.PixelShuffle, nn.ChannelShuffle)
