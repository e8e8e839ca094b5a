"""Who takes part: every backend of ours that can run, and the peers."""

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


class Candidate(NamedTuple):
    """An implementation, made ready by `make`, which may take as long as a compiler does."""

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


def ours(device: torch.device) -> list[Candidate]:
    """Return the backends for tensors on the device, each module once; the slow definition is left out."""
    modules = {b.name: b.module for b in BACKENDS if b.automatic}
    seen: list[object] = []
    result = []
    for status in ccgpu.backends(device):
        if status.name not in modules or (status.available and modules[status.name] in seen):
            continue
        # A backend for the other kind of device is none that could have run here.
        if status.name == "cpu" if device.type != "cpu" else not status.available:
            continue
        seen.append(modules[status.name])
        why_not = None if status.available else status.reason
        result.append(Candidate(f"{OURS} {status.name}", partial(_backend, status.name), why_not=why_not))
    return result


def _backend(name: str) -> Function:
    return partial(ccgpu.cca, backend=name)


def others(case: Case, device: torch.device) -> list[Candidate]:
    """Return the peers. Those that flatten the map take it channels-last, which they need not copy."""
    last = ("channels_last",)
    two = None if len(case.sizes) > 1 else "written for two and three axes"
    on_cpu = device.type == "cpu"
    same_width = "on a CPU torch's fused attention takes values as wide as the keys only"
    narrow = same_width if on_cpu and case.query != case.channels else None
    result = [
        Candidate(EAGER_EINSUM, lambda: peers.einsum, why_not=two),
        Candidate(
            f"{EAGER_EINSUM}, compiled",
            lambda: torch.compile(peers.einsum, fullgraph=True, dynamic=False),
            compiled=True,
            why_not=two,
        ),
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


def candidates(case: Case, device: torch.device) -> list[Candidate]:
    """Return everything that can be measured on a case, ours first."""
    return ours(device) + others(case, device)
