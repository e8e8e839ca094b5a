"""Criss-cross attention of maps larger than one device: `ccgpu.distributed.cca`, on shards of a process group.

A criss-cross is a union of lines. Those that lie within a shard are computed where they are; the lines along the
sharded axis are exchanged, computed whole, and exchanged back. Each part is softmax attention over its own lines with a
log-sum-exp, and the parts merge into the whole by these, as lines merge into a criss-cross on one device:

    lse = log sum_p exp lse_p,    out = sum_p exp(lse_p - lse) out_p

The position itself is on all of its lines, and counts 1 / A on each of A lines (`Bridge`), so it counts once in all and
nothing is subtracted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor

import ccgpu.ops
from ccgpu import autocast
from ccgpu.bridges.call import Bridge
from ccgpu.checks import check_inputs
from ccgpu.dispatch import check_name, choose, names
from ccgpu.kernels.array_checks import check_scale
from ccgpu.layouts import NAMES, energy_dtype
from ccgpu.shards import Choice, Fact, Group, Lines, agree, check_group, exchange_device, exchangeable
from ccgpu.transforms import within_export, without_rule

_NAME = "distributed.cca"


@overload
def cca(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group = ...,
    dim: int = ...,
    scale: float = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def cca(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group = ...,
    dim: int = ...,
    scale: float = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def cca(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group = None,
    dim: int = -2,
    scale: float = 1.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attend as `ccgpu.cca` does, on maps of which every rank of a process group holds a shard along one axis.

    The shards, one after another by rank, are the map; the results are the shards of `ccgpu.cca` of the map, to
    rounding. Every rank of the group must call it, and if one of them runs backward, all must.

    Args:
        q: this rank's shard of the queries (B, D, *S) with S = (L,), (H, W) or (T, H, W); any strides. The size of axis
            `dim` may differ from rank to rank and be 0, all else is equal.
        k: its shard of the keys, of q's shape.
        v: its shard of the values (B, C, *S). All three share one dtype (float32, bfloat16, float16 or float64) and one
            device.
        group: a `torch.distributed` process group whose backend exchanges tensors of the device (NCCL for CUDA, gloo
            for CPUs); None is the default group of all processes.
        dim: the sharded axis: -2 shards rows (H), -1 columns (W) or the positions of lines, -3 the frames of clips (T).
        scale: finite factor of the energies.
        return_lse: return lse too.
        backend: as in `ccgpu.cca`; `reference` computes no parts of a criss-cross.

    Returns:
        out, this rank's shard (B, C, *S), in v's dtype and memory format; with return_lse also lse (B, *S), float32
        (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument is wrong, or the ranks' arguments do not fit one another. On all ranks.
        RuntimeError: the backend asked for cannot run the call, or no group has been joined. Also if another rank's
            call is wrong, or if it has ended or does not answer within the group's timeout
            (`init_process_group(timeout=...)`).

    Both results are differentiable in q, k and v, once: second derivatives raise RuntimeError. Works under autocast and
    within `torch.utils.checkpoint`; not under torch.func's transforms, in forward mode or in `ccgpu.decomposed`;
    torch.compile leaves it out of its graphs. Deterministic. A rank saves its shards of q, k, v, out and lse for
    backward, and nothing of the lines that it computes for others, which are exchanged again.

    The B times other positions lines along the sharded axis are divided evenly among the ranks. So lines alone, S =
    (L,), are divided by images: one line is computed on one rank.

    On P ranks, a map of n positions costs each of them n / P (1 - 1 / P) times as many numbers as here, sent and
    received: forward q, k, v, out and lse, 2 D + 2 C + 1, backward q, k, v, dout, the gradients, lse and delta, 4 D + 3
    C + 2; lse and delta in 32 bits (64 for float64). Beside these a call gathers 24 integers from every rank.

    Examples:
        >>> import torch, torch.distributed as dist, ccgpu
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun does it otherwise
        >>> q, k, v = torch.randn(3, 1, 8, 5, 6).unbind()
        >>> torch.equal(ccgpu.distributed.cca(q, k, v), ccgpu.cca(q, k, v))  # one rank holds the whole map
        True
        >>> dist.destroy_process_group()
    """
    check_group(_NAME, group)
    if dist.get_world_size(group) == 1:
        check_inputs(q, k, v, _NAME)
        _axis(q, dim)
        return ccgpu.ops.cca(q, k, v, scale=scale, return_lse=return_lse, backend=backend)
    problem: Exception | None = None
    facts: dict[str, Fact] = dict.fromkeys(_FACTS, 0)
    own, device = 0, exchange_device(group)
    try:
        q, k, v, facts, own, bridge = _checked(q, k, v, dim, scale, backend)
        device = q.device
    except (TypeError, ValueError, RuntimeError) as error:
        problem = error
    extents = agree(_NAME, facts, own, group, device, problem)
    axis = _axis(q, dim)
    local = sum(size != 1 for a, size in enumerate(q.shape[2:]) if a != axis)
    lines = Lines(_NAME, axis, q.shape, extents, group)
    needs = (q.requires_grad, k.requires_grad, v.requires_grad)
    part = _Parts(bridge, float(scale), axis, local, int(lines.length != 1 or not local), lines, needs)
    with autocast.off(q.device.type):  # the maps have its dtype by now
        out, lse = _Attention.apply(q, k, v, part)
    return (out, lse) if return_lse else out


_FACTS = (
    *("the number of axes", "dim", "B", "D", "C", "the first local size", "the second local size"),
    *("dtype", "scale", "backend", "requires_grad of q", "requires_grad of k", "requires_grad of v"),
)


def _axis(q: Tensor, dim: int) -> int:
    """Return the number of the spatial axis that `dim` names.

    Raises:
        TypeError: dim is no int.
        ValueError: dim is no spatial axis.
    """
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"{_NAME}: dim must be an int, got {type(dim).__name__}; pass -2 for maps sharded by rows")
    axis = dim if dim >= 0 else dim + q.ndim
    if not 2 <= axis < q.ndim:
        raise ValueError(
            f"{_NAME}: dim must be a spatial axis of q {tuple(q.shape)}, {2 - q.ndim} to -1 or 2 to {q.ndim - 1}, got "
            f"{dim}; batch and channels are not sharded"
        )
    return axis - 2


def _checked(
    q: Tensor, k: Tensor, v: Tensor, dim: int, scale: float, backend: str | None
) -> tuple[Tensor, Tensor, Tensor, dict[str, Fact], int, Bridge]:
    """Return the maps in the dtype that they are computed in, the facts that all ranks share, the shard's size, bridge.

    Raises:
        TypeError, ValueError, RuntimeError: as `cca` does.
    """
    check_inputs(q, k, v, _NAME)
    if not all(exchangeable(x) for x in (q, k, v)):
        raise ValueError(
            f"{_NAME}: q, k and v must be dense tensors on a CPU or CUDA device, got {q.layout} on {q.device}; ranks "
            "exchange their values"
        )
    scale = check_scale(scale, _NAME)
    check_name(backend, _NAME)
    axis = _axis(q, dim)
    if torch._C._are_functorch_transforms_active() or without_rule(q, k, v):
        raise RuntimeError(
            f"{_NAME}: derivatives must be taken by backward or torch.autograd.grad, got a transform of torch.func or "
            "forward mode; these run on one rank at a time"
        )
    if within_export():
        raise RuntimeError(
            f"{_NAME}: maps must be whole where standard operators are wanted, got shards in ccgpu.decomposed() or an "
            "export to ONNX; export the module with group=None"
        )
    if autocast.is_on(q.device.type):
        q, k, v = autocast.lowered_maps(q.device.type, q, k, v)
    bridge = choose(q, backend, v, _NAME, whole=False).module
    others = [size for a, size in enumerate(q.shape[2:]) if a != axis] + [1, 1]
    needs = [int(torch.is_grad_enabled() and x.requires_grad) for x in (q, k, v)]
    available = [None, *names()]
    values: list[Fact] = [q.ndim, axis - q.ndim + 2, q.shape[0], q.shape[1], v.shape[1], *others[:2]]
    values += [Choice(q.dtype, list(NAMES)), float(scale), Choice(backend, available)]
    values += [Choice(bool(need), (False, True)) for need in needs]
    return q, k, v, dict(zip(_FACTS, values, strict=True)), q.shape[2 + axis], bridge


class _Parts(NamedTuple):
    """A call on this rank: its part along the local axes, and its part along the sharded axis."""

    bridge: Bridge
    scale: float
    axis: int
    local: int  # lines through a position within a shard, those of more positions than one
    sharded: int  # 1: and one along the sharded axis; 0: that has a single position, which is on the others too
    lines: Lines
    needs: tuple[bool, bool, bool]  # whether q, k and v get gradients, equal on all ranks

    @property
    def crossing(self) -> int:
        """The number of lines through a position."""
        return self.local + self.sharded

    def fold(self, x: Tensor) -> Tensor:
        """Return a shard (B, channels, *S) with the sharded axis in the batch, without local axes of size 1."""
        x = x.movedim(2 + self.axis, 1)
        sizes = [size for size in x.shape[3:] if size != 1]
        return x.reshape(x.shape[0] * x.shape[1], x.shape[2], *sizes)

    def unfold(self, x: Tensor, like: Tensor) -> Tensor:
        """Return a folded map with `like`'s axes and its own channels."""
        others = [size for a, size in enumerate(like.shape[2:]) if a != self.axis]
        x = x.reshape(like.shape[0], like.shape[2 + self.axis], x.shape[1], *others)
        return x.movedim(1, 2 + self.axis)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's shards of out and lse."""
        parts = []
        if self.sharded:
            out, lse = _on_lines(self, *(self.lines.gather(x) for x in (q, k, v)))
            parts.append((self.lines.scatter(out), self.lines.scatter(lse.unsqueeze(1))))
        if self.local:
            query, key, value = (self.fold(x) for x in (q, k, v))
            out, lse = self.bridge.forward(query, key, value, self.scale, self.crossing)
            parts.append((self.unfold(out, q), self.unfold(lse.unsqueeze(1), q)))
        return _merged(parts, v)

    def backward(self, dout: Tensor, dlse: Tensor, saved: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the gradients of this rank's shards of q, k and v; None for those that need none."""
        q, k, v, out, lse = saved
        totals = [torch.empty_like(x) if need else None for x, need in zip((q, k, v), self.needs, strict=True)]
        if self.sharded:
            delta = (dout.to(lse.dtype) * out).sum(1, keepdim=True).sub_(dlse.unsqueeze(1))
            numbers = self.lines.gather(torch.cat((lse.unsqueeze(1), delta), 1))
            gradients = _gradients_on_lines(self, numbers, *(self.lines.gather(x) for x in (dout, q, k, v)))
            for total, gradient in zip(totals, gradients, strict=True):
                if total is not None:
                    total.copy_(self.lines.scatter(gradient))
        if self.local:
            dout, q, k, v, out = (self.fold(x) for x in (dout, q, k, v, out))
            lse, dlse = (self.fold(x.unsqueeze(1)).squeeze(1) for x in (lse, dlse))
            gradients = self.bridge.backward(dout, q, k, v, out, lse, dlse, self.scale, self.crossing)
            for total, gradient in zip(totals, gradients, strict=True):
                if total is not None:
                    own = self.unfold(gradient, total)
                    total.add_(own) if self.sharded else total.copy_(own)
        return totals


def _on_lines(parts: _Parts, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return out and lse of whole lines (lines, channels, length)."""
    if q.shape[0] == 0 or q.shape[2] == 0:
        return torch.empty_like(v), q.new_empty((q.shape[0], q.shape[2]), dtype=energy_dtype(q.dtype))
    return parts.bridge.forward(q, k, v, parts.scale, parts.crossing)


def _gradients_on_lines(
    parts: _Parts, numbers: Tensor, dout: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv of whole lines; numbers (lines, 2, length) are lse and delta of all their criss-crosses."""
    if q.shape[0] == 0 or q.shape[2] == 0:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    lse, delta = numbers.unbind(1)
    # Backward uses out for delta alone, which is dout . out - dlse: where out is 0, -dlse is all of it.
    nothing = v.new_zeros(()).expand_as(v)
    return parts.bridge.backward(dout, q, k, v, nothing, lse, -delta, parts.scale, parts.crossing)


def _merged(parts: list[tuple[Tensor, Tensor]], v: Tensor) -> tuple[Tensor, Tensor]:
    """Return out, like v, and lse (B, *S) of attention from its parts (B, C, *S) and (B, 1, *S) over other positions.

    A part without any weight, whose lse is -inf, has no out: it does not count.
    """
    if len(parts) == 1:
        return torch.empty_like(v).copy_(parts[0][0]), parts[0][1].squeeze(1).contiguous()
    lses = torch.stack([lse for _, lse in parts])
    row_max = lses.amax(0).clamp_(min=torch.finfo(lses.dtype).min)
    shares = (lses - row_max).exp_()
    row_sum = shares.sum(0)
    out = torch.empty_like(v)
    total: Tensor | None = None
    for (part, lse), share in zip(parts, shares / row_sum, strict=True):
        own = torch.where(lse == -torch.inf, share, share * part)
        total = own if total is None else total.add_(own)
    assert total is not None
    return out.copy_(total), (row_max + row_sum.log()).squeeze(1).contiguous()


class _Attention(torch.autograd.Function):
    """The derivative of `cca`, whose exchanges are those of forward, transposed."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, parts: _Parts) -> tuple[Tensor, Tensor]:
        out, lse = parts.forward(q, k, v)
        ctx.parts = parts
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad(), autocast.off(dout.device.type):
            gradients = ctx.parts.backward(dout, dlse, ctx.saved_tensors)
        if torch.is_grad_enabled():  # create_graph=True: a second derivative must not miss what the exchanges hide
            sources = (dout, dlse, *ctx.saved_tensors[:3])
            gradients = [None if x is None else _FirstDerivative.apply(x, *sources) for x in gradients]
        return (*gradients, None)


class _FirstDerivative(torch.autograd.Function):
    """A gradient that depends on the sources, as autograd knows then, and whose own derivative raises."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            f"{_NAME}: derivatives must be first ones, got a second one; take it of ccgpu.cca, on one device"
        )
