"""FLOPs of the ops, for torch.utils.flop_counter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula


def register(ops: Sequence[Any], formula: Callable[..., int]) -> None:
    """Let torch's counters count ops of torch.ops, also the counters that are open now.

    The ops are registered at the first call of the library, and an open counter has copied the formulas before it.

    Args:
        ops: such as `torch.ops.ccgpu.cca_forward`.
        formula: function of the op's arguments, shapes in the place of tensors, that returns the FLOPs.
    """
    register_flop_formula(list(ops))(formula)
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, FlopCounterMode):
            counter.flop_registry.update({op: flop_registry[op] for op in ops})
