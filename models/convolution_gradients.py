"""Right gradients of dilated convolutions in bfloat16 on CPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ccgpu import autocast

_WHOLE = 16  # a group with a multiple of so many input channels gets the right gradient


def right_gradients(x: Tensor) -> AbstractContextManager[object]:
    """Return a context for a network's forward pass in which its dilated convolutions get right gradients.

    On CPUs torch 2.13 computes the bfloat16 gradient of the weight of `torch.nn.functional.conv2d` and
    `conv_transpose2d` wrongly for some calls, without an error or a warning. Each such call has stride 1, dilated rows,
    a map or a weight that is channels_last, and a number of channels in each group (of a transposed one: output
    channels) that is no multiple of 16; the relative error is about 1 or more, up to infinity and NaN
    (`python -m benchmarks.convolution_gradients`, docs/results/camvid-recipe/gradients.jsonl). In float32 it is right.
    So in this context a dilated convolution with such a number of channels is computed in float32 wherever bfloat16
    derivatives may follow on a CPU; its result is bfloat16 all the same. Everything else stays as it is: other
    operations, dtypes and devices, forward passes without gradients, and exported graphs.

    `TimmBackbone` and `ASPP` do it themselves; no other network of this library needs it. The backward pass may run
    outside of the context, and the context inside or outside of a compiled function.

        with right_gradients(images):
            logits = net(images)

    Args:
        x: the network's input, whose device and dtype decide whether anything is to be done.
    """
    return _RightGradients() if derives_in_bfloat16_on_cpu(x) else nullcontext()


def derives_in_bfloat16_on_cpu(x: Tensor) -> bool:
    """Return whether bfloat16 derivatives may follow on a CPU; an exported graph holds plain convolutions."""
    if isinstance(x, torch.fx.Proxy):
        return False
    if x.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return False
    return autocast.computed_dtype(x) == torch.bfloat16


class _RightGradients(TorchFunctionMode):
    """The context of `right_gradients`: torch calls it instead of each of its functions."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch, a convolution of the kind above in float32."""
        named = kwargs or {}
        if func is torch.conv2d and _is_wrong(*_arguments(args, named, dilation=5)):
            return _in_float32(func, args, named)
        if func is torch.conv_transpose2d and _is_wrong(*_arguments(args, named, dilation=7)):
            return _in_float32(func, args, named)
        return func(*args, **named)


def _arguments(args: Sequence[Any], kwargs: Mapping[str, Any], *, dilation: int) -> tuple[Tensor, Tensor, Any]:
    """Return input, weight and dilation of a call; `dilation` is its position among the arguments."""
    places = (("input", 0, None), ("weight", 1, None), ("dilation", dilation, 1))
    x, weight, rate = (args[i] if i < len(args) else kwargs.get(name, default) for name, i, default in places)
    return x, weight, rate


def _is_wrong(x: Tensor, weight: Tensor, dilation: int | Sequence[int]) -> bool:
    """Return whether torch may compute the gradient of this weight wrongly."""
    dilated = dilation > 1 if isinstance(dilation, int) else max(dilation) > 1
    return dilated and weight.shape[1] % _WHOLE != 0 and derives_in_bfloat16_on_cpu(x)


def _in_float32(func: Callable[..., Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    def single(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) else value

    with autocast.off("cpu"):
        return func(*map(single, args), **{name: single(value) for name, value in kwargs.items()}).to(torch.bfloat16)
