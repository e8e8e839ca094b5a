"""A launcher that executes the kernels' PTX on the CPU: a drop-in replacement of the one in ccgpu.bridges.cupy_cuda."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ccgpu.kernels.cuda.configurations import Limits
from ccgpu.kernels.cuda.plans import Launch, Pointers
from tests.cuda_on_cpu.launcher import WRITTEN, memory
from tests.ptx import compile, machine
from tests.ptx.memory import Buffer
from tests.ptx.parse import Kernel


class PtxLauncher:
    """Executes launches on the CPU; results are filled with NaN first, and accesses beside the tensors' memory fail.

    `limits` decides the configuration, `target` names the virtual architecture of the PTX, `change` may replace a
    kernel (to plant a mistake), and `options` go to `machine.run`. `launched` has an entry for each launch.
    """

    def __init__(
        self, limits: Limits, target: str, change: Callable[[Kernel], Kernel] | None = None, **options: Any
    ) -> None:
        self._limits, self._target, self._change, self._options = limits, target, change, options
        self.launched: list[Launch] = []
        self.counts: list[machine.Counts] = []

    def limits(self, device: Any) -> Limits:
        """Return the limits, whatever the device."""
        return self._limits

    def launch(self, launches: tuple[Launch, ...], tensors: dict[str, Any], counters: Any, scale: float) -> None:
        """Execute the launches in order."""
        pointers = Pointers(**{name: x.data_ptr() for name, x in tensors.items()})
        written = [name for name in WRITTEN[launches[0].configuration.kernel] if name in tensors]
        for name in written:
            memory(tensors[name])[:] = 0xFF  # NaN in every dtype
        for number, launch in enumerate(launches):
            configuration = launch.configuration
            kernel = compile.kernel(configuration, self._target)
            kernel = self._change(kernel) if self._change else kernel
            first = number == 0
            buffers = [
                Buffer(name, memory(x), name in written, fresh=first and name in written) for name, x in tensors.items()
            ]
            buffers.append(Buffer("counters", memory(counters[number]), True))
            self.launched.append(launch)
            self.counts.append(
                machine.run(
                    *(kernel, (launch.blocks, 1, 1), (configuration.threads, 1, 1)),
                    launch.arguments(pointers, counters[number].data_ptr(), scale),
                    buffers,
                    configuration.shared_bytes,
                    **self._options,
                )
            )
