"""The items of the model are those of schedule.cuh, which runs on the CPU here."""

import numpy as np
import pytest

from benchmarks.limits.schedule import Items, items_of, schedule_of
from benchmarks.registers import GPUS
from ccgpu.kernels.cuda.configurations import FOLDER
from ccgpu.kernels.cuda.plans import Pointers, plan

KERNEL = """
extern "C" __global__ void items(const __grid_constant__ Arguments a) {
  const Item x = item_of(a, blockIdx.x);
  const int row[] = {%s};
  for (int i = 0; i < %d; i++)
    store_global<int>((int *)a.out + blockIdx.x * %d + i, row[i]);
}
"""
CALLS = [
    ("forward", 3, (97, 97), 0, 1, 1),
    ("forward", 3, (97, 97), 1, 2, 2),
    ("forward", 3, (97, 97), 0, 1, 4),
    ("forward", 4, (20, 33), 2, 4, 2),
    ("forward", 2, (300, 40), 0, 1, 2),  # two launches
    ("forward", 2, (129, 257), 0, None, None),  # passes, as an H100 has them
    ("forward", 2, (5, 6, 7), 1, 2, 1),
    ("backward", 2, (140, 129), 0, None, None),  # two segments a line
    ("backward", 3, (5, 300, 4), 1, None, None),
]
C_NAMES = {"pass_number": "pass"}  # of fields of Item that Python does not take


@pytest.fixture(scope="module")
def look_up(cuda_on_cpu):
    """A function that returns the items that schedule.cuh gives a launch's tickets."""
    headers = "".join((FOLDER / name).read_text() for name in ("schedule.cuh",))
    lines = [line for line in headers.splitlines() if not line.startswith(("#pragma once", "#include"))]
    fields = Items._fields
    body = KERNEL % (", ".join(f"(int)x.{C_NAMES.get(name, name)}" for name in fields), len(fields), len(fields))
    library = cuda_on_cpu.compile("\n".join(['#include "primitives.cuh"', *lines, body]), ["items"])

    def items(launch):
        out = np.zeros((launch.blocks, len(fields)), np.int32)
        arguments = launch.arguments(Pointers(out=out.ctypes.data), 0)
        library.launch("items", launch.blocks, 1, arguments, 0, [("out", out, True)])
        return Items(*out.T)

    return items


@pytest.mark.parametrize(("kernel", "images", "sizes", "lag", "cuts", "passes"), CALLS)
def test_items_are_those_of_the_kernels(look_up, kernel, images, sizes, lag, cuts, passes):
    for launch in plan(kernel, "bf16", images, sizes, 64, 512, GPUS["sm_90"], lag, cuts, passes):
        mine, theirs = items_of(launch), look_up(launch)
        assert np.array_equal(mine.exists, theirs.exists)
        assert mine.exists.any()
        for name in Items._fields:
            some, others = getattr(mine, name)[mine.exists], getattr(theirs, name)[mine.exists]
            assert np.array_equal(some, others), name


def test_schedule_is_that_of_the_call():
    first, second = plan("forward", "bf16", 2, (300, 40), 64, 512, GPUS["sm_90"], lag=1, cuts=2, passes=4)
    a, b = schedule_of(first), schedule_of(second)
    assert (a.images, a.positions, a.depth, a.channels, a.lag, a.cuts, a.passes) == (2, 12000, 64, 512, 1, 2, 4)
    assert (a.axes[0].length, a.axes[0].lines, b.axes[0].length, b.axes[0].lines) == (300, 40, 40, 300)
    assert (a.before, b.after) == (0, 0)
    assert a.after == b.axes[0].segments
    assert b.before == a.axes[0].segments
