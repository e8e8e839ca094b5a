"""torch.ops.ccgpu.affinity, aggregate and aggregate_transposed: their schemas, and every rule torch asks of an op.

The three are linear in each argument, and each derivative is one of the three. With A affinity, G aggregate and T
aggregate_transposed, so that y = T(w, x) means y_i = sum of w[j, u] x_u over all (u, j) with i_j(u) = i:

    E = A(q, k):    dq = G(dE, k),    dk = T(dE, q)
    out = G(w, v):  dw = A(dout, v),  dv = T(w, dout)
    y = T(w, x):    dw = A(x, dy),    dx = G(w, dy)

So derivatives of any order come from the same kernels. As in `autograd`, the ops are opaque to torch.compile,
torch.export and FakeTensor, and derivatives run on the backend that the op ran on.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from ccgpu import autocast, decomposition, flop_counts, formula
from ccgpu.autograd import backend_of, register_derivative, vmap_rule
from ccgpu.dispatch import choose
from ccgpu.layouts import empty_energies

_LIBRARY = torch.library.Library("ccgpu", "FRAGMENT")
for _schema in (
    "affinity(Tensor q, Tensor k, str? backend) -> Tensor",
    "aggregate(Tensor weights, Tensor v, str? backend) -> Tensor",
    "aggregate_transposed(Tensor weights, Tensor x, str? backend) -> Tensor",
):
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
AFFINITY, AGGREGATE, TRANSPOSED = "ccgpu::affinity", "ccgpu::aggregate", "ccgpu::aggregate_transposed"


def run_affinity(q: Tensor, k: Tensor, backend: str | None) -> Tensor:
    """Return the energies by the backend for this call: the op's implementation, called by torch or for arrays."""
    return choose(q, backend, function="affinity").module.affinity(q, k)


def run_aggregate(weights: Tensor, v: Tensor, backend: str | None) -> Tensor:
    """Return the sums by the backend for this call: the op's implementation, called by torch or for arrays."""
    return choose(v, backend, function="aggregate").module.aggregate(weights, v)


def _aggregate_transposed(weights: Tensor, x: Tensor, backend: str | None) -> Tensor:
    return choose(x, backend, function="aggregate_transposed").module.aggregate_transposed(weights, x)


_LIBRARY.impl("affinity", run_affinity, "CompositeExplicitAutograd")
_LIBRARY.impl("aggregate", run_aggregate, "CompositeExplicitAutograd")
_LIBRARY.impl("aggregate_transposed", _aggregate_transposed, "CompositeExplicitAutograd")


@torch.library.register_fake(AFFINITY, lib=_LIBRARY)
def _affinity_fake(q: Tensor, k: Tensor, backend: str | None) -> Tensor:
    return empty_energies(q)


@torch.library.register_fake(AGGREGATE, lib=_LIBRARY)
@torch.library.register_fake(TRANSPOSED, lib=_LIBRARY)
def _aggregate_fake(weights: Tensor, values: Tensor, backend: str | None) -> Tensor:
    return torch.empty_like(values)


# Derivatives ----------------------------------------------------------------------------------------------------------


def _save_both(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, second, backend = inputs
    ctx.backend = backend_of(second, backend)
    ctx.save_for_backward(first, second)


def _derivative(of_first: Callable[..., Tensor], of_second: Callable[..., Tensor]) -> Callable[..., Any]:
    """Return the derivative rule of an op of two tensors.

    Args:
        of_first: function of (output's gradient, first, second, backend) that returns the gradient of the first tensor.
        of_second: the same function for the gradient of the second tensor.
    """

    def rule(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        first, second = ctx.saved_tensors
        with autocast.off(second.device.type):  # a derivative keeps the dtype that its op ran in
            dfirst = of_first(gradient, first, second, ctx.backend) if ctx.needs_input_grad[0] else None
            dsecond = of_second(gradient, first, second, ctx.backend) if ctx.needs_input_grad[1] else None
        return dfirst, dsecond, None

    return rule


_ops = torch.ops.ccgpu
for _name, _of_first, _of_second in (
    (
        AFFINITY,
        lambda de, q, k, backend: _ops.aggregate(de, k, backend),
        lambda de, q, k, backend: _ops.aggregate_transposed(de, q, backend),
    ),
    (
        AGGREGATE,
        lambda dout, w, v, backend: _ops.affinity(dout, v, backend),
        lambda dout, w, v, backend: _ops.aggregate_transposed(w, dout, backend),
    ),
    (
        TRANSPOSED,
        lambda dy, w, x, backend: _ops.affinity(x, dy, backend),
        lambda dy, w, x, backend: _ops.aggregate(w, dy, backend),
    ),
):
    register_derivative(_LIBRARY, _name, _derivative(_of_first, _of_second), _save_both)


# Autocast -------------------------------------------------------------------------------------------------------------


def _autocast(device_type: str) -> None:
    def affinity(q: Tensor, k: Tensor, backend: str | None) -> Tensor:
        q, k = autocast.lowered_maps(device_type, q, k)
        with autocast.off(device_type):
            return torch.ops.ccgpu.affinity(q, k, backend)

    def aggregate(weights: Tensor, v: Tensor, backend: str | None) -> Tensor:
        weights, v = autocast.lowered_weights(device_type, weights, v)
        with autocast.off(device_type):
            return torch.ops.ccgpu.aggregate(weights, v, backend)

    _LIBRARY.impl("affinity", affinity, f"Autocast{device_type.upper()}")
    _LIBRARY.impl("aggregate", aggregate, f"Autocast{device_type.upper()}")


for _device_type in autocast.DEVICES:
    _autocast(_device_type)


# vmap -----------------------------------------------------------------------------------------------------------------


torch.library.register_vmap(AFFINITY, vmap_rule(torch.ops.ccgpu.affinity, 2), lib=_LIBRARY)
torch.library.register_vmap(AGGREGATE, vmap_rule(torch.ops.ccgpu.aggregate, 2), lib=_LIBRARY)
torch.library.register_vmap(TRANSPOSED, vmap_rule(torch.ops.ccgpu.aggregate_transposed, 2), lib=_LIBRARY)


# FLOPs ----------------------------------------------------------------------------------------------------------------


def _flops(first: torch.Size, second: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Return the FLOPs of all lines' products, two a multiply-add: 2 (S_1 + S_2 + ...) for a position and channel.

    The second argument of each op, k, v or x, has the channels.
    """
    return 2 * prod(second) * sum(second[2:])


flop_counts.register(
    [torch.ops.ccgpu.affinity, torch.ops.ccgpu.aggregate, torch.ops.ccgpu.aggregate_transposed], _flops
)


# Decompositions -------------------------------------------------------------------------------------------------------


def _affinity_decomposition(q: Tensor, k: Tensor, backend: str | None = None) -> Tensor:
    return formula.affinity(q, k)


def _aggregate_decomposition(weights: Tensor, v: Tensor, backend: str | None = None) -> Tensor:
    return formula.aggregate(weights, v)


decomposition.register(torch.ops.ccgpu.affinity.default, _affinity_decomposition, _affinity_fake)
decomposition.register(torch.ops.ccgpu.aggregate.default, _aggregate_decomposition, _aggregate_fake)
