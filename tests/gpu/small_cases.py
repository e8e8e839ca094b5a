"""Small calls of every kernel, for a tool that watches each memory access: `python small_cases.py`."""

import sys

import torch

import ccgpu

SHAPES = [(16, 24, (33, 18)), (5, 9, (3, 17)), (64, 72, (97, 2)), (8, 8, (300,)), (8, 8, (2, 5, 19))]  # D, C, map


def main() -> None:
    """Run forward, backward and the two stages in every dtype on maps that end inside a tile."""
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for precision in ("highest", "high") if dtype == torch.float32 else ("highest",):
            torch.set_float32_matmul_precision(precision)
            for d, c, sizes in (
                (16, 24, (33, 18)),
                (5, 9, (3, 17)),
                (64, 72, (97, 2)),
                (8, 8, (300,)),
                (8, 8, (2, 5, 19)),
            ):
                # Drawn on the CPU, so that few other kernels run under the tool.
                shapes = [(2, n, *sizes) for n in (d, d, c)]
                q, k, v = (torch.randn(s).to(dtype).cuda().requires_grad_() for s in shapes)
                out, lse = ccgpu.cca(q, k, v, return_lse=True, backend="cupy")
                torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
                energies = ccgpu.affinity(q, k, backend="cupy")
                stages = ccgpu.aggregate(energies, v, backend="cupy")
                torch.autograd.grad(stages, (q, k, v), torch.ones_like(stages))
                torch.cuda.synchronize()
    print("ran", file=sys.stdout)


if __name__ == "__main__":
    main()
