"""Problems for the CPU kernels as NumPy arrays, in every memory layout."""

import functools

import numpy as np
import torch

from ccgpu.bridges import numba_cpu
from ccgpu.kernels.numba_cpu import calls, launch, plans, schedule
from tests.ccgpu.problems import Problem

DTYPES = (torch.float64, torch.float32, torch.float16)


def arrays_of(problem):
    """Return q, k, v, dout and dlse as NumPy arrays."""
    return [x.detach().numpy() for x in (*problem.tensors, problem.dout, problem.dlse)]


def attend(q, k, v, dout, dlse, scale, threads=2):
    """Return out, lse, dq, dk, dv."""
    out, lse = calls.forward(q, k, v, scale, threads=threads)
    return (out, lse, *calls.backward(dout, q, k, v, out, lse, dlse, scale, threads=threads))


def tensors_of(arrays):
    """Return arrays as tensors: in native byte order, aligned, without negative strides."""
    return [torch.from_numpy(np.array(x, x.dtype.newbyteorder("="), order="C")) for x in arrays]


def problem_of(sizes, dtype, batch=2, d=6, c=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v, dout = (
        torch.randn(batch, n, *sizes, generator=generator, dtype=torch.float64).to(dtype) for n in (d, d, c, c)
    )
    dlse = torch.randn(batch, *sizes, generator=generator, dtype=torch.float64)
    return Problem((q, k, v), dout, dlse.to(torch.promote_types(dtype, torch.float32)), 0.7)


def address(x):
    """Return the address of an array's first element."""
    return x.__array_interface__["data"][0]


def cut_up(monkeypatch, **cuts):
    """Set constants of schedule.py that decide how a call is divided into chunks, groups and tickets.

    Plans made before are set aside, and those made with these constants are dropped with them.
    """
    for name, value in cuts.items():
        monkeypatch.setattr(schedule, name, value)
    monkeypatch.setattr(launch, "plan_of", functools.lru_cache(plans.Plan))
    monkeypatch.setattr(plans, "plan_of", launch.plan_of)
    monkeypatch.setattr(numba_cpu, "_plan", functools.lru_cache(numba_cpu._plan.__wrapped__))


def channels_last(x):
    return np.moveaxis(np.moveaxis(x, 1, -1).copy(), -1, 1) if x.ndim > 1 else x


def in_reverse(x):
    return x[(slice(None, None, -1),) * x.ndim].copy()[(slice(None, None, -1),) * x.ndim]


def misaligned(x):
    """Return a copy of x that begins one byte into its memory."""
    memory = np.zeros(x.nbytes + 1, np.uint8)
    view = memory[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def sliced(x):
    wide = np.full((x.shape[0], 2 * x.shape[1] + 1, *x.shape[2:]), np.nan, x.dtype)
    wide[:, 1::2] = x
    return wide[:, 1::2]


def records(x):
    """Return a copy of x as a field of records of an odd size."""
    fields = np.zeros(x.shape, [("before", "u1"), ("x", x.dtype)])
    fields["x"] = x
    return fields["x"]


def read_only(x):
    view = x.copy()
    view.flags.writeable = False
    return view


def big_endian(x):
    return x.astype(x.dtype.newbyteorder(">"))


LAYOUTS = {
    "contiguous": np.ascontiguousarray,
    "channels last": channels_last,
    "Fortran": np.asfortranarray,
    "in reverse": in_reverse,
    "channels last in reverse": lambda x: channels_last(in_reverse(x))[:, ::-1].copy("K")[:, ::-1],
    "sliced": sliced,
    "misaligned": misaligned,
    "misaligned channels last": lambda x: np.moveaxis(misaligned(np.moveaxis(x, 1, -1).copy()), -1, 1),
    "records": records,
    "channels between axes": lambda x: np.moveaxis(np.moveaxis(x, 1, min(2, x.ndim - 1)).copy(), min(2, x.ndim - 1), 1),
    "images last": lambda x: np.moveaxis(np.moveaxis(x, 0, -1).copy(), -1, 0),
    "big-endian": big_endian,
    "read-only": read_only,
}
