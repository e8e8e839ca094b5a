"""Test problems for cca and the tolerance of their results, for the tests of values on every device.

Tolerance: the error is at most 2 times (values) or 3 times (gradients) that of the plain einsum formulation in the same
dtype, plus a floor of a few units in the last place of the result's magnitude. tests/error_table.py collects the
backends' errors.
"""

import math
from typing import NamedTuple

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ccgpu
from ccgpu.kernels import reference
from ccgpu.layouts import energy_dtype
from tests import error_table
from tests.error_table import Row, in_units

MAPS = {rank: st.tuples(*[st.integers(1, largest)] * rank) for rank, largest in ((1, 13), (2, 7), (3, 4))}
SIZES = st.one_of(*MAPS.values())
# Fewer examples and smaller maps for backends that take about a second for an example.
FEW_EXAMPLES = 4
SMALL_MAPS = {rank: st.tuples(*[st.integers(1, largest)] * rank) for rank, largest in ((1, 5), (2, 3), (3, 2))}
SIMULATED = {"numba_cuda"}  # on CPU tensors, a simulator's Python threads run these kernels
SLOW = {"reference", *SIMULATED}  # too slow for maps of hundreds of positions
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EPSILON = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def cpu_backends(dtype=torch.float64):
    """Return the names of the backends that run CPU tensors of a dtype on this machine."""
    return [b.name for b in ccgpu.backends("cpu", dtype=dtype) if b.available]


def cells():
    """Return test parameters: every backend for CPU tensors with each of its dtypes and each rank."""
    return [
        pytest.param(backend, dtype, rank, id=f"{backend}-{name_of(dtype)}-{rank}D")
        for dtype in DTYPES
        for backend in cpu_backends(dtype)
        for rank in MAPS
    ]


def quick_cells(dtypes):
    """Return test parameters: every backend fast enough for a few hundred positions, with each of its dtypes."""
    return [
        pytest.param(backend, dtype, id=f"{backend}-{name_of(dtype)}")
        for dtype in dtypes
        for backend in cpu_backends(dtype)
        if backend not in SLOW
    ]


def try_examples(check, problems, backend, dtype, rank, examples):
    """Run check(backend, problem) on this many problems of a dtype and rank, fewer and smaller ones in a simulator."""
    if backend in SIMULATED:
        examples, maps = FEW_EXAMPLES, SMALL_MAPS[rank]
    else:
        maps = MAPS[rank]

    @settings(max_examples=examples, deadline=None)
    @given(problem=problems((dtype,), maps))
    def run_check(problem):
        check(backend, problem)

    run_check()


def plain(q, k, v, scale):
    """Return out and lse by einsum, every step in the dtype of the inputs, as plain PyTorch computes them."""
    axes = q.ndim - 2
    energies = []
    for axis in range(axes):
        lines_q, lines_k = (x.movedim(1, -1).movedim(1 + axis, -2) for x in (q, k))
        line = scale * torch.einsum("...id,...jd->...ij", lines_q, lines_k)
        if axis != axes - 1:
            line = line + torch.diag(line.new_full((line.shape[-1],), -math.inf))
        energies.append(line.movedim(-2, 1 + axis))
    joint = torch.cat(energies, -1)
    weights = torch.softmax(joint, -1).split([e.shape[-1] for e in energies], -1)
    out = 0
    for axis, w in enumerate(weights):
        lines_v = v.movedim(1, -1).movedim(1 + axis, -2)
        out = out + torch.einsum("...ij,...jc->...ic", w.movedim(1 + axis, -2), lines_v).movedim(-2, 1 + axis)
    return out.movedim(-1, 1), torch.logsumexp(joint, -1)


class Problem(NamedTuple):
    """q, k, v in three layouts, the gradients of out and lse, and the scale."""

    tensors: tuple[Tensor, Tensor, Tensor]
    dout: Tensor
    dlse: Tensor
    scale: float
    layout: tuple[str, str, str] = ("contiguous",) * 3

    def on(self, device):
        """Return the problem on a device, in the same layouts, which a copy to another device does not keep."""
        tensors = tuple(layouts(x.to(device), kind) for x, kind in zip(self.tensors, self.layout, strict=True))
        return self._replace(tensors=tensors, dout=self.dout.to(device), dlse=self.dlse.to(device))


def layouts(x, layout):
    """Return x in another memory layout; "expanded" repeats its first values along the first spatial axis."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "reversed":  # strides grow from the first axis to the last
        return x.permute(*range(x.ndim - 1, -1, -1)).contiguous().permute(*range(x.ndim - 1, -1, -1))
    if layout == "sliced":  # every second channel of a wider map, an offset into it
        wide = x.new_full((x.shape[0], 2 * x.shape[1] + 1, *x.shape[2:]), math.nan)
        wide[:, 1::2] = x
        return wide[:, 1::2]
    if layout == "misaligned":  # channels_last, one element into its storage
        storage = x.new_full((x.numel() + 1,), math.nan)
        return storage[1:].view(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1).copy_(x)
    if layout == "expanded":
        return x[:, :, :1].expand_as(x)
    return x.contiguous()


@st.composite
def problems(draw, dtypes=DTYPES, maps=SIZES):
    sizes = draw(maps)
    batch, d, c = draw(st.sampled_from([1, 2, 3, 0])), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    dtype = draw(st.sampled_from(dtypes))
    small = dtype == torch.float16
    magnitude = draw(st.sampled_from([1.0, 1e-3, 8.0] if small else [1.0, 1e-30, 1e-3, 30.0, 1e4]))
    energy = draw(st.sampled_from([1.0, 1e-3, 30.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    q, k = (energy**0.5 * torch.randn(batch, d, *sizes, generator=generator, dtype=torch.float64) for _ in "qk")
    v, dout = (magnitude * torch.randn(batch, c, *sizes, generator=generator, dtype=torch.float64) for _ in "vd")
    dlse = torch.randn(batch, *sizes, generator=generator, dtype=torch.float64)
    layout = draw(st.tuples(*[st.sampled_from(["contiguous", "channels_last", "reversed", "sliced"])] * 3))
    tensors = tuple(layouts(x.to(dtype), kind) for x, kind in zip((q, k, v), layout, strict=True))
    dlse = dlse.to(energy_dtype(dtype))
    return Problem(tensors, dout.to(dtype), dlse, draw(st.sampled_from([1.0, 0.3, -2.0])), layout)


def run(function, tensors, dout, dlse):
    """Return out, lse, dq, dk, dv."""
    leaves = tuple(x.detach().requires_grad_() for x in tensors)
    out, lse = function(*leaves)
    return (out, lse, *torch.autograd.grad((out, lse), leaves, (dout, dlse.to(lse.dtype))))


def expected(problem):
    """Return out, lse, dq, dk, dv by the NumPy reference in float64."""
    tensors, dout, dlse, scale = problem[:4]
    arrays = [x.detach().double().numpy() for x in tensors]
    out, lse = reference.forward(*arrays, scale)
    gradients = reference.backward(dout.double().numpy(), *arrays, out, lse, dlse.double().numpy(), scale)
    return tuple(torch.from_numpy(x) for x in (out, lse, *gradients))


def check_compiled_once(block, inputs):
    """Raise unless `block` compiles as one graph for maps of all sizes, with the gradients of the uncompiled block.

    `inputs(sizes)` returns the arguments of block, leaves; block returns a number.
    """
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    for sizes in [(6, 5), (8, 7), (5, 9), (11, 6)]:  # unlike B, D and C, which torch would take for the same symbol
        ours, plain = inputs(sizes), inputs(sizes)
        compiled(*ours).backward()
        block(*plain).backward()
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    assert counter.frame_count == 1


def largest(x):
    return float(x.detach().double().abs().max()) if x.numel() else 0.0


def row_of(problem, backend, dtype=None):
    """Return the problem's row in the table of errors; `dtype` names the arithmetic if the dtype does not."""
    q = problem.tensors[0]
    on = "" if q.device.type == "cpu" else ", on the GPU"
    return Row(backend + on, name_of(q.dtype) if dtype is None else dtype, q.ndim - 2)


def check_errors(ours, theirs, truth, problem, unit=None, row=None):
    """Raise unless ours are as near to the truth as theirs, but for what the dtype costs anybody.

    `unit` is the relative rounding of every factor where it is not the dtype's: in TF32. `row` is where the errors are
    recorded, before they are judged.
    """
    tensors, dout, dlse, scale = problem[:4]
    q, k, v = (largest(x) for x in tensors)
    factors_rounded = unit is not None
    wide = EPSILON[energy_dtype(tensors[0].dtype)] if unit is None else unit
    unit = EPSILON[tensors[0].dtype] if unit is None else unit
    # What nobody can avoid: an energy is rounded in proportion to its terms, and weights recomputed from lse by as much
    # again; out is an average of values, which may cancel; dE = w (dout . v - delta + dlse) is rounded in proportion to
    # the terms that cancel in it, and delta = dout . out has the rounding of the saved out.
    absolute = [x.detach().double().abs().flatten(2) for x in tensors[:2]]
    energy = abs(scale) * largest(torch.einsum("bdi,bdj->bij", *absolute))
    denergy = largest(dout) * v * tensors[2].shape[1] + largest(dlse)
    # dv sums weights exp(E - lse), and even without energies lse is the logarithm of the number of neighbours.
    neighbours = sum(tensors[0].shape[2:]) - len(tensors[0].shape[2:]) + 1
    cancelled = {
        "out": v * wide / unit,
        "lse": energy * wide / unit,
        "dq": abs(scale) * k * denergy,
        "dk": abs(scale) * q * denergy * sum(tensors[0].shape[2:]),
        "dv": math.log(neighbours) / 2 * largest(dout) * wide / unit,
    }
    if factors_rounded:  # by `unit`, unlike the formulation's: in proportion to the terms of a sum, not to the sum
        queries, keys, values = (x.detach().double() for x in tensors)
        leaves = queries, keys, values.abs()
        terms = run(lambda *x: plain(*x, scale), leaves, dout.double().abs(), torch.zeros_like(dlse))
        cancelled["out"] = largest(terms[0])
        cancelled["dv"] += largest(terms[4])
    units, failed = {}, []
    for (name, limit), a, b, t in zip(error_table.CCA.limits.items(), ours, theirs, truth, strict=True):
        a, b, t = (x.detach().cpu().double() for x in (a, b, t))
        error, plain_error = largest(a - t), largest(b - t)
        size = max(largest(t), largest(b))
        floor = unit * cancelled.get(name, 0.0) + (1 if name == "out" else 2) * wide * energy * size
        floor += 4 * (wide if name == "lse" else unit) * size + torch.finfo(tensors[0].dtype).tiny
        units[name] = in_units(error, plain_error, floor, limit)
        if units[name] > limit:
            failed.append(f"{name}: {error:.3g}, plain {plain_error:.3g}, floor {floor:.3g}")
    if row is not None:
        error_table.CCA.record(row, units)
    assert not failed, "; ".join(failed)


def attend(problem, backend=None):
    """Return out, lse, dq, dk, dv by one of our backends."""
    tensors, dout, dlse, scale = problem[:4]
    return run(lambda *x: ccgpu.cca(*x, scale=scale, return_lse=True, backend=backend), tensors, dout, dlse)


def attend_plainly(problem):
    """Return out, lse, dq, dk, dv by einsum, on the problem's device and in its dtype."""
    tensors, dout, dlse, scale = problem[:4]
    return run(lambda *x: plain(*x, scale), tensors, dout, dlse)


def truth_in_float64(problem):
    """Return out, lse, dq, dk, dv by einsum in float64, for maps too large for the reference's loops."""
    tensors, dout, dlse = tuple(x.double() for x in problem.tensors), problem.dout.double(), problem.dlse.double()
    return attend_plainly(Problem(tensors, dout, dlse, problem.scale))


def check_backend(backend, problem, device="cpu", unit=None, dtype=None):
    """Raise unless a backend's results are within the tolerance and have the documented dtypes and layouts."""
    there = problem.on(device)
    ours = attend(there, backend)
    check_errors(ours, attend_plainly(there), expected(problem), problem, unit, row_of(there, backend, dtype))
    check_form(ours, there)


def check_form(results, problem):
    """Raise unless out is like v, lse in the dtype of energies, and the gradients like q, k and v."""
    (out, lse, *gradients), tensors = results, problem.tensors
    assert out.dtype == tensors[2].dtype
    assert out.stride() == torch.empty_like(tensors[2]).stride()
    assert lse.dtype == energy_dtype(out.dtype)
    assert lse.is_contiguous()
    for gradient, x in zip(gradients, tensors, strict=True):
        assert gradient.dtype == x.dtype
        assert gradient.shape == x.shape
