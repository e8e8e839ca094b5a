"""The CUDA kernels at the ends of their ranges: what is not finite, gradients of any size, arrays of nearly 64 GiB."""

import math

import numpy as np
import pytest
import torch

from ccgpu.bridges.cupy_cuda.attention import Kernels
from ccgpu.kernels.cuda import plans
from ccgpu.kernels.cuda.plans import Pointers
from tests.ccgpu.problems import expected
from tests.cuda_on_cpu.launcher import MachineLauncher
from tests.cuda_on_cpu.libraries import H100, build, limits
from tests.kernels.cuda.test_kernels import DTYPE, attend, check, random_problem, tf32  # noqa: F401

INF, NAN = math.inf, math.nan
NAMES = ("q", "k", "v", "dout", "dlse")


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("arithmetic", ["bf16", "tf32", "f32"])
@pytest.mark.parametrize(
    ("where", "bad"), [(name, bad) for name in NAMES for bad in (NAN, INF, -INF) if name != "dout" or bad is NAN]
)
def test_gradients_of_what_is_not_finite(cuda_on_cpu, arithmetic, where, bad):
    """NaN and infinities are where the reference has them, also in the last position before a line's padding.

    An infinite dout is left out: its row of dS is infinite in the kernels, NaN in the reference.
    """
    problem = random_problem(DTYPE[arithmetic], 1, (2, 19), 8, 8)
    for place in ((1, 18), (0, 0)):
        x = dict(zip(NAMES, (t.clone() for t in (*problem.tensors, problem.dout, problem.dlse)), strict=True))
        x[where][(0, *place) if where == "dlse" else (0, 2, *place)] = bad
        changed = problem._replace(tensors=(x["q"], x["k"], x["v"]), dout=x["dout"], dlse=x["dlse"])
        ours = attend(changed, Kernels(MachineLauncher(cuda_on_cpu, limits(arithmetic))))
        for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), ours, expected(changed), strict=True):
            assert torch.equal(a.isnan(), b.isnan()), name
            assert torch.equal(a.isposinf(), b.isposinf()), name
            assert torch.equal(a.isneginf(), b.isneginf()), name


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("arithmetic", ["bf16", "tf32", "f32"])
@pytest.mark.parametrize("magnitude", [1e30, 1e-30])
def test_gradients_of_any_size(cuda_on_cpu, arithmetic, magnitude):
    problem = random_problem(DTYPE[arithmetic], 1, (3, 33), 8, 24, energy=4.0)
    problem = problem._replace(dout=problem.dout * magnitude, dlse=problem.dlse * magnitude)
    check(problem, arithmetic, attend(problem, Kernels(MachineLauncher(cuda_on_cpu, limits(arithmetic)))))


# Offsets --------------------------------------------------------------------------------------------------------------

DEPTH = CHANNELS = 256
CHANNELS_OF = dict.fromkeys(("q", "k", "dq", "dk"), DEPTH)
CHANNELS_OF |= dict.fromkeys(("v", "out", "dout", "dv"), CHANNELS)
CHANNELS_OF |= dict.fromkeys(("lse", "dlse", "delta"), 1)
INPUTS = {"forward": ("q", "k", "v"), "backward": ("q", "k", "v", "out", "lse", "dout", "dlse")}
RESULTS = {"forward": ("out", "lse"), "backward": ("delta", "dq", "dk", "dv")}
MOST_POSITIONS = (64 * 2**30 - 1) // (4 * CHANNELS)


def results_at(machine, folder, kernel, images, sizes, positions, ticket, items):
    """Run items from a ticket on; return the results at `positions`. Only there the arrays, sparse files, have data."""
    (launch, *_) = plans.plan(kernel, "f32", images, sizes, DEPTH, CHANNELS, H100, cuts=1, passes=1)
    configuration, library = build(machine, launch.configuration)
    draw, arrays = np.random.default_rng(0), {}
    for name in (*INPUTS[kernel], *RESULTS[kernel]):
        shape = (images * math.prod(sizes), CHANNELS_OF[name])
        arrays[name] = np.memmap(folder / f"{images}-{name}", np.float32, "w+", shape=shape)
        if name in INPUTS[kernel]:
            arrays[name][list(positions)] = draw.standard_normal((len(positions), shape[1]))
    counters = np.zeros(launch.counters, np.int32)
    counters[0] = ticket
    bytes_of = {name: x.reshape(-1).view(np.uint8) for name, x in (arrays | {"counters": counters}).items()}
    library.launch(
        *(configuration.entry, items, configuration.threads),
        launch.arguments(Pointers(**{name: x.ctypes.data for name, x in arrays.items()}), counters.ctypes.data, 0.01),
        configuration.shared_bytes,
        [(name, x, name in (*RESULTS[kernel], "counters")) for name, x in bytes_of.items()],
        check_races=False,
    )
    return {name: arrays[name][list(positions)] for name in RESULTS[kernel]}


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_the_last_line_of_nearly_64_gib(cuda_on_cpu, tmp_path, kernel):
    """A line of five positions, 12 GiB apart, and the last image of many give the bits of small arrays."""
    side, line = math.isqrt(MOST_POSITIONS // 5), np.arange(1, 6)
    rows = side**2
    far = results_at(cuda_on_cpu, tmp_path, kernel, 1, (5, side, side), rows * line - 1, rows - 1, 1)
    near = results_at(cuda_on_cpu, tmp_path, kernel, 1, (5, 2, 2), 4 * line - 1, 3, 1)
    images = MOST_POSITIONS // 4
    last = results_at(cuda_on_cpu, tmp_path, kernel, images, (4,), range(4 * images - 4, 4 * images), images - 1, 1)
    first = results_at(cuda_on_cpu, tmp_path, kernel, 1, (4,), range(4), 0, 1)
    for name in RESULTS[kernel]:
        assert np.isfinite(near[name]).all(), name
        assert np.array_equal(far[name], near[name]), name
        assert np.isfinite(first[name]).all(), name
        assert np.array_equal(last[name], first[name]), name
