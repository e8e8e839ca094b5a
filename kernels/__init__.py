"""Criss-cross attention on plain arrays: arrays in, arrays out, no torch.

`forward` and `backward` are the whole op for glue to another framework: two functions without state. They take NumPy
arrays, and arrays on a CUDA device that have `__cuda_array_interface__`.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from ccgpu.kernels import array_checks as _checks

__all__ = ["backward", "forward"]


def forward(q: Any, k: Any, v: Any, scale: float = 1.0, *, stream: Any = 0) -> tuple[Any, Any]:
    """Return criss-cross attention and the log-sum-exp of its energies.

    For every position u, over the positions i that share all coordinates but one with u, and u itself once:

        E_ui = scale q_u . k_i,   lse_u = log sum_i exp E_ui,   out_u = sum_i exp(E_ui - lse_u) v_i

    Args:
        q, k: queries and keys (B, D, *S) with S = (L,), (H, W) or (T, H, W); B may be 0.
        v: values (B, C, *S). All three are NumPy arrays, computed on the CPU, or device arrays with
            `__cuda_array_interface__` (of Numba, CuPy and others) on one device; float32, float16 or float64, of one
            dtype, any strides. Channels-last memory (channels with the smallest stride) is the fastest layout. None of
            them is written to.
        scale: finite factor of the energies; the paper uses 1.
        stream: for device arrays, the address of the CUDA stream to compute on; 0 takes the one that v names in its
            interface (CuPy's current one), or else the legacy default stream.

    Returns:
        out (B, C, *S) in v's dtype, and lse (B, *S), float32 (float64 for float64 inputs). Of NumPy arrays: ndarrays,
        out in v's memory order, lse C-contiguous. Of device arrays: CuPy arrays where v is one, otherwise Numba device
        arrays, out in channels-last memory; the stream may still be computing them.

    Raises:
        TypeError: an argument is no such array, a dtype is not supported or differs, host and device are mixed.
        ValueError: shapes, scale or stream are wrong.

    Deterministic: the same bits on every run. For backward keep q, k, v, out and lse.

    Source: Huang et al., CCNet: Criss-Cross Attention for Semantic Segmentation, section 3.2, equations 1 and 2.

    Examples:
        >>> import numpy as np
        >>> from ccgpu import kernels
        >>> q, v = np.zeros((1, 8, 3, 4), np.float32), np.eye(12, dtype=np.float32).reshape(1, 12, 3, 4)
        >>> out, lse = kernels.forward(q, q, v)
        >>> round(float(np.exp(lse[0, 0, 0])))  # equal energies: 3 + 4 - 1 positions of weight 1/6
        6
    """
    function = "kernels.forward"
    on_device = _checks.check_place(function, {"q": q, "k": k, "v": v})
    _checks.check_maps(function, q, k, v)
    scale = _checks.check_scale(scale, function)
    address = _checks.check_stream(stream, on_device, function)
    if on_device:
        from ccgpu.kernels.numba_cuda import calls as on_cuda

        out, lse = on_cuda.forward(q, k, v, scale, stream=address or _stream_of(v))
        return _of_library(out, v), _of_library(lse, v)
    from ccgpu.kernels.numba_cpu import calls as on_cpu

    q, k, v = (_checks.host_array(x) for x in (q, k, v))
    return on_cpu.forward(q, k, v, scale)


def backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    dlse: Any = None,
    scale: float = 1.0,
    *,
    stream: Any = 0,
) -> tuple[Any, Any, Any]:
    """Return the gradients of q, k and v, given those of out and lse.

    With the weights w_ui = exp(E_ui - lse_u), for every u and every i of its criss-cross:

        dw_ui = dout_u . v_i,   dE_ui = w_ui (dw_ui - dout_u . out_u + dlse_u)
        dv_i += w_ui dout_u,    dq_u += scale dE_ui k_i,    dk_i += scale dE_ui q_u

    Args:
        dout: (B, C, *S), the gradient of out, in v's dtype.
        q, k, v, scale: the arguments of `forward`.
        out, lse: its results for them.
        dlse: (B, *S), the gradient of lse, in its dtype; None: zeros, if lse was not used.
        stream: as in `forward`.

    Returns:
        dq, dk (B, D, *S) and dv (B, C, *S), arrays of the kinds and dtypes that `forward` returns, ndarrays in the
        memory order of q, k and v.

    Raises:
        TypeError, ValueError: as in `forward`.

    Deterministic: the same bits on every run.

    Examples:
        >>> import numpy as np
        >>> from ccgpu import kernels
        >>> q, v = np.zeros((1, 8, 3, 4)), np.ones((1, 2, 3, 4))
        >>> out, lse = kernels.forward(q, q, v)
        >>> dq, dk, dv = kernels.backward(np.ones_like(out), q, q, v, out, lse)
        >>> bool(np.allclose(dv, 1))  # the weights of a query sum to one, and here those of a value do as well
        True
    """
    function = "kernels.backward"
    results = {"dout": dout, "out": out, "lse": lse, **({} if dlse is None else {"dlse": dlse})}
    on_device = _checks.check_place(function, {"q": q, "k": k, "v": v, **results})
    energies = _checks.check_results(function, *_checks.check_maps(function, q, k, v), results)
    scale = _checks.check_scale(scale, function)
    address = _checks.check_stream(stream, on_device, function)
    if on_device:
        from ccgpu.kernels.numba_cuda import calls as on_cuda

        stream = address or _stream_of(v)
        gradients = on_cuda.backward(dout, q, k, v, out, lse, dlse, scale, stream=stream)
        dq, dk, dv = (_of_library(x, v) for x in gradients)
        return dq, dk, dv
    from ccgpu.kernels.numba_cpu import calls as on_cpu

    dlse = np.zeros(energies.shape, energies.dtype) if dlse is None else dlse
    dout, q, k, v, out, lse, dlse = (_checks.host_array(x) for x in (dout, q, k, v, out, lse, dlse))
    return on_cpu.backward(dout, q, k, v, out, lse, dlse, scale)


def _stream_of(v: Any) -> int:
    """Return the address of the stream that a device array names in its interface, or 0 for the default one."""
    return getattr(v, "__cuda_array_interface__", {}).get("stream") or 0


def _of_library(x: Any, v: Any) -> Any:
    """Return a Numba device array as a CuPy array on the same memory if v is one of CuPy's, otherwise as it is.

    The result names no stream: CuPy would make the host wait for it.
    """
    cupy = sys.modules.get("cupy")
    if cupy is None or not isinstance(v, cupy.ndarray):
        return x
    return cupy.asarray(_checks.SameMemory(x, "__cuda_array_interface__", stream=None))
