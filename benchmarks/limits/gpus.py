"""The GPUs that the models are of, and how many blocks of a kernel each of them holds."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from benchmarks import registers
from benchmarks.registers import Job, blocks_by_registers, blocks_by_shared
from ccgpu.kernels.cuda.configurations import Configuration, Limits


class Gpu(NamedTuple):
    """A GPU and what the models use of it."""

    name: str
    target: str  # of the compiler
    limits: Limits
    l2_bytes: int  # of the L2 cache, as far as a kernel can use it


def _gpu(name: str, target: str, multiprocessors: int, l2: int, usable: int) -> Gpu:
    limits = registers.GPUS[target]._replace(multiprocessors=multiprocessors, l2_bytes=l2 * 2**20)
    return Gpu(name, target, limits, usable * 10**6)


# Multiprocessors and L2 in MiB from NVIDIA's data sheets; in the models a kernel can use as many MB. An H100 has two
# partitions, and a line may be in both: 40 MB are assumed to hold different lines.
H100 = _gpu("H100", "sm_90", 132, 50, usable=40)
GPUS = (
    H100,
    _gpu("A100", "sm_80", 108, 40, usable=40),
    _gpu("RTX 4090", "sm_89", 128, 72, usable=72),
    _gpu("L4", "sm_89", 58, 48, usable=48),
    _gpu("T4", "sm_75", 40, 4, usable=4),
)


@lru_cache(maxsize=256)
def blocks_of_multiprocessor(configuration: Configuration, gpu: Gpu) -> int:
    """Return how many blocks of a kernel a multiprocessor holds, by its registers and shared memory.

    A kernel that the table of registers has no row for is compiled.

    Raises:
        nvrtc.NotInstalled: it is to be compiled, and there is no NVRTC.
    """
    rows = [row for row in registers.read_table() if (row.gpu, row.entry) == (gpu.target, configuration.entry)]
    used = rows[0].registers if rows else registers.measure(Job(gpu.target, configuration)).registers
    return min(
        blocks_by_registers(configuration.threads, used), blocks_by_shared(configuration.shared_bytes, gpu.limits)
    )


def resident_blocks(configuration: Configuration, gpu: Gpu) -> int:
    """Return how many blocks of a kernel the GPU holds at once."""
    return gpu.limits.multiprocessors * blocks_of_multiprocessor(configuration, gpu)
