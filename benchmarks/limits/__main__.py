"""Print the limits of the CUDA kernels: `python -m benchmarks.limits [limits] [dram] [passes] [ticks]`, all by default.

limits: the hot case on an H100, B = 8 maps of 97 x 97, D = 64, C = 512, from counts on the CPU (g++) and machine code
(NVRTC and nvdisasm, the extra `test-cuda`). dram, passes, ticks: the model of L2 alone. --write puts the limits of all
calls into docs/results/kernels-limits.csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.limits import table
from benchmarks.nvrtc import CompileError, NotInstalled

SECTIONS = ("limits", "dram", "passes", "ticks")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 1 where a kernel does not compile or its code is not understood."""
    flags = argparse.ArgumentParser(prog="python -m benchmarks.limits", description="Limits of the CUDA kernels.")
    flags.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)} (all)")
    kinds = sorted({arithmetic for _, arithmetic in table.CALLS})
    flags.add_argument("--arithmetic", nargs="+", choices=kinds, default=kinds, help="of the limits (all)")
    flags.add_argument("--lag", type=int, default=0, help="steps between the phases of an image (%(default)s)")
    flags.add_argument("--no-hints", action="store_true", help="last uses do not give up their lines in L2")
    flags.add_argument("--write", action="store_true", help=f"write docs/results/{table.RECORD.name}")
    options = flags.parse_args(argv)
    sections, hints = options.sections or SECTIONS, not options.no_hints
    if not set(sections) <= set(SECTIONS):
        flags.error(f"sections must be of {', '.join(SECTIONS)}, got {' '.join(sections)}")
    if options.write and ("limits" not in sections or [*options.arithmetic] != kinds or options.lag or not hints):
        flags.error("--write must have the limits of all calls as they are launched; leave out the other options")
    try:
        if "limits" in sections:
            rows = []
            for kernel, arithmetic in table.CALLS:
                if arithmetic in options.arithmetic:
                    rows.append(table.limits_of(kernel, arithmetic, options.lag, hints))
                    print(rows[-1], file=sys.stderr, flush=True)
            print(table.limits_table(rows), end="\n\n", flush=True)
            if options.write:
                table.write(rows)
        if "dram" in sections:
            print(table.dram_table(options.lag, hints), end="\n\n", flush=True)
        if "passes" in sections:
            print(table.passes_table(options.lag, hints), end="\n\n", flush=True)
        if "ticks" in sections:
            print(table.ticks_table(options.lag, hints))
    except (NotInstalled, CompileError, ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
