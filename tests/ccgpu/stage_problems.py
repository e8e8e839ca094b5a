"""Test problems for affinity and aggregate and the tolerance of their results, for tests on every device.

Tolerance: the error is at most 2 times (values) or 3 times (gradients) that of the plain einsum formulation in the same
dtype, plus a floor, element by element, of a few units in the last place of the sum of the terms' magnitudes.
tests/error_table.py collects the backends' errors.
"""

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

import ccgpu
from ccgpu.kernels import reference
from ccgpu.layouts import energy_dtype
from tests import error_table
from tests.ccgpu.problems import DTYPES, EPSILON, SIZES, layouts, name_of
from tests.error_table import GRADIENT_LIMIT, VALUE_LIMIT, Row, in_units


def criss_cross(sizes):
    """Return the number of positions in a criss-cross."""
    return sum(sizes) - len(sizes) + 1


def transposed(weights, x, backend=None):
    return torch.ops.ccgpu.aggregate_transposed(weights, x, backend)


def inputs(sizes, dtype=torch.float64, batch=2, d=3, c=4, grad=True):
    """Return q, k, v and weights."""
    generator = torch.Generator().manual_seed(len(sizes))
    tensors = (
        torch.randn(batch, n, *sizes, generator=generator, dtype=torch.float64) for n in (d, d, c, criss_cross(sizes))
    )
    return tuple(x.to(dtype).requires_grad_(grad) for x in tensors)


def staged(q, k, v, scale=1.0):
    return ccgpu.aggregate(ccgpu.affinity(scale * q, k).softmax(1), v)


def plain_affinity(q, k):
    """Return energies by einsum, every step in the dtype of the inputs."""
    axes, energies = q.ndim - 2, []
    for axis in range(axes):
        lines_q, lines_k = (x.movedim(1, -1).movedim(1 + axis, -2) for x in (q, k))
        line = torch.einsum("...id,...jd->...ij", lines_q, lines_k)
        n = line.shape[-1]
        if axis != axes - 1:
            line = line[..., ~torch.eye(n, dtype=torch.bool, device=lines_q.device)].unflatten(-1, (n, n - 1))
        energies.append(line.movedim(-2, 1 + axis))
    return torch.cat(energies, -1).movedim(-1, 1)


def plain_aggregate(weights, v):
    """Return weighted sums by einsum, every step in v's dtype."""
    sizes = v.shape[2:]
    parts = weights.to(v.dtype).movedim(1, -1).split([*(n - 1 for n in sizes[:-1]), sizes[-1]], -1)
    out = 0
    for axis, (n, part) in enumerate(zip(sizes, parts, strict=True)):
        lines_w, lines_v = part.movedim(1 + axis, -2), v.movedim(1, -1).movedim(1 + axis, -2)
        if axis != len(sizes) - 1:
            full = lines_w.new_zeros((*lines_w.shape[:-1], n))
            full[..., ~torch.eye(n, dtype=torch.bool, device=lines_w.device)] = lines_w.flatten(-2)
            lines_w = full
        out = out + torch.einsum("...ij,...jc->...ic", lines_w, lines_v).movedim(-2, 1 + axis)
    return out.movedim(-1, 1)


class Problem(NamedTuple):
    """Two maps with the same channels, and weights (or gradients of energies) in the maps' dtype or the energies'."""

    maps: tuple[Tensor, Tensor]
    weights: Tensor
    layout: tuple[str, str, str]

    def on(self, device):
        """Return the problem on a device, in the same layouts, which a copy to another device does not keep."""
        a, b, weights = (
            layouts(x.to(device), kind) for x, kind in zip((*self.maps, self.weights), self.layout, strict=True)
        )
        return self._replace(maps=(a, b), weights=weights)


@st.composite
def problems(draw, dtypes=DTYPES, maps=SIZES):
    sizes, dtype = draw(maps), draw(st.sampled_from(dtypes))
    batch, channels = draw(st.sampled_from([1, 2, 3, 0])), draw(st.integers(1, 9))
    magnitudes = [1.0, 1e-2, 8.0] if dtype == torch.float16 else [1.0, 1e-10, 30.0, 1e4]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    wide = energy_dtype(dtype) if draw(st.booleans()) else dtype
    shapes = [(batch, channels, *sizes)] * 2 + [(batch, criss_cross(sizes), *sizes)]
    a, b, weights = (
        (draw(st.sampled_from(magnitudes)) * torch.randn(shape, generator=generator, dtype=torch.float64)).to(kind)
        for shape, kind in zip(shapes, (dtype, dtype, wide), strict=True)
    )
    layout = draw(st.tuples(*[st.sampled_from(["contiguous", "channels_last", "reversed", "sliced"])] * 3))
    return Problem((a, b), weights, layout).on("cpu")


def numpy(*tensors):
    return [x.detach().double().cpu().numpy() for x in tensors]


def units_of(ours, plain, limit, function, *arguments):
    """Return the largest error of ours against the reference `function` of the tensors `arguments`, in units."""
    arrays = numpy(*arguments)
    truth, scale = function(*arrays), function(*(np.abs(a) for a in arrays))
    assert ours.shape == truth.shape
    error, plain_error = (np.abs(x.detach().double().cpu().numpy() - truth) for x in (ours, plain))
    floor = 4 * EPSILON[ours.dtype] * scale + torch.finfo(ours.dtype).tiny
    if ours.dtype == torch.float16:
        floor += 2.0**-24  # its subnormal numbers
    return in_units(error, plain_error.max(initial=0.0), floor, limit)


def record(backend, x, stage, value, gradients):
    """Record a stage's errors in units, then raise unless they are within the limits."""
    units = {stage: value, f"d {stage}": max(gradients.values())}
    error_table.STAGES.record(Row(backend, name_of(x.dtype), x.ndim - 2), units)
    assert value <= VALUE_LIMIT, f"{stage}: {value:.3g} units"
    for name, number in gradients.items():
        assert number <= GRADIENT_LIMIT, f"{name}: {number:.3g} units"


def check_affinity(backend, problem):
    (q, k), denergies, _ = problem
    denergies = denergies.to(energy_dtype(q.dtype))
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    energies = ccgpu.affinity(q, k, backend=backend)
    assert energies.dtype == energy_dtype(q.dtype)
    assert energies.movedim(1, -1).is_contiguous()
    plain = plain_affinity(q, k)
    value = units_of(energies, plain, VALUE_LIMIT, reference.affinity, q, k)
    dq, dk = torch.autograd.grad(energies, (q, k), denergies)
    plain_dq, plain_dk = torch.autograd.grad(plain, (q, k), denergies.to(plain.dtype))
    assert dq.dtype == dk.dtype == q.dtype
    gradients = {
        "dq": units_of(dq, plain_dq, GRADIENT_LIMIT, reference.aggregate, denergies, k),
        "dk": units_of(dk, plain_dk, GRADIENT_LIMIT, reference.aggregate_transposed, denergies, q),
    }
    record(backend, q, "affinity", value, gradients)


def check_aggregate(backend, problem):
    (v, dout), weights, _ = problem
    v, weights = v.detach().requires_grad_(), weights.detach().requires_grad_()
    out = ccgpu.aggregate(weights, v, backend=backend)
    assert out.dtype == v.dtype
    assert out.stride() == torch.empty_like(v).stride()
    plain = plain_aggregate(weights, v)
    value = units_of(out, plain, VALUE_LIMIT, reference.aggregate, weights, v)
    dweights, dv = torch.autograd.grad(out, (weights, v), dout)
    plain_dweights, plain_dv = torch.autograd.grad(plain, (weights, v), dout)
    assert dweights.dtype == weights.dtype
    assert dv.dtype == v.dtype
    gradients = {
        "dweights": units_of(dweights, plain_dweights, GRADIENT_LIMIT, reference.affinity, dout, v),
        "dv": units_of(dv, plain_dv, GRADIENT_LIMIT, reference.aggregate_transposed, weights, dout),
    }
    record(backend, v, "aggregate", value, gradients)


def check_transposed(backend, problem):
    (x, dy), weights, _ = problem
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    y = transposed(weights, x, backend)
    assert y.dtype == x.dtype
    assert y.stride() == torch.empty_like(x).stride()
    v = torch.zeros_like(x).requires_grad_()
    (plain,) = torch.autograd.grad(plain_aggregate(weights, v), v, x, create_graph=True)
    value = units_of(y, plain, VALUE_LIMIT, reference.aggregate_transposed, weights, x)
    dweights, dx = torch.autograd.grad(y, (weights, x), dy)
    plain_dweights, plain_dx = torch.autograd.grad(plain, (weights, x), dy)
    assert dweights.dtype == weights.dtype
    gradients = {
        "dweights": units_of(dweights, plain_dweights, GRADIENT_LIMIT, reference.affinity, x, dy),
        "dx": units_of(dx, plain_dx, GRADIENT_LIMIT, reference.aggregate, weights, dy),
    }
    record(backend, x, "transposed", value, gradients)


CHECKS = {"affinity": check_affinity, "aggregate": check_aggregate, "transposed": check_transposed}
