"""The public operation `ccgpu.cca`: its contract, its defaults, and the way of a call from arguments to results."""

from __future__ import annotations

import functools
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ccgpu import arrays, formula
from ccgpu.autocast import lowered_maps
from ccgpu.autograd import run_forward  # registers torch.ops.ccgpu.cca_forward
from ccgpu.checks import check_inputs
from ccgpu.dispatch import check_name
from ccgpu.kernels.array_checks import check_scale
from ccgpu.transforms import by_formula, replaced


@overload
def cca(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def cca(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def cca(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float = ...,
    return_lse: bool = ...,
    backend: str | None = ...,
) -> Any: ...
def cca(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float = 1.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attend from each position to the positions in its own row and column (and, in 3D, its own line in time).

    For every position u, over the positions i that share all coordinates but one with u, and u itself once:

        E_ui = scale q_u . k_i,   lse_u = log sum_i exp E_ui,   out_u = sum_i exp(E_ui - lse_u) v_i

    That is H + W - 1 positions in 2D, T + H + W - 2 in 3D, and all L in 1D. There is no 1/sqrt(D): the paper has none.
    The batch axis is never left out: (D, H, W) is read as D images of H channels with lines of W positions, and a
    clip's (D, T, H, W) as D images of T channels.

    Args:
        q: queries (B, D, *S) with S = (L,), (H, W) or (T, H, W); B may be 0, the sizes 1; any strides. channels_last is
            the fastest layout, others are brought into it.
        k: keys, of q's shape.
        v: values (B, C, *S). All three share one dtype (float32, bfloat16, float16 or float64) and one device, and are
            arrays of one kind: torch tensors, or as below.
        scale: finite factor of the energies.
        return_lse: return lse too, for merging with other attentions.
        backend: the name of a backend (see `ccgpu.backends()`), which runs or raises; None takes the environment
            variable CCGPU_BACKEND, or else the first backend that can run.

    Returns:
        out (B, C, *S) in v's dtype and memory format; with return_lse also lse (B, *S), float32 (float64 for float64
        inputs), contiguous.

    Raises:
        TypeError: an input is no array, has an integer or complex dtype, or the dtypes or kinds of arrays differ.
        ValueError: rank, shapes, devices, scale or the backend's name are wrong.
        RuntimeError: the backend asked for cannot run the call.

    Warns:
        UserWarning: q, k and v have three axes and one shape that is likely an image's, (D, H, W), without its batch.

    Both results are differentiable in q, k and v, to any order (second and higher derivatives keep all energies).
    Backward runs on the backend that forward ran on. Saved for it: q, k, v, out, lse. Deterministic: the same bits on
    every run. Works under autocast (inputs take its dtype, float64 stays), torch.func.vmap,
    torch.compile(fullgraph=True), torch.export and torch.onnx.export. Under torch.func's grad, jvp and the like and in
    forward mode plain torch operations compute it, whatever the backend, and keep all energies; within
    `ccgpu.decomposed` they do too. A NaN or infinity in an input reaches the positions that attend to it, and no
    others.

    Arrays of other libraries are accepted as well, all three of one kind, and give out (and lse) of that kind, without
    autograd or autocast. They are read where they are and never written to; only axes in reverse, the other byte order
    and misaligned elements, which torch cannot represent, make a copy.

    - NumPy (subclasses too, but for masked arrays): plain writable ndarrays; bfloat16 by ml_dtypes.
    - CuPy: on CuPy's current stream.
    - Numba device arrays: on v's stream, or the legacy default one where it has none.
    - anything else with `__dlpack__` (JAX, ...): results made by the `from_dlpack` of its array API namespace or its
      library; tensors if it has none.

    Source: Huang et al., CCNet: Criss-Cross Attention for Semantic Segmentation, section 3.2, equations 1 and 2.

    Examples:
        >>> import torch, ccgpu
        >>> q, k, v = torch.zeros(1, 8, 3, 4), torch.zeros(1, 8, 3, 4), torch.eye(12).view(1, 12, 3, 4)
        >>> out, lse = ccgpu.cca(q, k, v, return_lse=True)
        >>> float(lse[0, 0, 0].exp().round())  # equal energies: 3 + 4 - 1 positions of weight 1/6
        6.0
        >>> type(ccgpu.cca(q.numpy(), k.numpy(), v.numpy()))
        <class 'numpy.ndarray'>
    """
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        if has_torch_function((q, k, v)):  # a proxy of torch.fx.symbolic_trace
            options = {"scale": scale, "return_lse": return_lse, "backend": backend}
            return handle_torch_function(cast("Any", cca), (q, k, v), q, k, v, **options)
        kind = arrays.kind_of("cca", q=q, k=k, v=v)
        if kind is not None:
            operation = functools.partial(_attend, scale=scale, return_lse=return_lse, backend=backend, of_arrays=True)
            return arrays.call("cca", kind, operation, q=q, k=k, v=v)
    return _attend(q, k, v, scale, return_lse, backend)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, return_lse: bool, backend: str | None, of_arrays: bool = False
) -> Any:
    """Return what `cca` returns, for tensors; `of_arrays`: for tensors on the memory of arrays.

    Arrays need neither derivatives nor autocast, so a backend runs without the op around it, which would take 40 us.
    torch.compile, for which NumPy arrays are tensors, gets the op: it cannot trace the kernels.
    """
    check_inputs(q, k, v)
    scale = check_scale(scale, "cca")
    check_name(backend)
    if of_arrays and not torch.compiler.is_compiling():
        out, lse = run_forward(q, k, v, scale, backend)
    elif replaced(q, k, v):
        out, lse = by_formula(functools.partial(formula.attention, scale=scale), lowered_maps, q, k, v)
    else:
        out, lse = torch.ops.ccgpu.cca_forward(q, k, v, scale, backend)
    return (out, lse) if return_lse else out
