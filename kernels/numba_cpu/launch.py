"""The calls of the CPU kernels on operands: memory by address, in whichever library's tensors or arrays it is.

Maps are `Operand`s in the dtype that the arithmetic of the call has in memory (`operands.ARITHMETIC`), in any layout.
Numbers, which are lse, its gradient, energies and weights, are the address of a C-contiguous array in the dtype of
energies. All memory belongs to the caller, who keeps it until the call returns.
"""

from __future__ import annotations

import math

import numpy as np

from ccgpu.kernels.numba_cpu.cache import AFFINITY, AGGREGATE, BACKWARD, FORWARD
from ccgpu.kernels.numba_cpu.operands import ARITHMETIC, Input, Operand, Output
from ccgpu.kernels.numba_cpu.schedule import Problem, thread_count


def forward(
    q: Operand, k: Operand, v: Operand, out: Operand, *, lse: int, scale: float, threads: int | None = None
) -> None:
    """Write criss-cross attention and the log-sum-exp of its energies; see `kernels.reference.forward`.

    Args:
        q, k: (B, D, *S).
        v, out: (B, C, *S).
        lse: (B, *S), numbers.
        scale: factor of the energies.
        threads: number of threads that share the work; None: NUMBA_NUM_THREADS, or all cores if that is not set.
    """
    arithmetic, count = ARITHMETIC[q.dtype], q.shape[0] * math.prod(q.shape[2:])
    if count == 0:
        return
    inputs, result = [Input(x) for x in (q, k, v)], Output(out)
    state = np.empty((2, count), arithmetic.like)  # maximum and sum of each position's energies, from axis to axis
    address = state.ctypes.data
    operands: list[Input | Output] = [*inputs, result]
    Problem(q.shape[0], q.shape[2:], arithmetic, thread_count(threads)).run(
        FORWARD,
        operands,
        depth=q.shape[1],
        channels=v.shape[1],
        scale=scale,
        products=q.shape[1] + v.shape[1],
        arguments=(*(x.map for x in operands), lse, address, address + state.strides[0]),
    )
    result.finish()


def backward(
    dout: Operand,
    q: Operand,
    k: Operand,
    v: Operand,
    out: Operand,
    dq: Operand,
    dk: Operand,
    dv: Operand,
    *,
    lse: int,
    dlse: int,
    scale: float,
    threads: int | None = None,
) -> None:
    """Write the gradients of q, k and v; see `kernels.reference.backward`.

    Args:
        dout: the gradient of out.
        q, k, v, out, lse, scale, threads: as in `forward`.
        dq, dk, dv: the gradients, of the shapes of q, k and v.
        dlse: the gradient of lse, numbers; 0: zeros.
    """
    arithmetic, count = ARITHMETIC[q.dtype], q.shape[0] * math.prod(q.shape[2:])
    if count == 0:
        return
    inputs, results = [Input(x) for x in (dout, q, k, v, out)], [Output(x) for x in (dq, dk, dv)]
    delta = np.empty(count, arithmetic.like)
    Problem(q.shape[0], q.shape[2:], arithmetic, thread_count(threads), backward=True).run(
        BACKWARD,
        [*inputs, *results],
        depth=q.shape[1],
        channels=v.shape[1],
        scale=scale,
        products=3 * q.shape[1] + 2 * v.shape[1],
        arguments=(*(x.map for x in inputs), lse, dlse, delta.ctypes.data, *(x.map for x in results)),
    )
    for x in results:
        x.finish()


def affinity(q: Operand, k: Operand, energies: int, threads: int | None = None) -> None:
    """Write the energies q_u . k_i; see `kernels.reference.affinity`.

    Args:
        q, k: (B, D, *S).
        energies: (B, *S, K), numbers.
        threads: as in `forward`.
    """
    if q.shape[0] == 0 or math.prod(q.shape[2:]) == 0:
        return
    inputs: list[Input | Output] = [Input(x) for x in (q, k)]
    Problem(q.shape[0], q.shape[2:], ARITHMETIC[q.dtype], thread_count(threads)).run(
        AFFINITY,
        inputs,
        depth=q.shape[1],
        channels=1,
        scale=1.0,
        products=q.shape[1],
        arguments=(*(x.map for x in inputs), energies),
    )


def aggregate(weights: int, v: Operand, out: Operand, threads: int | None = None, *, transposed: bool = False) -> None:
    """Write each position's weighted sum of v over its neighbours; see `kernels.reference.aggregate`.

    Args:
        weights: (B, *S, K), numbers.
        v, out: (B, C, *S).
        threads: as in `forward`.
        transposed: write the transpose of that function of v; see `kernels.reference.aggregate_transposed`.
    """
    if v.shape[0] == 0 or math.prod(v.shape[2:]) == 0:
        return
    values, result = Input(v), Output(out)
    Problem(v.shape[0], v.shape[2:], ARITHMETIC[v.dtype], thread_count(threads)).run(
        AGGREGATE,
        [values, result],
        depth=1,
        channels=v.shape[1],
        scale=1.0,
        products=v.shape[1],
        arguments=(weights, values.map, result.map, transposed),
    )
    result.finish()
