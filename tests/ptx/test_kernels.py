"""The PTX of every kernel in every arithmetic, executed on small maps, against the NumPy reference.

Each case is compiled for one generation of GPUs; together they cover compute capability 7.5 to 10.0, one to three axes,
channels that are padded, lines of one tile and of several, lines in segments, cut channels, and blocks that take turns
warp by warp or as a whole, in several random orders.
"""

import numpy as np
import pytest
import torch

from benchmarks import nvrtc
from ccgpu.bridges.cupy_cuda.attention import Kernels
from ccgpu.bridges.cupy_cuda.stages import Stages
from ccgpu.kernels import reference
from ccgpu.layouts import energy_dtype
from tests.ccgpu.stage_problems import criss_cross
from tests.kernels.cuda.test_kernels import DTYPE, TF32_UNIT, attend, random_problem
from tests.ptx.problems import arithmetic_of, check, judge, launcher, same

try:
    nvrtc.version()
except nvrtc.NotInstalled as reason:
    pytest.skip(f"needs NVRTC: {reason}", allow_module_level=True)

pytestmark = [pytest.mark.nvrtc, pytest.mark.timeout(900)]
WARPS = {"lockstep": False, "resident": 4}
CASES = [
    # arithmetic, generation, batch, sizes, channels of q and k, of v, tiles that a block may hold, options
    ("bf16", 80, 2, (17,), 8, 24, None, WARPS),
    ("bf16", 90, 2, (5, 6), 8, 24, None, {}),
    ("bf16", 90, 1, (3, 33), 5, 72, (1,), {"seed": 1}),
    ("bf16", 90, 1, (2, 50), 16, 200, None, {"seed": 2, "multiprocessors": 0}),
    ("bf16", 100, 1, (2, 2, 17), 16, 65, None, WARPS),
    ("bf16", 80, 1, (75,), 8, 24, None, WARPS),
    ("f16", 80, 1, (4, 18), 8, 24, None, {"seed": 3}),
    ("f16", 90, 1, (33,), 3, 8, (1,), WARPS),
    ("f16", 100, 1, (2, 17), 16, 72, None, {}),
    ("tf32", 80, 1, (3, 20), 6, 30, None, WARPS),
    ("tf32", 90, 1, (35,), 16, 40, (1,), {"seed": 4}),
    ("tf32", 100, 1, (2, 2, 17), 8, 12, None, {}),
    ("f32", 75, 1, (2, 18), 8, 12, None, WARPS),
    ("f32", 90, 1, (33,), 3, 24, (1,), {"seed": 5}),
    ("f64", 75, 1, (17,), 2, 6, (1,), WARPS),
    ("f64", 90, 1, (2, 17), 3, 6, None, {}),
    ("bf16_fma", 75, 1, (2, 17), 8, 24, None, WARPS),
    ("f16_fma", 75, 1, (2, 2, 5), 8, 24, None, {"seed": 6}),
    ("f16_fma", 75, 1, (18,), 8, 8, (1,), {}),
]


@pytest.mark.parametrize(
    ("arithmetic", "generation", "batch", "sizes", "depth", "channels", "tiles", "options"),
    [pytest.param(*case, id=f"{case[0]}-{case[1]}-{'x'.join(map(str, case[3]))}") for case in CASES],
)
def test_kernels_match_reference(arithmetic, generation, batch, sizes, depth, channels, tiles, options):
    problem = random_problem(DTYPE[arithmetic], batch, sizes, depth, channels, 0.5, energy=4.0)
    check(problem, arithmetic, launcher(generation, **options), tiles)


@pytest.mark.parametrize(
    ("arithmetic", "generation", "sizes", "tiles"),
    [
        ("bf16", 80, (3, 18), None),
        ("bf16", 90, (17,), (1,)),
        ("bf16", 100, (75,), None),
        ("f16", 80, (97,), None),
        ("f16", 90, (2, 2, 3), None),
        ("tf32", 90, (2, 18), None),
        ("f32", 75, (17,), (1,)),
        ("f64", 90, (2, 3), None),
        ("bf16_fma", 75, (2, 5), None),
        ("f16_fma", 75, (6,), None),
    ],
)
def test_stages_match_reference(arithmetic, generation, sizes, tiles):
    dtype = DTYPE[arithmetic]
    q, k, v = random_problem(dtype, 1, sizes, 5, 20).tensors
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(1, criss_cross(sizes), *sizes, generator=generator, dtype=torch.float64)
    weights = weights.to(energy_dtype(dtype))
    on = launcher(generation, lockstep=False)
    stages = Stages(on)
    with arithmetic_of(arithmetic, tiles):
        ours = stages.affinity(q, k), stages.aggregate(weights, v), stages.aggregate_transposed(weights, v)
    assert {launch.configuration.arithmetic for launch in on.launched} == {arithmetic}
    unit = TF32_UNIT if arithmetic == "tf32" else torch.finfo(dtype).eps
    exact = [x.double().numpy() for x in (q, k, v, weights)]
    for name, x in zip(("affinity", "aggregate", "aggregate_transposed"), ours, strict=True):
        function = getattr(reference, name)
        arguments = exact[:2] if name == "affinity" else (exact[3], exact[2])
        bound = 4 * unit * function(*(abs(a) for a in arguments)) + torch.finfo(dtype).tiny
        assert np.all(np.abs(x.double().numpy() - function(*arguments)) <= bound), name


@pytest.mark.parametrize(("arithmetic", "generation"), [("bf16", 90), ("tf32", 80), ("f32", 90)])
def test_results_do_not_depend_on_the_order(arithmetic, generation):
    """Blocks take turns in any order, whole or warp by warp; results are the same to the bit."""
    problem = random_problem(DTYPE[arithmetic], 2, (2, 17), 8, 24)
    with arithmetic_of(arithmetic):
        first = attend(problem, Kernels(launcher(generation)))
        for seed in (1, 2):
            options = {"seed": seed, "resident": 2 + 3 * seed, "lockstep": seed == 1}
            assert same(first, attend(problem, Kernels(launcher(generation, **options))))
    judge(first, problem, arithmetic)


@pytest.mark.parametrize(("arithmetic", "generation"), [("bf16", 90), ("tf32", 90), ("f32", 75), ("f64", 80)])
def test_large_energies_and_none(arithmetic, generation):
    """Equal values come out unchanged however large the energies; without any weight lse is -inf and out NaN."""
    dtype = DTYPE[arithmetic]
    problem = random_problem(dtype, 1, (3, 13), 8, 8, energy=2000.0)
    q, k, _ = problem.tensors
    values = torch.full((1, 8, 3, 13), 1.5, dtype=dtype)
    with arithmetic_of(arithmetic):
        kernels = Kernels(launcher(generation))
        out, lse = kernels.forward(q, k, values, 1.0)
        empty, nothing = kernels.forward(torch.ones_like(q), torch.full_like(k, -torch.inf), values, 1.0)
    assert float(lse.max()) > 1000
    unit = TF32_UNIT if arithmetic == "tf32" else torch.finfo(dtype).eps
    torch.testing.assert_close(out, values, rtol=6 * unit, atol=0.0)
    assert bool(empty.isnan().all())
    assert bool((nothing == -torch.inf).all())


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_stay_on_their_lines(which, bad):
    """A NaN or infinity reaches the positions that attend to it, as in the reference, and no others."""
    problem = random_problem(torch.bfloat16, 1, (2, 19), 8, 8)
    problem.tensors[which][0, 2, 1, 17] = bad
    out, lse = Kernels(launcher(90)).forward(*problem.tensors, 1.0)
    truth = reference.forward(*(x.double().numpy() for x in problem.tensors), 1.0)
    for a, b, tolerance in ((out, truth[0], 0.05), (lse, truth[1], 1e-3)):
        np.testing.assert_allclose(a.double().numpy(), b, rtol=tolerance, atol=tolerance)
