"""The calls of the CPU kernels on operands: memory by address, in whichever library's tensors or arrays it is.

Maps are `Operand`s of one dtype, in any layout.
Numbers, which are lse, its gradient, energies and weights, are the address of a C-contiguous array in the dtype of
energies. All memory belongs to the caller, who keeps it until the call returns.
"""

from __future__ import annotations

from ccgpu.kernels.numba_cpu.operands import Layout, Operand
from ccgpu.kernels.numba_cpu.plans import Plan, Problem, plan_of
from ccgpu.kernels.numba_cpu.workers import thread_count


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
    plan = forward_plan(q.layout, k.layout, v.layout, out.layout, thread_count(threads))
    plan.run((q.address, k.address, v.address, out.address, lse), scale)


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
    maps = dout, q, k, v, out, dq, dk, dv
    plan = backward_plan(*(x.layout for x in maps), threads=thread_count(threads))
    plan.run((*(x.address for x in maps), lse, dlse), scale)


def affinity(q: Operand, k: Operand, energies: int, threads: int | None = None) -> None:
    """Write the energies q_u . k_i; see `kernels.reference.affinity`.

    Args:
        q, k: (B, D, *S).
        energies: (B, *S, K), numbers.
        threads: as in `forward`.
    """
    plan = affinity_plan(q.layout, k.layout, thread_count(threads))
    plan.run((q.address, k.address, energies))


def aggregate(weights: int, v: Operand, out: Operand, threads: int | None = None, *, transposed: bool = False) -> None:
    """Write each position's weighted sum of v over its neighbours; see `kernels.reference.aggregate`.

    Args:
        weights: (B, *S, K), numbers.
        v, out: (B, C, *S).
        threads: as in `forward`.
        transposed: write the transpose of that function of v; see `kernels.reference.aggregate_transposed`.
    """
    plan = aggregate_plan(v.layout, out.layout, thread_count(threads))
    plan.run((v.address, out.address, weights, int(transposed)))


# Plans ----------------------------------------------------------------------------------------------------------------
#
# The addresses that `Plan.run` takes are those of the maps, in the order of the arguments, and of the numbers: lse; lse
# and dlse; energies; weights, followed by 1 for the transposed sum or 0.


def forward_plan(q: Layout, k: Layout, v: Layout, out: Layout, threads: int, *, crossing: int | None = None) -> Plan:
    """Return the plan of `forward`; `crossing` as in `Problem`."""
    depth, channels = q.shape[1], v.shape[1]
    return plan_of(Problem("forward", (q, k, v, out), 1, depth, channels, depth + channels, 2, threads, crossing))


def backward_plan(
    dout: Layout,
    q: Layout,
    k: Layout,
    v: Layout,
    out: Layout,
    dq: Layout,
    dk: Layout,
    dv: Layout,
    *,
    threads: int,
    crossing: int | None = None,
) -> Plan:
    """Return the plan of `backward`; `crossing` as in `Problem`."""
    depth, channels = q.shape[1], v.shape[1]
    maps = dout, q, k, v, out, dq, dk, dv
    return plan_of(Problem("backward", maps, 3, depth, channels, 3 * depth + 2 * channels, 1, threads, crossing))


def affinity_plan(q: Layout, k: Layout, threads: int) -> Plan:
    """Return the plan of `affinity`."""
    return plan_of(Problem("affinity", (q, k), 0, q.shape[1], 1, q.shape[1], 0, threads))


def aggregate_plan(v: Layout, out: Layout, threads: int) -> Plan:
    """Return the plan of `aggregate`, transposed or not."""
    return plan_of(Problem("aggregate", (v, out), 1, 1, v.shape[1], v.shape[1], 0, threads))
