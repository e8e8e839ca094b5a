"""What `ccgpu.affinity` and `ccgpu.aggregate` accept, and the messages for everything else.

The messages have the form of `checks`: *function: argument must be X, got Y; do Z.*
"""

from __future__ import annotations

from torch import Tensor

from ccgpu.autocast import computed_dtype
from ccgpu.checks import (
    check_axes,
    check_device,
    check_dtype,
    check_key_shape,
    check_tensor,
    shape_of,
    untraced,
)
from ccgpu.layouts import energy_dtype, positions


@untraced
def check_affinity(q: Tensor, k: Tensor, function: str = "affinity") -> None:
    """Raise TypeError or ValueError unless q and k are maps (B, D, *S) of one shape, dtype and device."""
    _check_map("q", q, function, "D")
    check_tensor("k", k, function)
    check_key_shape(k, q, function)
    check_dtype("k", k, q, function)
    check_device("k", k, "q", q, function)


@untraced
def check_aggregate(weights: Tensor, v: Tensor, function: str = "aggregate") -> None:
    """Raise TypeError or ValueError unless v is a map (B, C, *S) and weights (B, K, *S) fit it."""
    check_tensor("weights", weights, function)
    _check_map("v", v, function, "C")
    sizes = v.shape[2:]
    wanted = (v.shape[0], positions(sizes), *sizes)
    if weights.shape != wanted:
        raise ValueError(
            f"{function}: weights must be {wanted} for v {shape_of(v)}, one channel for each criss-cross position, "
            f"got {shape_of(weights)}; take them from ccgpu.affinity, whose order they have"
        )
    dtype = computed_dtype(v)
    if computed_dtype(weights) not in (dtype, energy_dtype(dtype)):
        choice = f"{dtype}" if dtype == energy_dtype(dtype) else f"{dtype} or {energy_dtype(dtype)}"
        raise TypeError(
            f"{function}: weights must be {choice} for v {v.dtype}, got {weights.dtype}; convert one of them"
        )
    check_device("weights", weights, "v", v, function)


def _check_map(name: str, x: Tensor, function: str, channels: str) -> None:
    """Raise TypeError or ValueError unless x is a map (B, channels, *S) with a channel and a position."""
    check_tensor(name, x, function)
    check_axes(name, x, function, channels)
    if 0 in x.shape[1:]:
        raise ValueError(
            f"{function}: {name} must have at least one channel and a map of at least one position, got {shape_of(x)}; "
            "only the batch may be empty"
        )
