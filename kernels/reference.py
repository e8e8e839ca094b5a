"""The definition of criss-cross attention: NumPy, float64, plain loops.

Every other implementation in this library is tested against these functions, and they are tested against tables
computed by hand. They are written to be read, not to be fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def neighbours(position: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield the positions that `position` attends to: its lines along every axis of a map of `sizes`, itself once.

    The order is axis by axis, the first axis (T or H) first, each from 0 to its end; the position itself is counted on
    the last axis only. There are sum(sizes) - len(sizes) + 1 neighbours: H + W - 1 in 2D.

    Examples:
        >>> list(neighbours((1, 0), (3, 2)))
        [(0, 0), (2, 0), (1, 0), (1, 1)]
    """
    last = len(sizes) - 1
    for axis, size in enumerate(sizes):
        for index in range(size):
            if axis == last or index != position[axis]:
                yield (*position[:axis], index, *position[axis + 1 :])


def _at(position: tuple[int, ...], *image: int) -> Any:
    """Return the index of all channels at a position; `image` comes first if the array has a batch axis."""
    return (*image, slice(None), *position)


def _weights(
    q: Array, k: Array, u: tuple[int, ...], around: list[tuple[int, ...]], scale: float
) -> tuple[Array, float]:
    """Return the softmax weights over `around` and the log-sum-exp of the energies of one image's query at u."""
    energies = np.array([scale * np.dot(q[_at(u)], k[_at(i)]) for i in around])
    row_max = energies.max()
    if row_max == -np.inf:  # no weight anywhere: lse is the logarithm of an empty sum, and the weights are 0 / 0
        lse = -np.inf
    else:
        lse = row_max + np.log(np.exp(energies - row_max).sum())
    return np.exp(energies - lse), lse


def forward(q: Array, k: Array, v: Array, scale: float) -> tuple[Array, Array]:
    """Return criss-cross attention and the log-sum-exp of its energies.

    For every position u, over the positions i of its criss-cross (`neighbours`, u once):

        E_ui = scale q_u . k_i,   lse_u = log sum_i exp E_ui,   out_u = sum_i exp(E_ui - lse_u) v_i

    Args:
        q, k: (B, D, *S) with one, two or three axes S.
        v: (B, C, *S).
        scale: factor of the energies; the paper uses 1.

    Returns:
        out (B, C, *S) and lse (B, *S), float64. An energy of +inf or NaN makes the weights of its query NaN.

    Source: Huang et al., CCNet, section 3.2 (TPAMI), with the centre counted once.
    """
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    sizes = q.shape[2:]
    out = np.full(v.shape, np.nan)
    lse = np.full((q.shape[0], *sizes), np.nan)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        for b in range(q.shape[0]):
            for u in np.ndindex(*sizes):
                around = list(neighbours(u, sizes))
                weights, lse[b][u] = _weights(q[b], k[b], u, around, scale)
                out[_at(u, b)] = sum(w * v[_at(i, b)] for w, i in zip(weights, around, strict=True))
    return out, lse


def backward(
    dout: Array, q: Array, k: Array, v: Array, out: Array, lse: Array, dlse: Array, scale: float
) -> tuple[Array, Array, Array]:
    """Return the gradients of q, k and v, given the gradients of out and lse.

    With the weights w_ui = exp(E_ui - lse_u), for every u and every i of its criss-cross:

        dw_ui = dout_u . v_i,   dE_ui = w_ui (dw_ui - sum_j w_uj dw_uj + dlse_u)
        dv_i += w_ui dout_u,    dq_u += scale dE_ui k_i,    dk_i += scale dE_ui q_u

    Args:
        dout: (B, C, *S), the gradient of out.
        q, k, v, scale: as in `forward`.
        out, lse: the results of `forward`. They are not used but computed again, so their rounding has no effect.
        dlse: (B, *S), the gradient of lse.

    Returns:
        dq, dk (B, D, *S) and dv (B, C, *S), float64.
    """
    dout, q, k, v, dlse = (np.asarray(x, dtype=np.float64) for x in (dout, q, k, v, dlse))
    sizes = q.shape[2:]
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        for b in range(q.shape[0]):
            for u in np.ndindex(*sizes):
                around = list(neighbours(u, sizes))
                weights, _ = _weights(q[b], k[b], u, around, scale)
                here = _at(u, b)
                dweights = np.array([np.dot(dout[here], v[_at(i, b)]) for i in around])
                denergies = weights * (dweights - (weights * dweights).sum() + dlse[b][u])
                for w, de, i in zip(weights, denergies, around, strict=True):
                    there = _at(i, b)
                    dv[there] += w * dout[here]
                    dq[here] += scale * de * k[there]
                    dk[there] += scale * de * q[here]
    return dq, dk, dv


def affinity(q: Array, k: Array) -> Array:
    """Return the energies of every position with the positions of its criss-cross.

    For every position u and the j-th position i_j(u) that `neighbours` yields for it:

        energies[b, j, u] = q_u . k_{i_j(u)}

    Args:
        q, k: (B, D, *S) with one, two or three axes S.

    Returns:
        energies (B, K, *S), float64, with K = sum(S) - len(S) + 1.
    """
    q, k = (np.asarray(x, dtype=np.float64) for x in (q, k))
    sizes = q.shape[2:]
    energies = np.full((q.shape[0], sum(sizes) - len(sizes) + 1, *sizes), np.nan)
    with np.errstate(invalid="ignore", over="ignore"):
        for b in range(q.shape[0]):
            for u in np.ndindex(*sizes):
                energies[_at(u, b)] = [np.dot(q[_at(u, b)], k[_at(i, b)]) for i in neighbours(u, sizes)]
    return energies


def aggregate(weights: Array, v: Array) -> Array:
    """Return the weighted sum over each position's criss-cross, in the order of `neighbours`.

        out_u = sum_j weights[b, j, u] v_{i_j(u)}

    Args:
        weights: (B, K, *S) with K = sum(S) - len(S) + 1.
        v: (B, C, *S).

    Returns:
        out (B, C, *S), float64.
    """
    weights, v = (np.asarray(x, dtype=np.float64) for x in (weights, v))
    sizes = v.shape[2:]
    out = np.full(v.shape, np.nan)
    with np.errstate(invalid="ignore", over="ignore"):
        for b in range(v.shape[0]):
            for u in np.ndindex(*sizes):
                around = zip(weights[_at(u, b)], neighbours(u, sizes), strict=True)
                out[_at(u, b)] = sum(w * v[_at(i, b)] for w, i in around)
    return out


def aggregate_transposed(weights: Array, x: Array) -> Array:
    """Return the transpose of `aggregate`, for the same weights, applied to x.

        y_i = sum over all u and j with i_j(u) = i of weights[b, j, u] x_u

    Args:
        weights: (B, K, *S) with K = sum(S) - len(S) + 1.
        x: (B, C, *S).

    Returns:
        y (B, C, *S), float64.
    """
    weights, x = (np.asarray(a, dtype=np.float64) for a in (weights, x))
    sizes = x.shape[2:]
    y = np.zeros(x.shape)
    with np.errstate(invalid="ignore", over="ignore"):
        for b in range(x.shape[0]):
            for u in np.ndindex(*sizes):
                for w, i in zip(weights[_at(u, b)], neighbours(u, sizes), strict=True):
                    y[_at(i, b)] += w * x[_at(u, b)]
    return y
