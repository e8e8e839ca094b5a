"""A launcher that runs the shipped kernels on the CPU: a drop-in replacement of the one in ccgpu.bridges.cupy_cuda."""

import ctypes

import numpy as np

from ccgpu.kernels.cuda.plans import Pointers
from tests.cuda_on_cpu.libraries import H100, build

WRITTEN = {
    "forward": ("out", "lse", "scratch"),
    "backward": ("delta", "dq", "dk", "dv"),
    "affinity": ("weights",),
    "aggregate": ("out",),
    "aggregate_transposed": ("out",),
}


def memory(x):
    """Return the bytes of a dense tensor as an array."""
    return np.frombuffer((ctypes.c_char * x.nbytes).from_address(x.data_ptr()), np.uint8)


class MachineLauncher:
    """Runs launches on the CPU; results are filled with NaN first, and accesses beside the tensors' memory fail.

    `launched` and `counts` have an entry for each launch.
    """

    def __init__(self, machine, limits=H100, sanitize=False, **options):
        self._machine, self._limits, self._sanitize, self._options = machine, limits, sanitize, options
        self.launched, self.counts = [], []

    def limits(self, device):
        return self._limits

    def launch(self, launches, tensors, counters, scale):
        pointers = Pointers(**{name: x.data_ptr() for name, x in tensors.items()})
        written = [name for name in WRITTEN[launches[0].configuration.kernel] if name in tensors]
        for name in written:
            memory(tensors[name])[:] = 0xFF  # NaN in every dtype
        for number, launch in enumerate(launches):
            configuration, library = build(self._machine, launch.configuration, self._sanitize)
            buffers = [(name, memory(x), name in written) for name, x in tensors.items()]
            buffers.append(("counters", memory(counters[number]), True))
            self.launched.append(launch)
            self.counts.append(
                library.launch(
                    configuration.entry,
                    launch.blocks,
                    configuration.threads,
                    launch.arguments(pointers, counters[number].data_ptr(), scale),
                    configuration.shared_bytes,
                    buffers,
                    **self._options,
                )
            )
