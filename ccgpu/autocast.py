"""torch.autocast in the ops: which dtype it gives their inputs, and how to compute without it.

Maps take autocast's dtype, as in torch's matrix products; float64 stays float64.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ccgpu.layouts import energy_dtype

DEVICES = ("cpu", "cuda")


def is_on(device_type: str) -> bool:
    """Return whether autocast is enabled for a kind of device."""
    return device_type in DEVICES and torch.is_autocast_enabled(device_type)


def off(device_type: str) -> AbstractContextManager[object]:
    """Return a context without autocast; it costs nothing where autocast is off already."""
    return torch.autocast(device_type, enabled=False) if is_on(device_type) else nullcontext()


def computed_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that an op computes x in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if x.dtype != torch.float64 and is_on(kind) else x.dtype


def lowered(device_type: str, x: Tensor) -> Tensor:
    """Return x in autocast's dtype; float64 stays float64."""
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device_type))


def lowered_maps(device_type: str, *maps: Tensor) -> list[Tensor]:
    """Return maps in autocast's dtype."""
    return [lowered(device_type, x) for x in maps]


def lowered_weights(device_type: str, weights: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights and values in autocast's dtype; weights in the dtype of v's energies keep it."""
    weights = weights if weights.dtype == energy_dtype(v.dtype) else lowered(device_type, weights)
    return weights, lowered(device_type, v)
