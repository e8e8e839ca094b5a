"""What `ccgpu.cca` accepts, the messages for everything else, and the checks that the two stages share with it.

Every message has the form *function: argument must be X, got Y; do Z.* The checks look at shapes, dtypes and devices
only, so torch.compile traces them away, and they take a microsecond or two.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor

from ccgpu.autocast import computed_dtype
from ccgpu.kernels.array_checks import type_name
from ccgpu.layouts import NAMES

P = ParamSpec("P")


def untraced(check: Callable[P, None]) -> Callable[P, None]:
    """Return a check that torch.jit.trace does not see: it warns of each size that is compared."""

    @functools.wraps(check)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        if not torch.jit.is_tracing():
            return check(*args, **kwargs)
        state = torch._C._get_tracing_state()
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
        try:
            return check(*args, **kwargs)
        finally:
            torch._C._set_tracing_state(state)  # type: ignore[attr-defined]

    return wrapper


def shape_of(x: Tensor) -> str:
    """Return x's shape as messages show it."""
    return str(tuple(x.shape))


def check_tensor(name: str, x: Tensor, function: str) -> None:
    """Raise TypeError unless x is a dense tensor of one of the four dtypes."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{function}: {name} must be a torch.Tensor, got {type_name(x)}; "
            "convert it with torch.as_tensor or torch.from_dlpack"
        )
    if x.dtype not in NAMES:
        raise TypeError(
            f"{function}: {name} must be float32, bfloat16, float16 or float64, got {x.dtype}; "
            f"convert it, for example {name}.float()"
        )
    if x.layout != torch.strided:
        raise TypeError(f"{function}: {name} must be a dense (strided) tensor, got {x.layout}; use {name}.to_dense()")


def check_axes(name: str, x: Tensor, function: str, channels: str) -> None:
    """Raise ValueError unless x has one to three spatial axes; `channels` is the letter of its channel axis."""
    if x.ndim not in (3, 4, 5):
        raise ValueError(
            f"{function}: {name} must be (B, {channels}, L), (B, {channels}, H, W) or (B, {channels}, T, H, W), "
            f"got {x.ndim} axes {shape_of(x)}; "
            "add or flatten axes so that one to three spatial axes follow batch and channels"
        )


def check_key_shape(k: Tensor, q: Tensor, function: str) -> None:
    """Raise ValueError unless k has q's shape."""
    if k.shape != q.shape:
        raise ValueError(
            f"{function}: k must have q's shape {shape_of(q)}, got {shape_of(k)}; "
            "queries and keys share channels and map size"
        )


def check_dtype(name: str, x: Tensor, q: Tensor, function: str) -> None:
    """Raise TypeError unless x and q are computed in one dtype."""
    if x.dtype != q.dtype and computed_dtype(x) != computed_dtype(q):
        raise TypeError(
            f"{function}: {name} must have q's dtype {q.dtype}, got {x.dtype}; convert one of them, or run under "
            "torch.autocast"
        )


def check_device(name: str, x: Tensor, other_name: str, other: Tensor, function: str) -> None:
    """Raise ValueError unless x and the other tensor are on one device."""
    if x.device != other.device:
        raise ValueError(
            f"{function}: {name} must be on {other_name}'s device {other.device}, got {x.device}; "
            f"move it with {name}.to({other_name}.device)"
        )


@untraced
def check_inputs(q: Tensor, k: Tensor, v: Tensor, function: str = "cca") -> None:
    """Raise TypeError or ValueError unless q, k (B, D, *S) and v (B, C, *S) agree."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, function)
    check_axes("q", q, function, "D")
    check_key_shape(k, q, function)
    if v.ndim != q.ndim or v.shape[0] != q.shape[0] or v.shape[2:] != q.shape[2:]:
        wanted = ", ".join(str(n) for n in (q.shape[0], "C", *q.shape[2:]))
        # Without their batch axis q (D, H, W) and v (C, H, W) differ in front alone.
        unbatched = q.ndim == v.ndim < 5 and v.shape[1:] == q.shape[1:]
        raise ValueError(
            f"{function}: v must have q's batch and map size ({wanted}), got {shape_of(v)}; "
            + ("if one image lacks its batch axis, pass q[None], k[None] and v[None]; " if unbatched else "")
            + "only the channels C are free"
        )
    if q.shape[1] == 0 or v.shape[1] == 0:
        raise ValueError(
            f"{function}: q, k and v must have at least one channel, got {shape_of(q)} and {shape_of(v)}; "
            "check the number of output channels of the projections"
        )
    for name, x in (("k", k), ("v", v)):
        check_dtype(name, x, q, function)
        check_device(name, x, "q", q, function)
    if q.ndim == 3 and q.shape == v.shape and not torch.compiler.is_compiling():
        _warn_of_missing_batch(q)


def _warn_of_missing_batch(q: Tensor) -> None:
    """Warn if q, k and v of one shape (B, D, L) are likely an image's (D, H, W) without its batch axis.

    That is so where D is no number of channels that networks have, a multiple of 8, or equals L, as height and width of
    a square map do. Small sizes are taken for what they are said to be.
    """
    channels, length = q.shape[1:]
    if min(channels, length) > 8 and (channels == length or channels % 8):
        warnings.warn(
            "cca: q, k and v of three axes are (B, D, L), lines of L positions; if they are one image's (D, H, W), add "
            "the batch axis: q[None], k[None] and v[None].",
            stacklevel=6,  # the caller of cca
        )
