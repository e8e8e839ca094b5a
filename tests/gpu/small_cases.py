"""Small calls of every kernel, for a tool that watches each memory access: `python small_cases.py BACKEND [DTYPE]`."""

import sys

import torch

import ccgpu
from benchmarks.cases import DTYPES, precision
from benchmarks.first_gpu_run.sanitize import SHAPES


def main(backend: str, *names: str) -> None:
    """Run forward, backward and the two stages of a backend on maps that end inside a tile.

    `names` are of `benchmarks.cases.DTYPES`; without any, in each that the backend has.
    """
    torch.manual_seed(0)
    for name in names or DTYPES:
        dtype = SHAPES[0]._replace(dtype=name).torch_dtype
        if not next(b.available for b in ccgpu.backends("cuda", dtype=dtype) if b.name == backend):
            continue
        with precision(name):
            for case in SHAPES:
                # Drawn on the CPU, so that few other kernels run under the tool.
                q, k, v = (torch.randn(shape).to(dtype).cuda().requires_grad_() for shape in case.shapes())
                out, lse = ccgpu.cca(q, k, v, return_lse=True, backend=backend)
                torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
                energies = ccgpu.affinity(q, k, backend=backend)
                stages = ccgpu.aggregate(energies, v, backend=backend)
                torch.autograd.grad(stages, (q, k, v), torch.ones_like(stages))
                torch.cuda.synchronize()
    print("ran")


if __name__ == "__main__":
    main(*sys.argv[1:])
