"""Step: the hot case and its other dtypes beside the peers, as `benchmarks.cca` measures them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import cca
from benchmarks.first_gpu_run.records import need_kernels

# What torch.compile compiles takes longer than the step has.
FLAGS = (
    *("--device", "cuda", "--batch", "8", "--dtype", "bfloat16", "float16", "tf32", "float32"),
    *("--without", "compiled", "FlexAttention", "numba_cuda", "--turns", "30", "--share", "0.5"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; return the exit status of benchmarks.cca."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--out", type=Path, required=True, help="folder of the CSV file")
    flags.add_argument("--seconds", type=float, required=True)
    flags.add_argument("--commit")
    arguments = flags.parse_args(argv)
    need_kernels()
    commit = ["--commit", arguments.commit] if arguments.commit else []
    return cca.main([*FLAGS, *commit, "--out", str(arguments.out), "--seconds", str(arguments.seconds)])


if __name__ == "__main__":
    sys.exit(main())
