"""The program of one rank of `tests/ccgpu/test_distributed.py`: calls on shards of maps, saved to a file.

`python -m tests.ccgpu.ranks FOLDER`, with torchrun's variables. One start of four processes runs everything: groups of
two, three and four of them are groups of their own. What every process would have to import or compile is left out:
`tests.ccgpu.problems`, and Numba but for two ranks.
"""

import functools
import os
import signal
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.utils.checkpoint

import ccgpu
from ccgpu.layouts import energy_dtype

RANKS = 4
SILENCE = 2  # seconds after which a group gives up on a silent rank


class Case(NamedTuple):
    """A call on maps drawn from a seed."""

    sizes: tuple
    dim: int
    extents: dict  # number of ranks -> the sizes of their shards
    dtype: torch.dtype = torch.float64
    batch: int = 2
    layout: str = "contiguous"
    energy: float = 1.0
    backend: str | None = "cpu"
    depth: int = 3
    channels: int = 5


def even(size):
    """Return shards as torch.chunk makes them, as equal as they can be, for each number of ranks."""
    return {ranks: [(r + 1) * size // ranks - r * size // ranks for r in range(ranks)] for ranks in (2, 3, 4)}


class Maps(NamedTuple):
    """q, k, v, the gradients of out and lse, and the scale: a problem of `tests.ccgpu.problems`."""

    tensors: tuple
    dout: torch.Tensor
    dlse: torch.Tensor
    scale: float


UNEVEN = {2: [1, 6], 3: [4, 0, 3], 4: [0, 5, 0, 2]}
CASES = {
    "rows": Case((7, 5), -2, even(7)),
    "uneven": Case((7, 5), -2, UNEVEN),
    "columns": Case((3, 7), -1, UNEVEN),
    "positive dim": Case((7, 2), 2, even(7), batch=1),
    "fewer lines than ranks": Case((7, 1), -2, even(7), batch=1),
    "one row": Case((1, 6), -2, {2: [0, 1], 3: [1, 0, 0], 4: [0, 0, 0, 1]}),
    "one position": Case((1, 1), -1, {2: [1, 0], 3: [0, 1, 0], 4: [0, 0, 1, 0]}),
    "frames": Case((5, 3, 2), -3, even(5)),
    "rows of clips": Case((2, 7, 3), -2, UNEVEN),
    "columns of clips": Case((2, 3, 5), -1, even(5)),
    "clips of one row": Case((5, 1, 3), -3, even(5)),
    "lines": Case((13,), -1, even(13), batch=3),
    "one line": Case((11,), -1, even(11), batch=1),
    "no image": Case((5, 4), -2, even(5), batch=0),
    "large energies": Case((7, 5), -2, even(7), torch.float32, energy=3e4),
    "channels last": Case((7, 5), -2, UNEVEN, torch.float32, layout="channels_last"),
    "strided": Case((7, 5), -1, even(5), torch.float32, layout="strided"),
    "bfloat16": Case((7, 5), -2, even(7), torch.bfloat16),
    "float16": Case((7, 5), -2, even(7), torch.float16, layout="channels_last"),
    "kernels": Case((7, 5), -2, {2: [1, 6]}, torch.float32, backend=None),
    "kernels, bfloat16": Case((17, 5), -2, {2: [9, 8]}, torch.bfloat16, backend=None, layout="channels_last", depth=8),
}


def problem_of(case):
    """Return the whole maps of a case."""
    generator = torch.Generator().manual_seed(sum(case.sizes))

    def draw(channels, factor=1.0):
        shape = (case.batch, channels, *case.sizes)
        x = factor * torch.randn(shape, generator=generator, dtype=torch.float64)
        x = x.to(case.dtype)
        if case.layout == "channels_last":
            return x.movedim(1, -1).contiguous().movedim(-1, 1)
        return x.mT.contiguous().mT if case.layout == "strided" else x

    q, k = (draw(case.depth, (case.energy / case.depth) ** 0.5) for _ in "qk")
    v, dout = draw(case.channels), draw(case.channels)
    dlse = draw(1)[:, 0].to(energy_dtype(case.dtype))
    return Maps((q, k, v), dout, dlse, 0.7)


def shard(x, case, ranks, rank, axis=None):
    """Return a rank's shard of a whole map."""
    axis = case.dim % (len(case.sizes) + 2) if axis is None else axis
    return x.split(case.extents[ranks], axis)[rank]


def own(case, ranks, rank):
    """Return a rank's shards of a case's maps."""
    problem = problem_of(case)
    tensors = tuple(shard(x, case, ranks, rank) for x in problem.tensors)
    dlse = shard(problem.dlse.unsqueeze(1), case, ranks, rank).squeeze(1)
    return Maps(tensors, shard(problem.dout, case, ranks, rank), dlse, problem.scale)


def attend(case, ranks, rank, group):
    """Return this rank's shards of out, lse, dq, dk, dv."""
    (tensors, dout, dlse, scale) = own(case, ranks, rank)
    options = {"group": group, "dim": case.dim, "scale": scale, "backend": case.backend}
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = ccgpu.distributed.cca(*leaves, return_lse=True, **options)
    results = [out, lse, *torch.autograd.grad((out, lse), leaves, (dout, dlse))]
    assert [x.dtype for x in results[2:]] == [case.dtype] * 3
    assert results[0].stride() == torch.empty_like(tensors[2]).stride()
    return [x.detach() for x in results]


@contextmanager
def counted(rank):
    """Yield a list to which the bytes that this rank sends to others are added, one number for each exchange."""
    sent, exchange = [], dist.all_to_all_single

    def counting(output, input, receive, send, group=None):
        sent.append((sum(send) - send[rank]) * input.element_size())
        return exchange(output, input, receive, send, group=group)

    dist.all_to_all_single = counting
    try:
        yield sent
    finally:
        dist.all_to_all_single = exchange


def traffic(name, rank):
    """Return the bytes that forward and backward of a case send from this rank to the others."""
    (q, k, v), dout, *_ = own(CASES[name], RANKS, rank)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with counted(rank) as forward:
        out = ccgpu.distributed.cca(*leaves, dim=CASES[name].dim, backend="cpu")
    with counted(rank) as backward:
        torch.autograd.grad(out, leaves, dout)
    return sum(forward), sum(backward)


def infinite(rank):
    """Return out on all ranks for maps with infinities and NaN, on shards and on one device."""
    case = CASES["rows"]
    q, k, v = problem_of(case).tensors
    v[0, 0, 2, 1], v[1, 1, 5, 4], v[0, 2, 0, 1] = torch.inf, -torch.inf, torch.nan
    k[0, :, 3, 3], q[1, :, 1, 2], k[1, :, 6, 0] = torch.inf, torch.nan, -torch.inf
    # A column without any weight: every energy of (4, 0) with it is -inf, with its row finite.
    q[0, :, :, 0], k[0, :, :, 0] = 1.0, -torch.inf
    whole = ccgpu.cca(q, k, v, return_lse=True, backend="cpu")
    mine = [shard(x, case, RANKS, rank) for x in (q, k, v)]
    return ccgpu.distributed.cca(*mine, return_lse=True, backend="cpu"), whole


def subsets(rank):
    """Return gradients of a case where some of q, k and v need one, with those where all do."""
    case, found = CASES["uneven"], {}
    (tensors, dout, dlse, scale) = own(case, RANKS, rank)
    for needs in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (1, 1, 1)):
        leaves = [x.detach().requires_grad_(bool(need)) for x, need in zip(tensors, needs, strict=True)]
        out, lse = ccgpu.distributed.cca(*leaves, scale=scale, return_lse=True, backend="cpu")
        wanted = [x for x in leaves if x.requires_grad]
        found[needs] = torch.autograd.grad((out, lse), wanted, (dout, dlse))
    with torch.no_grad():
        assert not ccgpu.distributed.cca(*(x.requires_grad_() for x in tensors), backend="cpu").requires_grad
    return found


def modes(rank):
    """Return what autocast computes, and what second derivatives, checkpoints, torch.func and `decomposed` come to."""
    attend_here = functools.partial(ccgpu.distributed.cca, backend="cpu")
    (q, k, v), *_ = own(CASES["channels last"], RANKS, rank)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = attend_here(q, k.bfloat16(), v)
    plain = attend_here(*(x.bfloat16() for x in (q, k, v)))
    q = q.detach().requires_grad_()
    out = attend_here(q, k, v)
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    checkpointed = torch.utils.checkpoint.checkpoint(attend_here, q, k, v, use_reentrant=False)
    (again,) = torch.autograd.grad(checkpointed.square().sum(), q)
    return {
        "autocast": (lowered, plain),
        "checkpoint": (first.detach(), again),
        "second": error_of(lambda: torch.autograd.grad(first.sum(), q))[0],
        "func": error_of(lambda: torch.func.grad(lambda x: attend_here(x, k, v).sum())(q))[0],
        "decomposed": error_of(lambda: ccgpu.decomposed()(attend_here)(q, k, v))[0],
        "mistakes": {name: error_of(lambda call=call: call(rank))[0] for name, call in MISTAKES.items()},
        "afterwards": attend_here(q, k, v).detach(),
        "before": out.detach(),
    }


def error_of(call):
    """Return the type and message of the error that a call raises, or None, and the seconds until then."""
    start = time.monotonic()
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    return None, time.monotonic() - start


def mistake(differs=None, **options):
    """Return a function of the rank that calls cca, on rank 1 with these options and tensors by `differs(q, k, v)`."""

    def call(rank):
        tensors = torch.zeros(3, 1, 2, 3, 4).unbind()
        mine = {"backend": "cpu", **(options if rank == 1 else {})}
        return ccgpu.distributed.cca(*(differs(*tensors) if differs and rank == 1 else tensors), **mine)

    return call


MISTAKES = {
    "scale": mistake(scale=2.0),
    "dim": mistake(dim=-1),
    "backend": mistake(backend="torch"),
    "dtype": mistake(lambda *x: [y.double() for y in x]),
    "depth": mistake(lambda q, k, v: (q[:, :1], k[:, :1], v)),
    "width": mistake(lambda *x: [y[..., :3] for y in x]),
    "rank": mistake(lambda *x: [y.unsqueeze(2) for y in x]),
    "requires_grad": mistake(lambda q, k, v: (q.clone().requires_grad_(), k, v)),
    "keys on one rank": mistake(lambda q, k, v: (q, k[:, :1], v)),
    "no tensor on one rank": mistake(lambda q, k, v: (None, k, v)),
    "no backend on one rank": mistake(backend="reference"),
    "batch axis": lambda rank: ccgpu.distributed.cca(*torch.zeros(3, 1, 2, 3, 4).unbind(), dim=1, backend="cpu"),
}


def ends(rank, silent):
    """Return the error of the ranks that wait for a silent one, and of those one of whose number dies."""
    q = torch.zeros(1, 2, 3, 4)
    errors = {}
    if rank < 2:  # rank 1 never calls
        errors["silent"] = (
            error_of(lambda: ccgpu.distributed.cca(q, q, q, group=silent, backend="cpu")) if rank == 0 else None
        )
    dist.barrier()
    if rank == RANKS - 1:  # it dies in the middle of the call, after the ranks have agreed
        dist.all_to_all_single = lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL)
    errors["dead"] = error_of(lambda: ccgpu.distributed.cca(q, q, q, backend="cpu"))
    return errors


def main(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    groups = {2: dist.new_group([0, 1]), 3: dist.new_group([0, 1, 2]), 4: None}
    silent = dist.new_group([0, 1], timeout=timedelta(seconds=SILENCE))
    saved = {
        "cases": {
            (name, ranks): attend(case, ranks, rank, group)
            for ranks, group in groups.items()
            for name, case in CASES.items()
            if rank < ranks and ranks in case.extents
        },
        "outside": error_of(lambda: ccgpu.distributed.cca(*torch.zeros(3, 1, 2, 3, 4).unbind(), group=groups[3]))
        if rank == 3
        else None,
        "traffic": {name: traffic(name, rank) for name in ("uneven", "frames", "bfloat16")},
        "infinite": infinite(rank),
        "subsets": subsets(rank),
        "modes": modes(rank),
    }
    torch.save(saved, Path(folder) / f"{rank}.pt")
    torch.save(ends(rank, silent), Path(folder) / f"ends-{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
