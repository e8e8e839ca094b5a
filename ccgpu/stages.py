"""The two stages of criss-cross attention as public operations: `affinity` (energies) and `aggregate` (sums)."""

from __future__ import annotations

import functools
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ccgpu import arrays, formula
from ccgpu.autocast import lowered_maps, lowered_weights
from ccgpu.dispatch import check_name
from ccgpu.stage_checks import check_affinity, check_aggregate
from ccgpu.stage_ops import run_affinity, run_aggregate  # registers torch.ops.ccgpu.affinity and its kin
from ccgpu.transforms import by_formula, replaced


@overload
def affinity(q: Tensor, k: Tensor, *, backend: str | None = ...) -> Tensor: ...
@overload
def affinity(q: Any, k: Any, *, backend: str | None = ...) -> Any: ...
def affinity(q: Any, k: Any, *, backend: str | None = None) -> Any:
    """Return the energies of each position with the positions in its own row and column (and line in time).

    The first stage of `ccgpu.cca`: for every position u and the j-th position i_j(u) of its criss-cross,

        energies[b, j, u] = q_u . k_{i_j(u)}

    j runs axis by axis, the first axis (T or H) first, on each from 0 to its end; u itself is counted on the last axis
    (W) only. So in 2D, where u = (y, x), the channels 0 to H - 2 are (0, x), ..., (y - 1, x), (y + 1, x), ...,
    (H - 1, x), and the channels H - 1 to H + W - 2 are (y, 0), ..., (y, W - 1), u itself being channel H - 1 + x.

    Args:
        q: queries (B, D, *S) with S = (L,), (H, W) or (T, H, W); B may be 0, the sizes 1; any strides. channels_last is
            the fastest layout. For scaled energies, scale q before.
        k: keys, of q's shape, dtype (float32, bfloat16, float16 or float64) and device.
        backend: the name of a backend (see `ccgpu.backends()`), which runs or raises; None takes the environment
            variable CCGPU_BACKEND, or else the first backend that can run.

    Returns:
        energies (B, K, *S), K = sum(S) - len(S) + 1 (H + W - 1 in 2D), float32 (float64 for float64 inputs), always in
        channels-last memory: the K energies of a position are contiguous.

    Raises:
        TypeError: an input is no array, has an integer or complex dtype, or the dtypes or kinds of arrays differ.
        ValueError: rank, shapes, devices or the backend's name are wrong.
        RuntimeError: the backend asked for cannot run the call.

    Differentiable in q and k, to any order, on the same backend. Saved for backward: q and k. Deterministic. Works
    under autocast (q and k take its dtype, float64 stays), torch.func.vmap, torch.compile(fullgraph=True),
    torch.export and torch.onnx.export. Arrays of other libraries are accepted and returned as in `ccgpu.cca`.

    `aggregate(affinity(scale * q, k).softmax(1), v)` is `cca(q, k, v, scale=scale)`, which needs no memory for the
    energies; the stages are for looking at the energies and for replacing the softmax.

    Source: Huang et al., CCNet: Criss-Cross Attention for Semantic Segmentation, section 3.2, equation 1.

    Examples:
        >>> import torch, ccgpu
        >>> k = torch.arange(6.0).view(1, 1, 2, 3)  # [[0, 1, 2], [3, 4, 5]]
        >>> energies = ccgpu.affinity(torch.ones(1, 1, 2, 3), k)
        >>> energies.shape
        torch.Size([1, 4, 2, 3])
        >>> energies[0, :, 0, 1]  # of (0, 1) with (1, 1) below it and its row (0, 0), (0, 1), (0, 2)
        tensor([4., 0., 1., 2.])
        >>> type(ccgpu.affinity(k.numpy(), k.numpy()))
        <class 'numpy.ndarray'>
    """
    if not (isinstance(q, Tensor) and isinstance(k, Tensor)):
        if has_torch_function((q, k)):  # a proxy of torch.fx.symbolic_trace
            return handle_torch_function(cast("Any", affinity), (q, k), q, k, backend=backend)
        kind = arrays.kind_of("affinity", q=q, k=k)
        if kind is not None:
            operation = functools.partial(_affinity, backend=backend, of_arrays=True)
            return arrays.call("affinity", kind, operation, q=q, k=k)
    return _affinity(q, k, backend)


@overload
def aggregate(weights: Tensor, v: Tensor, *, backend: str | None = ...) -> Tensor: ...
@overload
def aggregate(weights: Any, v: Any, *, backend: str | None = ...) -> Any: ...
def aggregate(weights: Any, v: Any, *, backend: str | None = None) -> Any:
    """Sum the values in each position's own row and column (and line in time), weighted.

    The second stage of `ccgpu.cca`: for every position u, over the positions i_j(u) of its criss-cross in the order of
    `affinity`,

        out_u = sum_j weights[b, j, u] v_{i_j(u)}

    The weights are any numbers; they need not sum to one.

    Args:
        weights: (B, K, *S), K = sum(S) - len(S) + 1, in v's dtype or in its energy dtype (float32; float64 for float64
            values); any strides, channels-last memory is the fastest.
        v: values (B, C, *S) with S = (L,), (H, W) or (T, H, W), float32, bfloat16, float16 or float64; any strides.
        backend: as in `affinity`.

    Returns:
        out (B, C, *S) in v's dtype and memory format.

    Raises:
        TypeError: an input is no array, has an integer or complex dtype, or dtypes or kinds of arrays do not fit.
        ValueError: rank, shapes, devices or the backend's name are wrong.
        RuntimeError: the backend asked for cannot run the call.

    Differentiable in weights and v, to any order, on the same backend. Saved for backward: weights and v.
    Deterministic. Works under autocast (v takes its dtype and so do the weights, but float32 weights and float64 stay),
    torch.func.vmap, torch.compile(fullgraph=True) and torch.export. A NaN or infinity in v reaches the positions that
    attend to it, and no others. Arrays of other libraries are accepted and returned as in `ccgpu.cca`.

    Source: Huang et al., CCNet: Criss-Cross Attention for Semantic Segmentation, section 3.2, equation 2.

    Examples:
        >>> import torch, ccgpu
        >>> q, k, v = torch.randn(3, 1, 8, 5, 6).unbind()
        >>> weights = ccgpu.affinity(q, k).softmax(1)
        >>> torch.allclose(ccgpu.aggregate(weights, v), ccgpu.cca(q, k, v), atol=1e-5)
        True
    """
    if not (isinstance(weights, Tensor) and isinstance(v, Tensor)):
        if has_torch_function((weights, v)):
            return handle_torch_function(cast("Any", aggregate), (weights, v), weights, v, backend=backend)
        kind = arrays.kind_of("aggregate", weights=weights, v=v)
        if kind is not None:
            operation = functools.partial(_aggregate, backend=backend, of_arrays=True)
            return arrays.call("aggregate", kind, operation, wide="weights", weights=weights, v=v)
    return _aggregate(weights, v, backend)


def _affinity(q: Tensor, k: Tensor, backend: str | None, of_arrays: bool = False) -> Tensor:
    """Return what `affinity` returns, for tensors; `of_arrays` as in `ops._attend`."""
    check_affinity(q, k)
    check_name(backend, "affinity")
    if of_arrays and not torch.compiler.is_compiling():
        return run_affinity(q, k, backend)
    if replaced(q, k):
        return by_formula(formula.affinity, lowered_maps, q, k)
    return torch.ops.ccgpu.affinity(q, k, backend)


def _aggregate(weights: Tensor, v: Tensor, backend: str | None, of_arrays: bool = False) -> Tensor:
    """Return what `aggregate` returns, for tensors; `of_arrays` as in `ops._attend`."""
    check_aggregate(weights, v)
    check_name(backend, "aggregate")
    if of_arrays and not torch.compiler.is_compiling():
        return run_aggregate(weights, v, backend)
    if replaced(weights, v):
        return by_formula(formula.aggregate, lowered_weights, weights, v)
    return torch.ops.ccgpu.aggregate(weights, v, backend)
