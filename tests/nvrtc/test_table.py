"""docs/results/kernels-registers.csv has the rows that the choice of kernels needs; no compiler is needed here."""

import math
import re
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import registers
from benchmarks.registers import GPUS, Resources, blocks_by_registers, blocks_by_shared, jobs, read_report, tabled
from ccgpu.kernels.cuda.configurations import KERNELS, arithmetic, why_not
from ccgpu.kernels.cuda.plans import plan

AGAIN = "the table is out of date: run `python -m benchmarks.registers --write`"
LOG = """kernels.cu(3): warning #177-D: variable "x" was declared but never referenced
ptxas info    : 98 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_90'
ptxas info    : Function properties for first
{}    32 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 165 registers, used 1 barriers, 32 bytes cumulative stack size
ptxas info    : Compiling entry function 'second' for 'sm_90'
ptxas info    : Function properties for second
{}    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 0 barriers
"""


def test_table_has_a_row_for_each_of_its_configurations():
    assert [(row.gpu, row.entry) for row in registers.read_table()] == [
        (job.gpu, job.configuration.entry) for job in tabled(jobs())
    ], AGAIN


def test_table_agrees_with_the_launches():
    chosen = {(job.gpu, job.configuration.entry): job.configuration for job in tabled(jobs())}
    for row in registers.read_table():
        configuration = chosen[row.gpu, row.entry]
        assert (row.threads, row.shared_bytes) == (configuration.threads, configuration.shared_bytes), AGAIN
        assert row.blocks_by_registers == blocks_by_registers(row.threads, row.registers)
        assert row.blocks_by_shared == blocks_by_shared(row.shared_bytes, GPUS[row.gpu])
        assert min(row.blocks_by_registers, row.blocks_by_shared) >= configuration.blocks


def test_table_has_no_spills_at_64_channels():
    """On sm_100, for which nothing was tuned, a few registers may wait in memory outside the loops."""
    rows = [row for row in registers.read_table() if re.search("_d64_", row.entry)]
    assert rows
    assert not [row for row in rows if (row.spill_stores or row.spill_loads) and row.gpu != "sm_100"]
    assert max(row.spill_stores for row in rows) <= 32


def test_table_comes_from_one_compiler():
    assert len({row.nvrtc for row in registers.read_table()}) == 1


@cache
def configurations(gpu, kernel):
    return {job.configuration for job in jobs([gpu], [kernel])}


@given(
    gpu=st.sampled_from(sorted(GPUS)),
    kernel=st.sampled_from(KERNELS),
    dtype=st.sampled_from(registers.DTYPES),
    tf32=st.booleans(),
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=3).filter(lambda n: math.prod(n) * 512 * 8 < 2**36),
    depth=st.integers(1, 32).map(lambda n: 8 * n),
)
def test_every_call_launches_configurations_that_are_compiled(gpu, kernel, dtype, tf32, sizes, depth):
    limits = GPUS[gpu]
    if why_not(dtype, depth, limits) is None:
        kind = arithmetic(dtype, limits.capability, tf32)
        launches = plan(kernel, kind, 1, tuple(sizes), depth, 512, limits)
        assert {launch.configuration for launch in launches} <= configurations(gpu, kernel)


@pytest.mark.parametrize("margin", ["   ", "ptxas         . "])
def test_report_is_read_kernel_by_kernel(margin):
    log = LOG.format(margin, margin)
    assert read_report(log, "first") == (165, 32, 4, 12)
    assert read_report(log, "second") == (24, 0, 0, 0)
    with pytest.raises(ValueError, match="must report on sec, got"):
        read_report(log, "sec")
    with pytest.raises(ValueError, match="must report on second, got"):
        read_report(log[: log.index("ptxas info    : Used 24")], "second")


def test_blocks_of_a_multiprocessor():
    # Warps that CUDA's occupancy calculator gives for compute capability 8.0 to 10.0, of 64.
    warps = {32: 64, 33: 48, 40: 48, 64: 32, 96: 20, 128: 16, 168: 12, 169: 8, 255: 8}
    assert {r: blocks_by_registers(32, r) for r in warps} == warps
    assert blocks_by_registers(128, 168) == 3
    assert blocks_by_registers(288, 168) == 1
    assert blocks_by_shared(227 * 1024, GPUS["sm_90"]) == 1
    assert blocks_by_shared(113 * 1024, GPUS["sm_90"]) == 2
    assert blocks_by_shared(32 * 1024, GPUS["sm_75"]) == 2
    assert blocks_by_shared(32 * 1024 + 16, GPUS["sm_75"]) == 1


def rows_for(version, *todo):
    return [Resources(version, j.gpu, j.configuration.entry, 32, 9, 0, 0, 0, 0, 1, 1) for j in todo]


def test_written_rows_take_their_places(tmp_path):
    path, (a, b, c) = tmp_path / "table.csv", tabled(jobs())[:3]
    gone = Resources("13.0.88", "sm_75", "cca_of_old", 32, 9, 0, 0, 0, 0, 1, 1)
    registers.write_table(rows_for("13.0.88", c, a), path)
    with path.open("a") as file:
        file.write(",".join(map(str, gone)) + "\n")
    assert gone in registers.read_table(path)
    new = [row._replace(registers=10) for row in rows_for("13.0.88", b, c)]
    registers.write_table(new, path)
    assert registers.read_table(path) == [*rows_for("13.0.88", a), *new]


def test_rows_of_two_compilers_are_not_mixed(tmp_path):
    path, (a, b) = tmp_path / "table.csv", tabled(jobs())[:2]
    registers.write_table(rows_for("13.0.88", a), path)
    before = path.read_text()
    with pytest.raises(ValueError, match=r"one NVRTC, got 13\.0\.88 and 13\.5\.37; compile them all"):
        registers.write_table(rows_for("13.5.37", b), path)
    assert path.read_text() == before
    registers.write_table(rows_for("13.5.37", a), path)
    assert registers.read_table(path) == rows_for("13.5.37", a)


def test_other_tables_are_refused(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("gpu,entry\nsm_90,cca\n")
    with pytest.raises(ValueError, match=r"must have the columns nvrtc, gpu, entry"):
        registers.read_table(path)
