"""Machine code made before the run, on a machine without a GPU, for CuPy's cache on the one with it.

The name of a kernel in CuPy's cache depends on the folders of CuPy and of CUDA (they are among its options, -I), so a
cache cannot be filled elsewhere: `prepare` writes machine code under names of ours, and `fill`, on the device, puts it
into CuPy's cache under CuPy's names, while CuPy itself computes them. What is not prepared is compiled there.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import nvrtc
from benchmarks.cases import DTYPES, Case, precision
from benchmarks.first_gpu_run.records import append, need_kernels
from benchmarks.first_gpu_run.sanitize import SHAPES
from benchmarks.first_gpu_run.values import HOT, SMALL
from benchmarks.registers import CUPY_OPTIONS, GPUS
from ccgpu.bridges.cupy_cuda.attention import plan
from ccgpu.bridges.cupy_cuda.launch import CuPyLauncher, compiler_options
from ccgpu.kernels.cuda.configurations import KERNELS, Configuration, source

BOUNDED = ("CCGPU_WAIT_LIMIT=4000000",)  # some seconds: a block that waits longer ends the launch with an error
SHIPPED: tuple[str, ...] = ()
FUSED = ("forward", "backward")
ERROR_LINES = 4


class Job(NamedTuple):
    """A kernel with macros, for a kind of GPU (sm_90)."""

    gpu: str
    defines: tuple[str, ...]
    configuration: Configuration

    @property
    def name(self) -> str:
        """The name of its machine code, which another source or other options change."""
        text = "\0".join([self.gpu, *compiler_options(self.defines), source(self.configuration)])
        return f"{self.configuration.entry}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.cubin"


def chosen(gpu: str) -> list[Job]:
    """Return the kernels that the steps launch on a kind of GPU, except those that only tests of pytest do.

    The hot case comes first; the steps that measure launch it as it is shipped, those that check with bounded waits.
    """
    found: dict[Job, None] = {}
    for case in HOT:
        found |= dict.fromkeys(Job(gpu, SHIPPED, x) for x in configurations(case, gpu, FUSED))
    for case in HOT + SMALL:
        found |= dict.fromkeys(Job(gpu, BOUNDED, x) for x in configurations(case, gpu, FUSED))
    for dtype in DTYPES:
        for case in (shape._replace(dtype=dtype) for shape in SHAPES):
            found |= dict.fromkeys(Job(gpu, BOUNDED, x) for x in configurations(case, gpu, KERNELS))
    return list(found)


def configurations(case: Case, gpu: str, kernels: Sequence[str]) -> list[Configuration]:
    """Return what a case launches, in order; the stages take the channels of one map."""
    with precision(case.dtype):
        return [
            launch.configuration
            for kernel in kernels
            for depth in [case.query if kernel in FUSED or kernel == "affinity" else case.channels]
            for launch in plan(kernel, case.torch_dtype, case.batch, case.sizes, depth, case.channels, GPUS[gpu])
        ]


def machine_code(job: Job) -> bytes:
    """Compile a kernel as CuPy does; it needs NVRTC (extra test-cuda) and no GPU."""
    options = (*compiler_options(job.defines), *CUPY_OPTIONS)
    return nvrtc.compile_source(source(job.configuration), job.gpu, options, job.configuration.entry).code


def named_code(job: Job) -> tuple[str, bytes]:
    """Return a kernel's name and machine code, both of the source that this process has read."""
    return job.name, machine_code(job)


def archive(folder: Path, gpu: str) -> Path:
    """Return the file of a kind of GPU in a folder of prepared machine code."""
    return folder / f"{gpu}.zip"


def prepare(
    folder: Path, gpu: str, todo: Sequence[Job] | None = None, workers: int | None = None
) -> tuple[Path, list[str]]:
    """Compile kernels in parallel and write their machine code into one file.

    Returns:
        The file, and an error for each kernel that does not compile, which the file lacks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    todo, path, errors = chosen(gpu) if todo is None else todo, archive(folder, gpu), []
    unfinished = path.with_suffix(".unfinished")
    with pool(workers) as executor, zipfile.ZipFile(unfinished, "w", zipfile.ZIP_LZMA) as file:
        for future in [executor.submit(named_code, job) for job in todo]:
            try:
                file.writestr(*future.result())
            except nvrtc.CompileError as error:
                errors.append("\n".join(str(error).splitlines()[:ERROR_LINES]))
    os.replace(unfinished, path)
    return path, errors


def pool(workers: int | None = None) -> ProcessPoolExecutor:
    """Return processes that share no state with this one, which may have used the device."""
    return ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn"))


def seeded(code: bytes | None, compile_module: Callable[[], object]) -> str:
    """Call a compilation by CuPy with machine code at hand; return "cached", "prepared" or "compiled".

    CuPy asks its cache for the module by a name of its own; if the cache has none, it gets the machine code.
    """
    from cupy.cuda import _compiler_cache, compiler

    class Seeded(_compiler_cache.DiskKernelCacheBackend):
        found = "compiled"

        def load(self, name: str) -> bytes | None:
            cached = super().load(name)
            if cached is not None:
                self.found = "cached"
            elif code is not None:
                self.save(name, code, "")
                self.found = "prepared"
                return code
            return cached

    before, cache = compiler._kernel_cache_backend, Seeded()
    compiler._set_kernel_cache_backend(cache)
    try:
        compile_module()
    finally:
        compiler._set_kernel_cache_backend(before)
    return cache.found


def fill(job: Job, code: bytes | None) -> str:
    """Put a kernel into CuPy's cache, on the device; return where it came from, as `seeded` does."""
    launcher = CuPyLauncher(job.defines)
    return seeded(code, lambda: launcher.compile(job.configuration, torch.device("cuda", 0)))


def prepared(todo: Iterable[Job], path: Path) -> Iterator[tuple[Job, bytes | None]]:
    """Yield each job with its machine code of a file of `prepare`, or None."""
    if not path.exists():
        yield from ((job, None) for job in todo)
        return
    with zipfile.ZipFile(path) as file:
        names = set(file.namelist())
        for job in todo:
            yield job, file.read(job.name) if job.name in names else None


def main(argv: Sequence[str] | None = None) -> int:
    """Fill CuPy's cache; return the exit status, 1 if a kernel does not compile."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--records", type=Path, required=True)
    flags.add_argument("--prepared", type=Path, required=True, help="folder that --prepare has written")
    flags.add_argument("--seconds", type=float, required=True)
    arguments = flags.parse_args(argv)
    end = time.monotonic() + arguments.seconds
    need_kernels()
    gpu = "sm_{}{}".format(*torch.cuda.get_device_capability(0))
    if gpu not in GPUS:
        print(f"no kernels are chosen ahead for {gpu}; each is compiled at its first call")
        return 0
    path = archive(arguments.prepared, gpu)
    counts = {"cached": 0, "prepared": 0, "compiled": 0, "failed": 0, "left": 0}
    with pool() as executor:
        running: dict[Future[str], Job] = {
            executor.submit(fill, job, code): job for job, code in prepared(chosen(gpu), path)
        }
        for future in as_completed(running):
            job = running[future]
            try:
                found = future.result()
            except Exception as error:  # the message names the kernel, and the others still matter
                counts["failed"] += 1
                row = {"step": "kernels", "kernel": job.configuration.entry, "defines": job.defines}
                append(arguments.records, row | {"reason": str(error)})
                print(error, flush=True)
            else:
                counts[found] += 1
            if time.monotonic() > end:
                executor.shutdown(wait=False, cancel_futures=True)
                break
    counts["left"] = len(running) - sum(counts.values())
    append(arguments.records, {"step": "kernels", "gpu": gpu, "archive": path.exists(), **counts})
    print(counts)
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
