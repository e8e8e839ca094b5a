"""List what can compute the attention on this machine: `ccgpu backends`.

For the CPU and the GPU: each backend in order of preference, with the dtypes that it runs, or why it cannot run.
`ccgpu.backends` answers for one dtype and size in Python.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence

import torch

from ccgpu.bridges.call import Call
from ccgpu.dispatch import BACKENDS
from ccgpu.layouts import NAMES
from ccgpu.train.runs.parser import command_parser

WIDTH = 100  # columns


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    command_parser("backends", __doc__).parse_args(argv)
    print(report())
    return 0


def report() -> str:
    """Return a table of backends for each kind of device."""
    lines = [f"CPU, {torch.get_num_threads()} threads:", *table("cpu"), ""]
    found = torch.cuda.is_available()
    lines += [f"GPU, {torch.cuda.get_device_name() if found else 'none that torch sees'}:", *table("cuda"), ""]
    return "\n".join(
        [*lines, "A call takes the first that can run it and suits it; backend= or CCGPU_BACKEND names one."]
    )


def table(kind: str) -> list[str]:
    """Return the lines of the backends that are made for a kind of device, "cpu" or "cuda"."""
    lines = []
    for backend in BACKENDS:
        if backend.made_for not in (None, kind):
            continue
        reasons = {name: backend.why_not(Call(torch.device(kind), dtype)) for dtype, name in NAMES.items()}
        able = [dtype for dtype, name in NAMES.items() if reasons[name] is None]
        runs = ", ".join(backend.arithmetic(dtype) if backend.arithmetic else NAMES[dtype] for dtype in able)
        what = f"{runs}: {backend.description}" if runs else f"cannot run: {next(iter(reasons.values()))}"
        what += "" if backend.automatic else "; only where it is named"
        lines += textwrap.wrap(what, WIDTH, initial_indent=f"  {backend.name:<12}", subsequent_indent=" " * 14)
    return lines


if __name__ == "__main__":
    sys.exit(main())
