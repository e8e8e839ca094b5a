"""Profile the kernels of one forward and backward: `python -m benchmarks.profile_kernels`.

Runs itself under Nsight Compute (ncu) if that is installed, and prints each kernel's time, bytes, shared-memory
wavefronts and conflicts, registers and occupancy; otherwise torch's profiler gives the times alone.
"""

from __future__ import annotations

import argparse
import glob
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence

import torch

import ccgpu
from benchmarks.cases import DTYPES, LAYOUTS, Case, precision

METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "lts__t_sectors_op_read.sum",
    "lts__t_sectors_op_write.sum",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__occupancy_limit_registers",
    "launch__occupancy_limit_shared_mem",
)
SECTIONS = ("SpeedOfLight", "WarpStateStats", "ComputeWorkloadAnalysis")


def find_ncu() -> str | None:
    """Return the path of ncu, or None."""
    installed = sorted(glob.glob("/opt/nvidia/nsight-compute/*/ncu") + glob.glob("/usr/local/cuda*/bin/ncu"))
    return shutil.which("ncu") or (installed[-1] if installed else None)


def command(ncu: str, arguments: Sequence[str]) -> list[str]:
    """Return the command that runs this module again under ncu, which counts only between profiler start and stop."""
    sections = [word for section in SECTIONS for word in ("--section", section)]
    options = ["--profile-from-start", "off", "--clock-control", "none", "--metrics", ",".join(METRICS), *sections]
    return [ncu, *options, sys.executable, "-m", "benchmarks.profile_kernels", "--counted", *arguments]


def calls(case: Case, device: torch.device, backend: str | None, layout: str) -> tuple[Callable[[], None], ...]:
    """Return a forward and a backward pass on inputs of the case."""
    tensors, dout = case.inputs(0, device, layout)
    leaves = [x.requires_grad_() for x in tensors]

    def forward() -> None:
        with torch.no_grad():
            ccgpu.cca(*leaves, backend=backend)

    def both() -> None:
        torch.autograd.grad(ccgpu.cca(*leaves, backend=backend), leaves, dout)

    return forward, both


def main(argv: Sequence[str] | None = None) -> int:
    """Profile what the flags say; return the exit status."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flags.add_argument("--backend")
    flags.add_argument("--size", type=int, nargs="+", default=[97, 97], metavar="N")
    flags.add_argument("--batch", type=int, default=8)
    flags.add_argument("--query-channels", type=int, default=64, metavar="D")
    flags.add_argument("--channels", type=int, default=512, metavar="C")
    flags.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    flags.add_argument("--layout", choices=LAYOUTS, default="channels_last")
    flags.add_argument("--times", type=int, default=2, help="how often forward and backward run while they are counted")
    flags.add_argument("--times-only", action="store_true", help="torch's profiler even where ncu is installed")
    flags.add_argument("--counted", action="store_true", help=argparse.SUPPRESS)
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = flags.parse_args(words)
    device = torch.device(arguments.device)
    ncu = find_ncu() if device.type == "cuda" and not arguments.times_only else None
    if ncu is not None and not arguments.counted:
        line = command(ncu, words)
        print(shlex.join(line), flush=True)
        return subprocess.run(line).returncode
    shape = (arguments.batch, tuple(arguments.size), arguments.dtype)
    case = Case(*shape, arguments.query_channels, arguments.channels)
    with precision(case.dtype):
        forward, both = calls(case, device, arguments.backend, arguments.layout)
        for _ in range(3):
            both()
        if arguments.counted:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            for _ in range(arguments.times):
                both()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            return 0
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        for name, call in (("forward", forward), ("forward+backward", both)):
            with torch.profiler.profile(activities=activities) as recorded:
                for _ in range(arguments.times):
                    call()
            print(f"{case}, {name}, {arguments.times} times")
            column = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
            print(recorded.key_averages().table(sort_by=column, row_limit=12, max_name_column_width=60))
    return 0


if __name__ == "__main__":
    sys.exit(main())
