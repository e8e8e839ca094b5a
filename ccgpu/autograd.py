"""torch.ops.ccgpu.cca_forward and cca_backward: their schemas, and every rule that torch asks of an op.

The ops are opaque to torch.compile, torch.export and FakeTensor, which see the fake rules only. The backend is chosen
when forward runs, and backward runs on the same one. A compiled program chooses at each run, in both passes: a choice
made while it is traced would add guards on the sizes.

Derivatives are registered by `register_derivative`: what `torch.library.register_autograd` does around each call of an
op shows in the time of small maps.

Forward saves q, k, v, out and lse. Backward of backward goes through `formula`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ccgpu import autocast, decomposition, flop_counts, formula
from ccgpu.dispatch import choose
from ccgpu.layouts import energy_dtype

_LIBRARY = torch.library.Library("ccgpu", "DEF")
_LIBRARY.define(
    "cca_forward(Tensor q, Tensor k, Tensor v, float scale, str? backend) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "cca_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor dlse, float scale, "
    "str? backend) -> (Tensor dq, Tensor dk, Tensor dv)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
FORWARD, BACKWARD = "ccgpu::cca_forward", "ccgpu::cca_backward"


def run_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str | None) -> tuple[Tensor, Tensor]:
    """Return out and lse by the backend for this call: the op's implementation, called by torch or for arrays."""
    return choose(q, backend, v).module.forward(q, k, v, scale)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor,
    scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return choose(q, backend, v).module.backward(dout, q, k, v, out, lse, dlse, scale)


_LIBRARY.impl("cca_forward", run_forward, "CompositeExplicitAutograd")
_LIBRARY.impl("cca_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake(FORWARD, lib=_LIBRARY)
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), q.new_empty((q.shape[0], *q.shape[2:]), dtype=energy_dtype(q.dtype))


@torch.library.register_fake(BACKWARD, lib=_LIBRARY)
def _backward_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor,
    scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


# Derivatives ----------------------------------------------------------------------------------------------------------


def register_derivative(
    library: torch.library.Library,
    name: str,
    derivative: Callable[..., tuple[Tensor | None, ...]],
    save: Callable[[Any, tuple[Any, ...], Any], None],
) -> None:
    """Register the derivative of an op, which autograd, torch.compile and torch.export then find.

    Args:
        library: the library that the op is defined in.
        name: "namespace::op"; no argument of the op is a list or keyword-only.
        derivative: function of (ctx, *gradients of the outputs) that returns a gradient, or None, for each argument.
        save: function of (ctx, arguments, outputs) that leaves in ctx what `derivative` needs.
    """
    namespace, _, op_name = name.partition("::")
    op = getattr(getattr(torch.ops, namespace), op_name).default

    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = op(*args)
        save(ctx, args, outputs)
        return outputs

    # The class's name is that of the results' grad_fn.
    members = {"forward": staticmethod(forward), "backward": staticmethod(derivative)}
    function: Any = type(f"{namespace}_{op_name}", (torch.autograd.Function,), members)

    def kernel(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    library.impl(op_name, kernel, "Autograd")


def backend_of(q: Tensor, backend: str | None, v: Tensor | None = None) -> str | None:
    """Return the name of the backend that has just run an op; the arguments are those of `choose`.

    If the tensors are traced (torch.compile, torch.export, FakeTensor), no backend has run: return `backend` itself.
    """
    return choose(q, None, v).name if backend is None and type(q) in (Tensor, torch.nn.Parameter) else backend


def _forward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, backend = inputs
    ctx.backend = backend_of(q, backend, v)
    ctx.save_for_backward(q, k, v, *output)


def _forward_derivative(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    q, k, v, out, lse = ctx.saved_tensors
    gradients = torch.ops.ccgpu.cca_backward(dout, q, k, v, out, lse, dlse, ctx.scale, ctx.backend)
    return (*gradients, None, None)


def _backward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dout, q, k, v, _, _, dlse, ctx.scale, _ = inputs
    ctx.save_for_backward(dout, q, k, v, dlse)


def _backward_derivative(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate dq, dk, dv as functions of dout, q, k, v and dlse, out and lse being functions of q, k, v."""
    dout, q, k, v, dlse = ctx.saved_tensors
    with torch.enable_grad():
        # Aliases as leaves: dout may itself depend on q, and autograd follows that path outside this function.
        leaves = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in (dout, q, k, v, dlse)]
        dout, q, k, v, dlse = leaves
        outputs = formula.attention(q, k, v, ctx.scale)
        first = torch.autograd.grad(outputs, (q, k, v), (dout, dlse), create_graph=True)
    ddout, ddq, ddk, ddv, ddlse = torch.autograd.grad(
        first, leaves, gradients, create_graph=torch.is_grad_enabled(), allow_unused=True
    )
    return ddout, ddq, ddk, ddv, None, None, ddlse, None, None


register_derivative(_LIBRARY, FORWARD, _forward_derivative, _forward_context)
register_derivative(_LIBRARY, BACKWARD, _backward_derivative, _backward_context)


# Autocast -------------------------------------------------------------------------------------------------------------


def _autocast(device_type: str) -> None:
    def kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str | None) -> tuple[Tensor, Tensor]:
        inputs = autocast.lowered_maps(device_type, q, k, v)
        with autocast.off(device_type):
            return torch.ops.ccgpu.cca_forward(*inputs, scale, backend)

    _LIBRARY.impl("cca_forward", kernel, f"Autocast{device_type.upper()}")


for _device_type in autocast.DEVICES:
    _autocast(_device_type)


# vmap -----------------------------------------------------------------------------------------------------------------


def _fold(x: Tensor, dim: int | None, size: int) -> Tensor:
    """Move the mapped axis into the batch: (B, ...) -> (size * B, ...)."""
    x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def _unfold(x: Tensor, size: int) -> Tensor:
    """Move the mapped axis out of the batch again: (size * B, ...) -> (size, B, ...)."""
    return x.unflatten(0, (size, x.shape[0] // size))


def vmap_rule(op: Any, tensors: int) -> Callable[..., tuple[Any, Any]]:
    """Return the vmap rule of an op whose first arguments are this many tensors."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        folded = [_fold(x, dim, size) for x, dim in zip(args[:tensors], in_dims, strict=False)]
        outputs = op(*folded, *args[tensors:])
        if isinstance(outputs, Tensor):
            return _unfold(outputs, size), 0
        return tuple(_unfold(x, size) for x in outputs), (0,) * len(outputs)

    return rule


torch.library.register_vmap(FORWARD, vmap_rule(torch.ops.ccgpu.cca_forward, 3), lib=_LIBRARY)
torch.library.register_vmap(BACKWARD, vmap_rule(torch.ops.ccgpu.cca_backward, 7), lib=_LIBRARY)


# FLOPs ----------------------------------------------------------------------------------------------------------------


def _line_products(q_shape: torch.Size, v_shape: torch.Size) -> tuple[int, int]:
    """Return the FLOPs of all Q K^T and of all P V, two a multiply-add: 2 n (S_1 + S_2 + ...) channels each."""
    positions = q_shape[0] * sum(q_shape[2:])
    for size in q_shape[2:]:
        positions *= size
    return 2 * positions * q_shape[1], 2 * positions * v_shape[1]


def _forward_flops(q: torch.Size, k: torch.Size, v: torch.Size, *args: Any, **kwargs: Any) -> int:
    keys, values = _line_products(q, v)
    return keys + values


def _backward_flops(dout: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *args: Any, **kwargs: Any) -> int:
    keys, values = _line_products(q, v)
    return 3 * keys + 2 * values


flop_counts.register([torch.ops.ccgpu.cca_forward], _forward_flops)
flop_counts.register([torch.ops.ccgpu.cca_backward], _backward_flops)


# Decomposition --------------------------------------------------------------------------------------------------------


def _decomposition(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str | None = None) -> tuple[Tensor, Tensor]:
    factor = decomposition.as_tensor(scale, q.device) if q.dtype == torch.float64 else scale
    return formula.attention(q, k, v, factor)


decomposition.register(torch.ops.ccgpu.cca_forward.default, _decomposition, _forward_fake)
