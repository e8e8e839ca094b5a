"""The implementations that are compared: every backend of this library that can run, and the peers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import ccgpu
from benchmarks import flex, line_sdpa, peers
from benchmarks.cases import LAYOUTS, Case
from ccgpu.dispatch import BACKENDS

Function = Callable[[Tensor, Tensor, Tensor], Tensor]
OURS = "ccgpu"
EAGER_BMM, EAGER_EINSUM, DENSE = "authors' bmm", "mmcv's einsum", "dense SDPA (non-local)"
BATCHED = "batched products"


class Candidate(NamedTuple):
    """An implementation; `make` returns its function, and may compile it for minutes."""

    name: str
    make: Callable[[], Function]
    layouts: tuple[str, ...] = LAYOUTS
    same_function: bool = True
    compiled: bool = False
    why_not: str | None = None

    @property
    def is_ours(self) -> bool:
        """Tell whether it is one of this library's backends."""
        return self.name.split()[0] == OURS


def ours(case: Case, device: torch.device) -> list[Candidate]:
    """Return the backends made for this device or for any, each module once, without the slow reference.

    On a CPU, where the choice depends on the call, the first candidate is what `ccgpu.cca` chooses.
    """
    listed = ccgpu.backends(device, dtype=case.torch_dtype, depth=case.query, channels=case.channels, sizes=case.sizes)
    reasons = {status.name: None if status.available else status.reason for status in listed}
    seen: list[object] = []
    result = [Candidate(OURS, partial(_backend, None))] if device.type == "cpu" else []
    for backend in BACKENDS:
        if not backend.automatic or backend.made_for not in (None, device.type) or backend.module in seen:
            continue
        seen.append(backend.module)
        run = partial(_backend, backend.name)
        result.append(Candidate(f"{OURS} {backend.name}", run, why_not=reasons[backend.name]))
    return result


def _backend(name: str | None) -> Function:
    return partial(ccgpu.cca, backend=name)


def others(case: Case, device: torch.device) -> list[Candidate]:
    """Return the peers. Those that flatten the map only get channels-last memory, which they need not copy."""
    last = ("channels_last",)
    two = None if len(case.sizes) > 1 else "written for two and three axes"
    on_cpu = device.type == "cpu"
    same_width = "on a CPU torch's fused attention takes values as wide as the keys only"
    narrow = same_width if on_cpu and case.query != case.channels else None
    result = [
        Candidate(BATCHED, lambda: peers.batched_products),
        _compiled(BATCHED, peers.batched_products),
        Candidate(EAGER_EINSUM, lambda: peers.einsum, why_not=two),
        _compiled(EAGER_EINSUM, peers.einsum)._replace(why_not=two),
        Candidate(EAGER_BMM, lambda: peers.authors_bmm, why_not=two),
        Candidate("SDPA an axis, merged", lambda: line_sdpa.line_sdpa, layouts=last, why_not=narrow),
    ]
    for block in (16, 32, 128):
        result.append(
            Candidate(
                f"FlexAttention, blocks of {block}",
                partial(flex.flex, case.sizes, block, device),
                layouts=last,
                compiled=True,
                why_not="it has no backward on a CPU" if on_cpu else None,
            )
        )
    result.append(Candidate(DENSE, lambda: peers.dense_sdpa, layouts=last, same_function=False))
    return result


def _compiled(name: str, function: Function) -> Candidate:
    make = partial(torch.compile, function, fullgraph=True, dynamic=False)
    return Candidate(f"{name}, compiled", make, compiled=True)


def candidates(case: Case, device: torch.device) -> list[Candidate]:
    """Return everything that can be measured on a case, ours first."""
    return ours(case, device) + others(case, device)
