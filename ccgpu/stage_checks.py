"""What `ccgpu.affinity` and `ccgpu.aggregate` accept, and the messages for everything else.

The messages have the form of `checks`: *function: argument must be X, got Y; do Z.*
"""

from __future__ import annotations

import torch
from torch import Tensor

from ccgpu.checks import DTYPES, _computed_dtype, _shape
from ccgpu.torch_lines import energy_dtype
from ccgpu.torch_stages import positions


def check_affinity(q: Tensor, k: Tensor, function: str = "affinity") -> None:
    """Raise TypeError or ValueError unless q and k are (B, D, *S) alike."""
    _check_map("q", q, function, "D")
    _check_tensor("k", k, function)
    if k.shape != q.shape:
        raise ValueError(
            f"{function}: k must have q's shape {_shape(q)}, got {_shape(k)}; "
            "queries and keys share channels and map size"
        )
    if _computed_dtype(k) != _computed_dtype(q):
        raise TypeError(
            f"{function}: k must have q's dtype {q.dtype}, got {k.dtype}; convert one of them, or run under "
            "torch.autocast"
        )
    _check_device("k", k, "q", q, function)


def check_aggregate(weights: Tensor, v: Tensor, function: str = "aggregate") -> None:
    """Raise TypeError or ValueError unless v is (B, C, *S) and weights (B, K, *S)."""
    _check_tensor("weights", weights, function)
    _check_map("v", v, function, "C")
    sizes = v.shape[2:]
    wanted = (v.shape[0], positions(sizes), *sizes)
    if weights.shape != wanted:
        raise ValueError(
            f"{function}: weights must be {wanted} for v {_shape(v)}, one channel for each criss-cross position, "
            f"got {_shape(weights)}; take them from ccgpu.affinity, whose order they have"
        )
    dtype = _computed_dtype(v)
    if _computed_dtype(weights) not in (dtype, energy_dtype(dtype)):
        choice = f"{dtype}" if dtype == energy_dtype(dtype) else f"{dtype} or {energy_dtype(dtype)}"
        raise TypeError(
            f"{function}: weights must be {choice} for v {v.dtype}, got {weights.dtype}; convert one of them"
        )
    _check_device("weights", weights, "v", v, function)


def _check_tensor(name: str, x: Tensor, function: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{function}: {name} must be a torch.Tensor, got {type(x).__module__}.{type(x).__qualname__}; "
            "convert it with torch.as_tensor or torch.from_dlpack"
        )
    if x.dtype not in DTYPES:
        raise TypeError(
            f"{function}: {name} must be float32, bfloat16, float16 or float64, got {x.dtype}; "
            f"convert it, for example {name}.float()"
        )
    if x.layout != torch.strided:
        raise TypeError(f"{function}: {name} must be a dense (strided) tensor, got {x.layout}; use {name}.to_dense()")


def _check_map(name: str, x: Tensor, function: str, channels: str) -> None:
    """Check a tensor that is a map (B, channels, *S)."""
    _check_tensor(name, x, function)
    if x.ndim not in (3, 4, 5):
        raise ValueError(
            f"{function}: {name} must be (B, {channels}, L), (B, {channels}, H, W) or (B, {channels}, T, H, W), "
            f"got {x.ndim} axes {_shape(x)}; "
            "add or flatten axes so that one to three spatial axes follow batch and channels"
        )
    if 0 in x.shape[1:]:
        raise ValueError(
            f"{function}: {name} must have at least one channel and a map of at least one position, got {_shape(x)}; "
            "only the batch may be empty"
        )


def _check_device(name: str, x: Tensor, other_name: str, other: Tensor, function: str) -> None:
    if x.device != other.device:
        raise ValueError(
            f"{function}: {name} must be on {other_name}'s device {other.device}, got {x.device}; "
            f"move it with {name}.to({other_name}.device)"
        )
