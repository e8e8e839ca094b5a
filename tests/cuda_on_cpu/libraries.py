"""Libraries of the shipped kernels: those that the tests launch share a few, any other gets one of its own.

A library with one kernel takes a second to compile, and each further kernel of the same file adds 0.1 to 0.4 s.
"""

import functools
from collections.abc import Iterator
from types import ModuleType

from benchmarks.registers import GPUS
from ccgpu.kernels.cuda import configurations, plans
from ccgpu.kernels.cuda.configurations import ARITHMETICS, Configuration, Limits
from tests.cuda_on_cpu.device import Library

H100 = GPUS["sm_90"]
FUSED, STAGES = ("forward", "backward"), ("affinity", "aggregate", "aggregate_transposed")
# The numbers of tiles for which kernels with 16 channels of q and k are compiled. Some examples allow only the first,
# which divides lines into segments. float16 and the 16-bit multiply-adds have fewer, because only their conversions
# differ from others.
TILES = {"bf16": (1, 2, 4), "f16": (1, 2), "tf32": (1, 2, 4), "f32": (1, 2, 4), "f64": (1, 2)}
TILES |= {"bf16_fma": (1, 2), "f16_fma": (1, 2)}
STAGED = ("bf16", "tf32", "f32", "f64")
ADDING = ("bf16", "f16")
MANY_CHANNELS = (100, 250)  # of q and k
LONG_LINES = ((3, 97), (2, 129), (2, 300))  # sizes of maps whose kernels have 40 or 64 channels of q and k
SEGMENTED = LONG_LINES[-1]
# Arithmetic -> (sizes, channels of q and k) of the maps that only some arithmetics compute.
LARGE = {
    "bf16": [*((sizes, 64) for sizes in LONG_LINES), *(((5, 6), depth) for depth in MANY_CHANNELS)],
    "f32": [*((sizes, 64) for sizes in LONG_LINES), *(((5, 6), depth) for depth in MANY_CHANNELS)],
    "f64": [(SEGMENTED, 64), *(((5, 6), depth) for depth in MANY_CHANNELS)],
    "tf32": [(SEGMENTED, 64), ((97, 97), 64)],
}


def limits(arithmetic: str) -> Limits:
    """The limits of a GPU that computes in an arithmetic."""
    return H100._replace(capability=(7, 5)) if arithmetic.endswith("_fma") else H100


def alike(configuration: Configuration) -> Configuration:
    """A kernel as it is compiled here: the number of blocks that share a multiprocessor makes no difference."""
    return configuration._replace(blocks=1)


def launched(kernel: str, arithmetic: str) -> Iterator[Configuration]:
    """Yield the kernels of an arithmetic that the tests launch."""
    gpu = limits(arithmetic)
    for tiles in TILES[arithmetic]:
        yield configurations.configuration(kernel, arithmetic, tiles, 16, gpu)
    if kernel in STAGES:
        return
    for sizes, depth in LARGE.get(arithmetic, ()):
        for launch in plans.plan(kernel, arithmetic, 1, sizes, depth, 72, gpu):
            yield launch.configuration
    if arithmetic in ADDING:
        for tiles in (1, 2):
            yield configurations.configuration(kernel, arithmetic, tiles, 16, gpu)._replace(adds=True)


def shared() -> dict[Configuration, tuple[Configuration, ...]]:
    """Return each of these kernels -> all kernels of its library: a library for each file and arithmetic.

    The stages share one file, and their kernels are small: one library for all arithmetics.
    """
    libraries = [[*launched(kernel, arithmetic)] for kernel in FUSED for arithmetic in ARITHMETICS]
    libraries.append([x for kernel in STAGES for arithmetic in STAGED for x in launched(kernel, arithmetic)])
    members = [tuple(dict.fromkeys(map(alike, library))) for library in libraries]
    return {configuration: library for library in members for configuration in library}


SHARED = shared()  # here, because some tests change how calls are planned while they launch


def build(machine: ModuleType, configuration: Configuration, sanitize: bool = False) -> tuple[Configuration, Library]:
    """Return a kernel as it is compiled for the CPU, and the library that holds it.

    With AddressSanitizer a kernel takes three times as long to compile, and its library holds the same shape alone.
    """
    found = alike(configuration)
    kernels = SHARED.get(found, (found,))
    if sanitize:
        kernels = tuple(kernel for kernel in kernels if shape(kernel) == shape(found))
    return found, library_of(machine, kernels, sanitize)


def shape(kernel: Configuration) -> tuple[str, int, int, bool]:
    """What kernels of one file that differ in name only have in common."""
    return kernel.arithmetic, kernel.tiles, kernel.depth, kernel.adds


@functools.cache
def library_of(machine: ModuleType, kernels: tuple[Configuration, ...], sanitize: bool) -> Library:
    """Compile the library of some kernels of one file."""
    source = configurations.source(*kernels, primitives=machine.HERE / "primitives.cuh")
    library: Library = machine.compile(source, [kernel.entry for kernel in kernels], sanitize=sanitize)
    return library
