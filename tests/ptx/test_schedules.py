"""Orders and cuts of the work, in executed PTX: none of them changes a bit of the results, and none can hang.

Parts of the channels are items of their own (`cuts`) or go through the image in turn (`passes`), images are staggered
(`lag`), and as few blocks as one are resident at a time.
"""

import pytest
import torch

from benchmarks import nvrtc
from ccgpu.bridges.cupy_cuda.attention import Kernels
from tests.kernels.cuda.test_kernels import DTYPE, attend, random_problem
from tests.ptx.problems import arithmetic_of, judge, launcher, same

try:
    nvrtc.version()
except nvrtc.NotInstalled as reason:
    pytest.skip(f"needs NVRTC: {reason}", allow_module_level=True)

pytestmark = [pytest.mark.nvrtc, pytest.mark.timeout(900)]
MAPS = [
    # arithmetic, generation, sizes, channels of v in five chunks, tiles that a block may hold
    pytest.param("bf16", 90, (2, 18), 5 * 64, None, id="two launches"),
    pytest.param("bf16", 80, (2, 2, 3), 5 * 64, None, id="three axes"),
    pytest.param("f16", 90, (33,), 5 * 64, (1,), id="segments"),
    pytest.param("tf32", 90, (2, 17), 5 * 32, (1,), id="two axes, segments"),
]


@pytest.mark.parametrize(("arithmetic", "generation", "sizes", "channels", "tiles"), MAPS)
def test_parts_of_the_channels_give_the_same_bits(arithmetic, generation, sizes, channels, tiles):
    problem = random_problem(DTYPE[arithmetic], 1, sizes, 8, channels)
    with arithmetic_of(arithmetic, tiles):
        whole = attend(problem, Kernels(launcher(generation, 0), cuts=1, passes=1))
        judge(whole, problem, arithmetic)
        for seed, (cuts, passes) in enumerate([(2, 1), (1, 2), (1, 4), (2, 2)]):
            on = launcher(generation, seed=seed, lockstep=seed % 2 == 0, resident=2 + seed)
            kernels = Kernels(on, cuts=cuts, passes=passes)
            assert same(kernels.forward(*problem.tensors, problem.scale), whole[:2]), (cuts, passes)
            assert {(launch.cuts, launch.passes) for launch in on.launched} == {(cuts, passes)}


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("resident", [1, 2, 3])
def test_few_resident_blocks_and_staggered_images_do_not_hang(lag, resident):
    """Blocks start in a random order and take their items by ticket, so none waits for one that has not started."""
    problem = random_problem(torch.bfloat16, 2, (2, 3), 8, 2 * 64)
    whole = attend(problem, Kernels(launcher(90), cuts=1, passes=1))
    on = launcher(90, seed=lag, resident=resident, lockstep=resident == 2)
    assert same(attend(problem, Kernels(on, lag=lag, cuts=1, passes=2)), whole)
    forward, backward = on.launched
    assert (forward.blocks, backward.blocks) == ((2 * 2 + lag) * 5, (2 + lag) * 5)


@pytest.mark.parametrize("scale", [0.0, -2.0])
@pytest.mark.parametrize(("arithmetic", "generation"), [("bf16", 90), ("tf32", 80)])
def test_scales_that_are_not_positive(arithmetic, generation, scale):
    problem = random_problem(DTYPE[arithmetic], 1, (2, 17), 8, 8, scale)
    with arithmetic_of(arithmetic):
        judge(attend(problem, Kernels(launcher(generation, lockstep=False))), problem, arithmetic)
