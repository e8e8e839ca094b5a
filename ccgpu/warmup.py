"""Compile the kernels ahead: `ccgpu warmup` for the CPU or the GPU, `ccgpu warmup --size 97 97 --dtype bfloat16`.

Numba and CuPy keep compiled kernels on disk, so later processes of the same user load them in milliseconds. The CPU has
four kernels for each dtype, whatever the size. On a GPU, sizes with the same configuration share a kernel, so a few
sizes are enough.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ccgpu.bridges import cupy_cuda, numba_cpu
from ccgpu.bridges.call import Call
from ccgpu.bridges.cupy_cuda.attention import plan
from ccgpu.bridges.cupy_cuda.launch import LAUNCHER
from ccgpu.layouts import NAMES, energy_dtype

DTYPES = {name: dtype for dtype, name in NAMES.items()}
DEFAULT_DTYPES = {"cpu": tuple(DTYPES), "cuda": ("bfloat16",)}


class Compiled(NamedTuple):
    """A kernel that has been compiled, or on the CPU loaded from Numba's cache, and the seconds it took."""

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

    On the CPU the kernels are those of a dtype: each is compiled or loaded, run once on a tiny map, and yielded. Sizes,
    depth, channels and batch change nothing there.

    Args:
        sizes: any number of maps, (L,), (H, W) or (T, H, W).
        depth: channels of q and k.
        channels: channels of v.
        dtype: dtype of q, k and v; float32 on a GPU follows torch's TF32 setting, as `ccgpu.cca` does.
        batch: images in a batch.
        backward: compile for training too.
        device: a CUDA device, or the CPU.

    Raises:
        RuntimeError: the kernels cannot run there; the message says why.

    Examples:
        On a machine with a CUDA device:

            for kernel in warmup((97, 97), (129, 257), dtype=torch.float16):
                print(kernel.name, kernel.seconds)
    """
    where = torch.device(device)
    if where.type == "cpu":
        yield from _cpu_kernels(dtype, backward)
        return
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


def _cpu_kernels(dtype: torch.dtype, backward: bool) -> Iterator[Compiled]:
    """Run each CPU kernel once; the stages are each other's derivatives, so that training needs no more of them."""
    reason = numba_cpu.why_not(Call(torch.device("cpu"), dtype))
    if reason is not None:
        raise RuntimeError(f"warmup: the kernels must be able to run on the CPU, got: {reason}")
    x, wide = torch.zeros(1, 2, 3, 3, dtype=dtype), energy_dtype(dtype)
    out, lse, weights = x, torch.zeros(1, 3, 3, dtype=wide), torch.zeros(1, 5, 3, 3, dtype=wide)
    runs = {
        "forward": lambda: numba_cpu.forward(x, x, x, 1.0),
        "backward": lambda: numba_cpu.backward(x, x, x, x, out, lse, lse, 1.0),
        "affinity": lambda: numba_cpu.affinity(x, x),
        "aggregate": lambda: numba_cpu.aggregate(weights, x),
    }
    for kernel, run in runs.items():
        if kernel != "backward" or backward:
            start = time.perf_counter()
            run()
            # The sums of aggregate are computed in the dtype of energies.
            name = NAMES[wide if kernel == "aggregate" else dtype]
            yield Compiled(f"{kernel} {name}", time.perf_counter() - start)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 1 where the kernels cannot run."""
    description = "Compile the kernels ahead, so that the first call does not wait for them."
    parser = argparse.ArgumentParser(prog="ccgpu warmup", description=description, allow_abbrev=False)
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one, else cpu)")
    parser.add_argument(
        "--dtype", nargs="+", choices=list(DTYPES), help="(default: all of them on the CPU, bfloat16 on a GPU)"
    )
    parser.add_argument("--forward-only", action="store_true", help="leave out what only training needs")
    gpu = parser.add_argument_group("on a GPU")
    gpu.add_argument(
        "--size",
        type=int,
        nargs="+",
        action="append",
        metavar="N",
        help="a map: L, H W or T H W; may be given several times (default: 97 97)",
    )
    gpu.add_argument("--depth", type=int, default=64, metavar="N", help="channels of q and k (default: %(default)s)")
    gpu.add_argument("--channels", type=int, default=512, metavar="N", help="channels of v (default: %(default)s)")
    gpu.add_argument("--tf32", action="store_true", help="float32 as it runs where torch allows TF32")
    gpu.add_argument("--batch", type=int, default=1, metavar="N", help="images in a batch (default: %(default)s)")
    options = parser.parse_args(arguments)
    sizes = [tuple(size) for size in options.size or [[97, 97]]]
    for size in sizes:
        if len(size) > 3 or min(size) < 1:
            parser.error(f"--size must be one to three positive numbers, got {' '.join(map(str, size))}")
    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        names = options.dtype or DEFAULT_DTYPES[device.type]
    except (RuntimeError, KeyError):
        parser.error(f"--device must be cpu, cuda or cuda:N, got {options.device}")
    if options.tf32:
        torch.set_float32_matmul_precision("high")
    start, count = time.perf_counter(), 0
    try:
        for name in names:
            for kernel in warmup(
                *sizes,
                depth=options.depth,
                channels=options.channels,
                dtype=DTYPES[name],
                batch=options.batch,
                backward=not options.forward_only,
                device=device,
            ):
                count += 1
                print(f"{kernel.seconds:7.2f} s  {kernel.name}", flush=True)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{time.perf_counter() - start:7.2f} s  for {count} kernels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
