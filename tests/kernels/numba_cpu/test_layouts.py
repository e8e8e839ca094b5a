"""The CPU kernels on inputs and results in every memory layout."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ccgpu.kernels import reference
from ccgpu.kernels.numba_cpu import calls
from tests.ccgpu import stage_problems
from tests.ccgpu.problems import attend_plainly, check_errors, expected
from tests.error_table import VALUE_LIMIT
from tests.kernels.numba_cpu.problems import DTYPES, LAYOUTS, arrays_of, attend, problem_of, tensors_of

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32", "float16"])


def cells(channels=((16, 16),), results=False):
    """Return a test's parameters: every layout and dtype with the channels of q, k and v."""
    return [
        pytest.param(name, dtype, c, id=f"{name}-{str(dtype).removeprefix('torch.')}-{c}")
        for name in LAYOUTS
        for dtype in DTYPES
        for c in channels
        if not (results and name == "read-only")
    ]


@pytest.mark.parametrize("sizes", [(9,), (5, 7), (7, 1), (2, 3, 4)], ids=str)
@pytest.mark.parametrize(("layout", "dtype", "channels"), cells(((16, 32), (3, 5), (1, 1))))
def test_pair_in_every_layout(layout, dtype, sizes, channels):
    problem = problem_of(sizes, dtype, d=channels[0], c=channels[1])
    arrays = [LAYOUTS[layout](x) for x in arrays_of(problem)]
    before = [x.tobytes() for x in arrays]
    out, lse = calls.forward(*arrays[:3], problem.scale, threads=2)
    # The results of forward are passed to backward in the layout as well, as a framework might do.
    saved = LAYOUTS[layout](out), LAYOUTS[layout](lse)
    q, k, v, dout, dlse = arrays
    gradients = calls.backward(dout, q, k, v, *saved, dlse, problem.scale, threads=2)
    check_errors(tensors_of([out, lse, *gradients]), attend_plainly(problem), expected(problem), problem)
    assert [x.tobytes() for x in arrays] == before
    for result, like in zip((out, *gradients), (v, q, k, v), strict=True):
        assert result.dtype == like.dtype
        assert result.strides == np.empty_like(like).strides


@pytest.mark.parametrize(("layout", "dtype", "channels"), cells(((16, 16), (3, 5)), results=True))
def test_results_fill_the_arrays_that_are_given(layout, dtype, channels):
    """The arrays are full of NaN before; memory between the elements of a result does not change."""
    problem = problem_of((5, 7), dtype, d=channels[0], c=channels[1])
    q, k, v, dout, dlse = arrays_of(problem)
    targets = [LAYOUTS[layout](np.full_like(x, np.nan)) for x in (v, q, k, v)]
    out, lse = calls.forward(q, k, v, problem.scale, out=targets[0], threads=2)
    gradients = calls.backward(dout, q, k, v, out, lse, dlse, problem.scale, gradients=tuple(targets[1:]))
    assert all(a is b for a, b in zip((out, *gradients), targets, strict=True))
    check_errors(tensors_of([out, lse, *gradients]), attend_plainly(problem), expected(problem), problem)
    if layout == "sliced":
        for target in targets:
            assert np.isnan(target.base[:, ::2]).all()


@pytest.mark.parametrize(("layout", "dtype", "channels"), cells(((16, 16), (3, 5))))
def test_stages_in_every_layout(layout, dtype, channels):
    for sizes in ((9,), (5, 7), (2, 3, 4)):
        d, c = channels
        q, k, v, weights = (x.detach() for x in stage_problems.inputs(sizes, dtype, d=d, c=c))
        x = torch.zeros_like(v).requires_grad_()
        (transposed,) = torch.autograd.grad(stage_problems.plain_aggregate(weights, x), x, v)
        a, b, c, w = (LAYOUTS[layout](x.numpy()) for x in (q, k, v, weights))
        before = [x.tobytes() for x in (a, b, c, w)]
        wide = np.float64 if dtype == torch.float64 else np.float32
        energies = np.full((2, *sizes, weights.shape[1]), np.nan, wide)
        target = LAYOUTS["contiguous" if layout == "read-only" else layout](np.full(v.shape, np.nan, v.numpy().dtype))
        calls.affinity(a, b, out=energies)
        assert calls.aggregate(w, c, out=target) is target
        checks = {
            "affinity": (np.moveaxis(energies, -1, 1), stage_problems.plain_affinity(q, k), (q, k)),
            "aggregate": (target, stage_problems.plain_aggregate(weights, v), (weights, v)),
            "aggregate_transposed": (calls.aggregate_transposed(w, c), transposed, (weights, v)),
        }
        for name, (ours, plain, arguments) in checks.items():
            (tensor,) = tensors_of([ours])
            units = stage_problems.units_of(tensor, plain, VALUE_LIMIT, getattr(reference, name), *arguments)
            assert units <= VALUE_LIMIT, f"{name}: {units:.3g} units"
        assert [x.tobytes() for x in (a, b, c, w)] == before


@every_dtype
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
@pytest.mark.parametrize("order", ["contiguous", "channels last"])
def test_inputs_that_repeat_along_an_axis(dtype, axis, order):
    """An axis of stride 0 repeats one image, channel, row or column."""
    problem = problem_of((5, 7), dtype, d=16, c=16)
    one = tuple(slice(1) if a == axis else slice(None) for a in range(4))
    arrays = [np.broadcast_to(LAYOUTS[order](x)[one], x.shape) for x in arrays_of(problem)[:4]]
    repeated = problem._replace(tensors=tuple(tensors_of(arrays[:3])), dout=tensors_of(arrays[3:])[0])
    ours = attend(*arrays, problem.dlse.numpy(), problem.scale)
    check_errors(tensors_of(ours), attend_plainly(repeated), expected(repeated), repeated)


ROOT = Path(__file__).resolve().parents[3]
FENCED = """
import ctypes, itertools, mmap
import numpy as np
from ccgpu.kernels.numba_cpu import calls

libc, alive, PAGE = ctypes.CDLL(None, use_errno=True), [], mmap.PAGESIZE
rooms = itertools.cycle(["at the end", "at the start"])

def fenced(x, order):
    # A copy of x between two pages that may not be accessed, adjacent to one of them.
    plain = np.moveaxis(x, 1, -1) if order == "channels last" else x
    pages = -(-x.nbytes // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    everything = np.frombuffer(memory, np.uint8)
    alive.append((memory, everything))
    for fence in (0, pages + 1):
        address = ctypes.c_void_p(everything.ctypes.data + fence * PAGE)
        assert libc.mprotect(address, ctypes.c_size_t(PAGE), 0) == 0
    start = (pages + 1) * PAGE - x.nbytes if next(rooms) == "at the end" else PAGE
    view = everything[start : start + x.nbytes].view(x.dtype).reshape(plain.shape)
    view[...] = plain
    return np.moveaxis(view, -1, 1) if order == "channels last" else view

generator = np.random.default_rng(0)
dtypes, orders = (np.float16, np.float32, np.float64), ("contiguous", "channels last")
for dtype, order, sizes, c, first in itertools.product(
    dtypes, orders, ((7,), (5, 19), (2, 3, 4)), (1, 5, 16), range(2)
):
    if first:
        next(rooms)  # in the second round each array is at its other end
    of = lambda *shape: generator.standard_normal(shape).astype(dtype)
    q, k, v, dout = (fenced(of(2, n, *sizes), order) for n in (c, c, c + 16, c + 16))
    targets = [fenced(x, order) for x in (v, q, k, v)]
    out, lse = calls.forward(q, k, v, out=targets[0])
    calls.backward(dout, q, k, v, out, lse, lse, gradients=tuple(targets[1:]))
    weights = calls.affinity(q, k)
    calls.aggregate(weights, v, out=targets[0])
    calls.aggregate_transposed(weights, v, out=targets[0])
print("done")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are protected with Linux's mprotect")
def test_nothing_beside_the_arrays_is_read_or_written():
    """The arrays lie between protected pages, in a process of their own, which an access beyond them would kill."""
    answer = subprocess.run(
        [sys.executable, "-c", FENCED], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert (answer.returncode, answer.stdout.strip()) == (0, "done"), answer.stderr
