"""The CUDA kernels stay within bounds that their machine code and the model of L2 must hold on an H100.

Largest is the greatest of the times of `benchmarks.limits.times`; no time here is measured.
"""

from functools import cache

import pytest

from benchmarks import nvrtc
from benchmarks.counts import CHANNELS, DEPTH, IMAGES, N
from benchmarks.limits import table
from benchmarks.limits.gpus import H100
from benchmarks.limits.issue import compile_kernel
from benchmarks.limits.l2 import bytes_between_phases
from benchmarks.limits.times import parts_of
from ccgpu.kernels.cuda.plans import plan

try:
    nvrtc.version()
except nvrtc.NotInstalled as reason:
    pytest.skip(f"needs NVRTC: {reason}", allow_module_level=True)

pytestmark = [pytest.mark.nvrtc, pytest.mark.timeout(1800)]

DRAM = {"forward": 1.15, "backward": 1.25}  # bytes over the least
ISSUE = {"forward": 35, "backward": 50}  # us
LARGEST = {"forward": 80, "backward": 135}  # us
# TF32 moves twice the bytes. Forward goes through an image in two passes, so that L2 is the limit; backward is below.
LARGEST_TF32 = 175  # us, forward
LARGE_MAPS = [sizes for sizes in table.MAPS if sizes != (N, N)]
FEW = 2  # images of a large map: DRAM over the least differs by less than 2 % from that of a batch of 8
# Bytes of DRAM over those of a cache that keeps all it can from phase to phase. A map that is larger than the cache is
# read again in each phase, and a cache that drops the least recently used line keeps less of it than it could.
LARGE = {
    ("forward", (129, 257)): 1.45,
    ("forward", (256, 256)): 1.25,
    ("backward", (129, 257)): 1.65,
    ("backward", (256, 256)): 1.25,
}
# DRAM over the least. Of forward, 1.15 would take four passes and eight; see the test of passes.
LARGE_RATIO = {
    ("forward", (129, 257)): 1.65,
    ("forward", (256, 256)): 2.0,
    ("backward", (129, 257)): 5.2,
    ("backward", (256, 256)): 4.1,
}


@cache
def limits(kernel, arithmetic):
    return table.limits_of(kernel, arithmetic)


@cache
def traffic(kernel, sizes, passes=None):
    launches = table.launches_of(H100, kernel, FEW, sizes, passes=passes)
    return launches, table.traffic_of(H100, launches)


@pytest.mark.parametrize("arithmetic", ["bf16", "f16"])
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_limits_of_the_hot_case(kernel, arithmetic):
    x = limits(kernel, arithmetic)
    assert x.dram_mb <= DRAM[kernel] * x.least_mb
    assert x.issue_us <= ISSUE[kernel]
    assert x.largest <= LARGEST[kernel]


def test_limits_of_tf32_forward():
    x = limits("forward", "tf32")
    assert x.dram_mb <= DRAM["forward"] * x.least_mb
    assert x.largest <= LARGEST_TF32


def test_limits_of_tf32_backward():
    """An image of float32 tensors takes 87 MB, more than twice what L2 holds.

    So the second phase must read again what the cache cannot keep of v, dout and dv, and DRAM is the limit.
    """
    x = limits("backward", "tf32")
    (launch,) = plan("backward", "tf32", IMAGES, (N, N), DEPTH, CHANNELS, H100.limits)
    assert x.dram_mb <= 1.15 * (x.least_mb + bytes_between_phases(launch, H100.l2_bytes) / 1e6)
    assert x.largest == x.dram_us


@pytest.mark.parametrize("sizes", LARGE_MAPS)
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_dram_of_large_maps(kernel, sizes):
    (launch,), x = traffic(kernel, sizes)
    assert x.ratio <= LARGE_RATIO[kernel, sizes]
    assert x.dram <= LARGE[kernel, sizes] * (x.least + bytes_between_phases(launch, H100.l2_bytes))


@pytest.mark.parametrize("sizes", [*LARGE_MAPS, (129, 129), (161, 161)])
def test_passes_are_those_with_the_least_time(sizes):
    """More passes move fewer bytes of DRAM, but form the energies again, and ask more of L2."""
    (chosen,) = {launch.passes for launch in traffic("forward", sizes)[0]}
    found = {passes: traffic("forward", sizes, passes) for passes in table.PASSES}
    assert min(found, key=lambda passes: parts_of(*found[passes]).largest) == chosen
    assert chosen == 1 or found[4][1].ratio < found[2][1].ratio < found[1][1].ratio


@pytest.mark.parametrize(("kernel", "arithmetic"), table.HOT)
def test_no_local_memory_and_no_read_only_loads(kernel, arithmetic):
    """Blocks of one launch read what others write, which `ld.global.nc` may miss."""
    for launch in plan(kernel, arithmetic, IMAGES, (N, N), DEPTH, CHANNELS, H100.limits):
        compiled = compile_kernel(launch.configuration, H100.target)
        assert (compiled.stack_bytes, compiled.spill_bytes, compiled.local_accesses) == (0, 0, 0)
        assert compiled.constant_loads == 0
