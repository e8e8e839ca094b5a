"""NVRTC compiles every kernel configuration for every kind of GPU, hardly any with spills at 64 channels of q and k.

It compiles to machine code, because PTX may contain instructions that the GPU lacks. `make test-cuda` compiles the
configurations in the table of registers and compares them with it; `make test-cuda-all` compiles the others as well.
"""

from functools import cache

import pytest

from benchmarks import nvrtc, registers
from benchmarks.registers import (
    CONFIGURED_DEPTHS,
    CUPY_OPTIONS,
    GPUS,
    REPORT,
    TABLED_DEPTH,
    TABLED_GPU,
    jobs,
    measure,
    read_report,
    read_table,
)

try:
    VERSION = nvrtc.version()
except nvrtc.NotInstalled as reason:
    pytest.skip(f"needs NVRTC: {reason}", allow_module_level=True)

pytestmark = [pytest.mark.nvrtc, pytest.mark.timeout(3600)]
SETS = [(gpu, depth) for gpu in GPUS for depth in CONFIGURED_DEPTHS]
TABLED = [(gpu, depth) for gpu, depth in SETS if gpu == TABLED_GPU or depth == TABLED_DEPTH]


@pytest.fixture(scope="module")
def compiled():
    """A function that returns the rows of the configurations of a GPU and a depth, which it compiles once."""
    with registers.workers() as pool:

        @cache
        def results(gpu, depth):
            return [pool.submit(measure, job) for job in jobs([gpu], depths=[depth])]

        def rows(gpu, depth):
            errors = [error for result in results(gpu, depth) if (error := result.exception()) is not None]
            assert not errors, f"{len(errors)} kernels do not compile:\n" + "\n".join(map(str, errors))
            return [result.result() for result in results(gpu, depth)]

        yield rows


@pytest.mark.parametrize(
    ("gpu", "depth"), [pytest.param(*pair, marks=[] if pair in TABLED else [pytest.mark.slow]) for pair in SETS]
)
def test_configurations_compile_and_fit(compiled, gpu, depth):
    """A multiprocessor has room for as many blocks of each kernel as its launch bounds request."""
    rows, chosen = compiled(gpu, depth), jobs([gpu], depths=[depth])
    assert rows
    assert [row.entry for row in rows] == [job.configuration.entry for job in chosen]
    for row, job in zip(rows, chosen, strict=True):
        assert 0 < row.registers <= 255
        assert min(row.blocks_by_registers, row.blocks_by_shared) >= job.configuration.blocks, row


@pytest.mark.parametrize("gpu", GPUS)
def test_no_spills_at_64_channels(compiled, gpu):
    """On sm_100, for which nothing was tuned, a few registers may wait in memory outside the loops."""
    rows = compiled(gpu, 64)
    assert rows
    allowed = 32 if gpu == "sm_100" else 0
    assert not [row for row in rows if row.spill_stores > allowed or row.spill_loads > allowed]


@pytest.mark.parametrize(("gpu", "depth"), TABLED)
def test_table_holds(compiled, gpu, depth):
    """docs/results/kernels-registers.csv contains the results of this compiler."""
    entries = {job.configuration.entry for job in jobs([gpu], depths=[depth])}
    table = [row for row in read_table() if row.gpu == gpu and row.entry in entries]
    assert table, "no rows; run `python -m benchmarks.registers --write`"
    if table[0].nvrtc != VERSION:
        pytest.skip(f"the table is of NVRTC {table[0].nvrtc}, and this is {VERSION}")
    assert compiled(gpu, depth) == table, "run `python -m benchmarks.registers --write` and look at what changed"


SPILLING = """
extern "C" __global__ void __launch_bounds__(1024, 1) spilling(float *x) {
  float y[128];
#pragma unroll
  for (int i = 0; i < 128; i++)
    y[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 128; i++)
    x[i * 1024 + threadIdx.x] = y[i] + y[i * 37 % 128] * y[i * 91 % 128];
}
"""


def test_spills_are_seen():
    log = nvrtc.compile_source(SPILLING, "sm_90", (*CUPY_OPTIONS, REPORT)).log
    used, stack, stores, loads = read_report(log, "spilling")
    assert used == 64  # 65,536 for 1,024 threads
    assert min(stack, stores, loads) >= 4 * (128 - 64)
    log = nvrtc.compile_source(SPILLING.replace("(1024, 1)", "(256, 1)"), "sm_90", (*CUPY_OPTIONS, REPORT)).log
    assert read_report(log, "spilling")[2:] == (0, 0)


def test_an_error_names_the_kernel_and_the_line():
    with pytest.raises(nvrtc.CompileError, match=r"cca_x must compile for sm_90, got\n(.*\n)*cca_x.cu\(2\): error"):
        nvrtc.compile_source("\nint f() { return g(); }", "sm_90", CUPY_OPTIONS, "cca_x")


def test_an_instruction_that_the_gpu_lacks_is_an_error():
    source = 'extern "C" __global__ void f() { asm volatile("cp.async.commit_group;"); }'
    assert nvrtc.compile_source(source, "sm_80").code[:4] == b"\x7fELF"
    with pytest.raises(nvrtc.CompileError, match="sm_80 or higher"):
        nvrtc.compile_source(source, "sm_75")
