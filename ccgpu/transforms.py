"""torch.func's transforms (grad, jvp, jacrev, hessian, ...) and forward mode, for which custom ops can have no rule.

Through an op, the transforms raise, and forward mode silently gives zeros. When they are active, the public functions
compute by `formula` instead, in torch operations that have all rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

from ccgpu import autocast

T = TypeVar("T")


def _within_transform() -> bool:
    """Return whether a transform of torch.func other than vmap is active."""
    if not torch._C._are_functorch_transforms_active():
        return False
    keys = [interpreter.key() for interpreter in retrieve_all_functorch_interpreters()]
    return TransformType.Grad in keys or TransformType.Jvp in keys


# torch.compile activates the transforms that it traces, so it may call this once and treat the answer as a constant.
# torch.compiler.assume_constant_result sets the same attribute, but imports all of torch._dynamo.
_within_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def without_rule(*tensors: Tensor) -> bool:
    """Return whether a derivative by these tensors is being taken for which an op has no rule.

    Ops have rules for vmap and for autograd's backward. Compiled code has no dual numbers of its own.
    """
    if torch.compiler.is_compiling():
        return _within_transform()
    return _within_transform() or any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def by_formula(function: Callable[..., T], lower: Callable[..., Sequence[Tensor]], *tensors: Tensor) -> T:
    """Return function(*tensors), one of `formula`; under autocast, function(*lower(device type, *tensors))."""
    kind = tensors[0].device.type
    if not autocast.is_on(kind):
        return function(*tensors)
    with autocast.off(kind):
        return function(*lower(kind, *tensors))
