"""Compile the CUDA kernels ahead: `python -m ccgpu.warmup --size 97 97 --depth 64 --channels 512 --dtype bfloat16`.

CuPy caches the compiled kernels on disk, so later processes of the same user load them in milliseconds. Sizes with the
same configuration share a kernel, so a few sizes are enough.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ccgpu.bridges import cupy_cuda
from ccgpu.bridges.call import Call
from ccgpu.bridges.cupy_cuda.attention import plan
from ccgpu.bridges.cupy_cuda.launch import LAUNCHER
from ccgpu.layouts import NAMES

DTYPES = {name: dtype for dtype, name in NAMES.items()}


class Compiled(NamedTuple):
    """A kernel that has been compiled, and the seconds it took."""

    name: str
    seconds: float


def warmup(
    *sizes: tuple[int, ...],
    depth: int = 64,
    channels: int = 512,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 1,
    backward: bool = True,
    device: str | torch.device = "cuda",
) -> Iterator[Compiled]:
    """Compile the kernels for maps of the given sizes, and yield each one that was not compiled before.

    Args:
        sizes: any number of maps, (L,), (H, W) or (T, H, W).
        depth: channels of q and k.
        channels: channels of v.
        dtype: dtype of q, k and v; float32 follows torch's TF32 setting, as `ccgpu.cca` does.
        batch: images in a batch.
        backward: compile for training too.
        device: a CUDA device.

    Raises:
        RuntimeError: the kernels cannot run there; the message says why.

    Examples:
        On a machine with a CUDA device:

            for kernel in warmup((97, 97), (129, 257), dtype=torch.float16):
                print(kernel.name, kernel.seconds)
    """
    where = torch.device(device)
    for size in sizes:
        reason = cupy_cuda.why_not(Call(where, dtype, depth, channels, size))
        if reason is not None:
            raise RuntimeError(f"warmup: the kernels must be able to run on {where}, got: {reason}")
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    limits = LAUNCHER.limits(where)
    for size in sizes:
        for kernel in ("forward", "backward")[: 1 + backward]:
            for launch in plan(kernel, dtype, batch, size, depth, channels, limits):
                start = time.perf_counter()
                if LAUNCHER.compile(launch.configuration, where):
                    yield Compiled(launch.configuration.entry, time.perf_counter() - start)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 1 where the kernels cannot run."""
    parser = argparse.ArgumentParser(prog="python -m ccgpu.warmup", description="Compile the CUDA kernels ahead.")
    parser.add_argument(
        "--size",
        type=int,
        nargs="+",
        action="append",
        metavar="N",
        help="a map: L, H W or T H W; may be given several times (97 97)",
    )
    parser.add_argument("--depth", type=int, default=64, help="channels of q and k (%(default)s)")
    parser.add_argument("--channels", type=int, default=512, help="channels of v (%(default)s)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="(%(default)s)")
    parser.add_argument("--tf32", action="store_true", help="float32 as it runs where torch allows TF32")
    parser.add_argument("--batch", type=int, default=1, help="images in a batch (%(default)s)")
    parser.add_argument("--forward-only", action="store_true", help="leave out what only training needs")
    parser.add_argument("--device", default="cuda", help="(%(default)s)")
    options = parser.parse_args(arguments)
    sizes = [tuple(size) for size in options.size or [[97, 97]]]
    for size in sizes:
        if len(size) > 3 or min(size) < 1:
            parser.error(f"--size must be one to three positive numbers, got {' '.join(map(str, size))}")
    if options.tf32:
        torch.set_float32_matmul_precision("high")
    start, count = time.perf_counter(), 0
    try:
        for kernel in warmup(
            *sizes,
            depth=options.depth,
            channels=options.channels,
            dtype=DTYPES[options.dtype],
            batch=options.batch,
            backward=not options.forward_only,
            device=options.device,
        ):
            count += 1
            print(f"{kernel.seconds:7.2f} s  {kernel.name}")
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{time.perf_counter() - start:7.2f} s  for {count} kernels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
