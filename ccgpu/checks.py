"""What `ccgpu.cca` accepts, and the messages for everything else.

Every message has the form *function: argument must be X, got Y; do Z.* The checks look at shapes, dtypes and devices
only, so they are traced away by torch.compile and cost a microsecond or two.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
AUTOCAST_DEVICES = ("cpu", "cuda")


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def _computed_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that the op will see: autocast's where it is on, which leaves float64 alone."""
    kind = x.device.type
    if x.dtype != torch.float64 and kind in AUTOCAST_DEVICES and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def check_inputs(q: Tensor, k: Tensor, v: Tensor, function: str = "cca") -> None:
    """Raise TypeError or ValueError unless q, k (B, D, *S) and v (B, C, *S) agree."""
    for name, x in (("q", q), ("k", k), ("v", v)):
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
            raise TypeError(
                f"{function}: {name} must be a dense (strided) tensor, got {x.layout}; use {name}.to_dense()"
            )
    if q.ndim not in (3, 4, 5):
        raise ValueError(
            f"{function}: q must be (B, D, L), (B, D, H, W) or (B, D, T, H, W), got {q.ndim} axes {_shape(q)}; "
            "add or flatten axes so that one to three spatial axes follow batch and channels"
        )
    if k.shape != q.shape:
        raise ValueError(
            f"{function}: k must have q's shape {_shape(q)}, got {_shape(k)}; "
            "queries and keys share channels and map size"
        )
    if v.ndim != q.ndim or v.shape[0] != q.shape[0] or v.shape[2:] != q.shape[2:]:
        wanted = ", ".join(str(n) for n in (q.shape[0], "C", *q.shape[2:]))
        raise ValueError(
            f"{function}: v must have q's batch and map size ({wanted}), got {_shape(v)}; only the channels C are free"
        )
    if q.shape[1] == 0 or v.shape[1] == 0:
        raise ValueError(
            f"{function}: q, k and v must have at least one channel, got {_shape(q)} and {_shape(v)}; "
            "check the number of output channels of the projections"
        )
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype and _computed_dtype(x) != _computed_dtype(q):
            raise TypeError(
                f"{function}: {name} must have q's dtype {q.dtype}, got {x.dtype}; convert one of them, or run under "
                "torch.autocast"
            )
        if x.device != q.device:
            raise ValueError(
                f"{function}: {name} must be on q's device {q.device}, got {x.device}; move it with {name}.to(q.device)"
            )


def check_scale(scale: float, function: str = "cca") -> float:
    """Return scale as a float; raise TypeError or ValueError unless it is a finite number."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(
            f"{function}: scale must be a number, got {type(scale).__name__}; pass a float, "
            "or multiply q by the tensor before the call"
        )
    if not -math.inf < scale < math.inf:  # torch.compile knows no isfinite of a number it traces
        raise ValueError(f"{function}: scale must be finite, got {scale}; the paper uses 1.0")
    return float(scale)
