"""`decomposed`: the public functions compute in standard torch operators, for tracers and exporters.

torch's own tables of decompositions hold the ops too, so that `torch.onnx.export` finds them.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from typing_extensions import Self

_ACTIVE = contextvars.ContextVar("ccgpu.decomposed", default=False)
_TABLE: dict[torch._ops.OpOverload, Callable[..., Any]] = {}


class decomposed(contextlib.ContextDecorator):
    """Compute `ccgpu.cca`, `affinity` and `aggregate` in standard torch operators.

        with ccgpu.decomposed():
            program = torch.export.export(net, (images,))

    Outside, they are operators of this package, which the kernels compute and which a traced program cannot do without.
    Inside, they are matrix products, a softmax and a few more operators of torch, so whatever is traced there
    (torch.export, torch.jit.trace, make_fx, torch.compile) runs without this package. `torch.onnx.export` needs no
    `decomposed`: it decomposes by itself.

    Values, dtypes, gradients, autocast and errors are the same; results are contiguous in an order of axes of their
    own. All energies (B, *S, H + W) are in memory at once, and on a CPU a call takes longer than the kernels do.
    A `backend` is checked and not used. Arrays of other libraries are computed by the kernels as ever.

    `ccgpu.distributed.cca`, whose maps are shards, raises.

    The context manager is also a decorator. It may be nested, and holds for the current thread and asyncio task alone.
    Functions that torch.compile compiled outside are compiled again inside.

    Examples:
        >>> import torch, ccgpu
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> q, k, v = torch.randn(3, 1, 8, 5, 6).unbind()
        >>> with ccgpu.decomposed():
        ...     traced = make_fx(lambda *maps: ccgpu.cca(*maps))(q, k, v)
        >>> any("ccgpu" in str(node.target) for node in traced.graph.nodes)
        False
        >>> torch.allclose(traced(q, k, v), ccgpu.cca(q, k, v), atol=1e-5)
        True
    """

    def __init__(self) -> None:
        self._tokens: list[contextvars.Token[bool]] = []

    def _recreate_cm(self) -> Self:
        return type(self)()  # a decorated function may run in several threads at once

    def __enter__(self) -> None:
        self._tokens.append(_ACTIVE.set(True))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _ACTIVE.reset(self._tokens.pop())


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """Return the decompositions of the operators of `cca`, `affinity` and `aggregate`, a new table at each call.

    For programs that were exported with the operators in them:

        program.run_decompositions({**torch.export.default_decompositions(), **ccgpu.decompositions()})

    Examples:
        >>> import ccgpu
        >>> sorted(op.name() for op in ccgpu.decompositions())
        ['ccgpu::affinity', 'ccgpu::aggregate', 'ccgpu::cca_forward']
    """
    return {**_TABLE}


def register(op: torch._ops.OpOverload, decomposition: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Let exporters decompose an op.

    Args:
        op: such as `torch.ops.ccgpu.affinity.default`.
        decomposition: function of the op's arguments, in operators of torch.
        fake: the op's fake rule.
    """
    _TABLE[op] = decomposition
    torch._decomp.register_decomposition(op)(decomposition)
    # With dynamic sizes FakeTensor prefers a decomposition, whose strides are others, to the op's fake rule, unless
    # "meta" has the op.
    torch._decomp.register_decomposition(op, type="meta")(fake)


def as_tensor(number: float, device: torch.device) -> torch.Tensor:
    """Return a number as a float64 tensor (), in operators that exporters keep exact.

    `torch.onnx.export` rounds a fraction to float32, but neither a whole number nor a power of two.
    """
    mantissa, exponent = math.frexp(number)
    whole = torch.full((), int(mantissa * 2**53), dtype=torch.float64, device=device)
    return whole * 2.0 ** (exponent - 53)


def is_active() -> bool:
    """Return whether the current context is in `decomposed`; compiled code reads `active`."""
    return _ACTIVE.get()


def __getattr__(name: str) -> bool:
    """Return `active`: the same for code that torch.compile traces.

    It guards an attribute that a module computes: at each call it compares the value with that at compilation. A
    ContextVar it can neither read nor guard.
    """
    if name == "active":
        return is_active()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
