"""When the public functions compute by `formula`, in torch operations, instead of by the ops.

That is so under torch.func's transforms (grad, jvp, jacrev, hessian, ...) and in forward mode, for which custom ops can
have no rule: through an op, the transforms raise, and forward mode silently gives zeros. It is so for tracers too that
must see operators of torch: in `decomposed`, and in the ONNX exporter of TorchScript graphs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

from ccgpu import autocast, decomposition

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


def replaced(*tensors: Tensor) -> bool:
    """Return whether `formula` takes the op's place in a call with these tensors."""
    return within_export() or without_rule(*tensors)


def without_rule(*tensors: Tensor) -> bool:
    """Return whether a derivative by these tensors is being taken for which an op has no rule.

    Ops have rules for vmap and for autograd's backward. Compiled code has no dual numbers of its own.
    """
    if torch.compiler.is_compiling():
        return _within_transform()
    return _within_transform() or any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def within_export() -> bool:
    """Return whether a tracer must see operators of torch: in `decomposed`, or in torch.onnx.export(dynamo=False).

    With dynamo=True the exporter has the ops' decompositions.
    """
    if torch.compiler.is_compiling():
        return decomposition.active
    # torch imports its exporter when that is first used.
    within_onnx = torch.jit.is_tracing() and "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()
    return decomposition.is_active() or within_onnx


def by_formula(function: Callable[..., T], lower: Callable[..., Sequence[Tensor]], *tensors: Tensor) -> T:
    """Return function(*tensors), one of `formula`; under autocast, function(*lower(device type, *tensors))."""
    kind = tensors[0].device.type
    if not autocast.is_on(kind):
        return function(*tensors)
    with autocast.off(kind):
        return function(*lower(kind, *tensors))
