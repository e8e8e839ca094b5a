"""The hot configuration of CCNet, 97 positions, 64 channels of q and k, 512 of v: PTX executed on a few lines."""

import pytest

from benchmarks import nvrtc
from tests.kernels.cuda.test_kernels import DTYPE, random_problem
from tests.ptx.problems import check, launcher

try:
    nvrtc.version()
except nvrtc.NotInstalled as reason:
    pytest.skip(f"needs NVRTC: {reason}", allow_module_level=True)

pytestmark = [pytest.mark.nvrtc, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    ("arithmetic", "generation", "sizes"),
    [("bf16", 90, (1, 97)), ("bf16", 80, (97, 1)), ("tf32", 90, (1, 97)), ("f16", 100, (97,))],
)
@pytest.mark.parametrize("multiprocessors", [0, 132])
def test_hot_configuration(arithmetic, generation, sizes, multiprocessors):
    """Where no block would be idle an item has all channels; with 132 multiprocessors a part of them is an item."""
    if multiprocessors == 0 and generation != 90:
        pytest.skip("one generation is enough")
    problem = random_problem(DTYPE[arithmetic], 1, sizes, 64, 512, 0.25)
    on = launcher(generation, multiprocessors)
    check(problem, arithmetic, on)
    forward, backward = on.launched
    assert (forward.configuration.tiles, forward.configuration.depth) == (7, 64)
    assert backward.configuration.depth == 64
    assert (forward.cuts > 1) == (multiprocessors > 0)
