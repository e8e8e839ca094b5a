"""The cases that are measured: shapes, dtypes and inputs, with the bytes and FLOPs that every implementation needs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import ccgpu

Inputs = tuple[Tensor, Tensor, Tensor]
LAYOUTS = ("NCHW", "channels_last")
STEPS = ("forward", "backward", "forward+backward")
# "tf32" is float32 whose products may be rounded to TF32; "float32" is float32 throughout.
DTYPES = ("bfloat16", "float16", "float32", "tf32", "float64")


class Case(NamedTuple):
    """One shape and dtype: q, k (batch, query, *sizes) and v (batch, channels, *sizes)."""

    batch: int
    sizes: tuple[int, ...]
    dtype: str
    query: int = 64
    channels: int = 512

    def __str__(self) -> str:
        return f"B={self.batch} {'x'.join(map(str, self.sizes))} D={self.query} C={self.channels} {self.dtype}"

    @property
    def shape(self) -> str:
        """The batch and the map, as in the records: 8x97x97."""
        return "x".join(map(str, (self.batch, *self.sizes)))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the tensors."""
        return torch.float32 if self.dtype == "tf32" else getattr(torch, self.dtype)

    @property
    def positions(self) -> int:
        """The number of positions in all images."""
        return self.batch * math.prod(self.sizes)

    @property
    def input_bytes(self) -> int:
        """The bytes of q, k and v."""
        return (2 * self.query + self.channels) * self.positions * self.torch_dtype.itemsize

    def minimum_bytes(self) -> dict[str, int]:
        """Return the bytes each step must read and write: every input once, every result once.

        Forward reads q, k, v and writes out. Backward reads q, k, v, out and dout and writes dq, dk and dv.
        """
        unit = self.positions * self.torch_dtype.itemsize
        forward = (2 * self.query + 2 * self.channels) * unit
        backward = (4 * self.query + 4 * self.channels) * unit
        return dict(zip(STEPS, (forward, backward, forward + backward), strict=True))

    def flops(self) -> dict[str, int]:
        """Return the FLOPs of each step by the op's own formula, counted on the meta device without computing."""
        q, k, v = (torch.empty(shape, device="meta", requires_grad=True) for shape in self.shapes())
        counts = []
        for gradients in (False, True):
            with FlopCounterMode(display=False) as counter:
                out = ccgpu.cca(q, k, v)
                if gradients:
                    torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
            counts.append(counter.get_total_flops())
        forward, both = counts
        return dict(zip(STEPS, (forward, both - forward, both), strict=True))

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of q, k and v."""
        q, v = ((self.batch, n, *self.sizes) for n in (self.query, self.channels))
        return q, q, v

    def inputs(self, seed: int, device: torch.device, layout: str) -> tuple[Inputs, Tensor]:
        """Return q, k, v, scaled so that their energies have unit variance, and a gradient of out."""
        generator = torch.Generator(device).manual_seed(seed)
        shapes = (*self.shapes(), self.shapes()[2])
        factors = (self.query**-0.25, self.query**-0.25, 1.0, 1.0)
        tensors = []
        for shape, factor in zip(shapes, factors, strict=True):
            x = torch.randn(shape, generator=generator, device=device).mul_(factor).to(self.torch_dtype)
            tensors.append(in_layout(x, layout))
        q, k, v, dout = tensors
        return (q, k, v), dout


def in_layout(x: Tensor, layout: str) -> Tensor:
    """Return x (B, channels, *S) contiguous, or with the channels last in memory, whatever the number of axes."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels_last" else x.contiguous()


def gpu_suite() -> list[Case]:
    """Return the cases of the full measurement on a GPU, the most informative first."""
    hot = Case(8, (97, 97), "bfloat16")
    shapes = [
        (1, (97, 97)),
        (2, (97, 97)),
        (1, (129, 257)),
        (1, (256, 256)),
        (1, (65, 129)),
        (1, (5, 60, 80)),
    ]
    # Every dtype at the hot shape and every shape in bfloat16 come before the rest of the grid.
    first = [hot, *(Case(b, s, hot.dtype) for b, s in shapes)]
    others = [Case(8, (97, 97), dtype) for dtype in ("float16", "tf32", "float32")]
    rest = [Case(b, s, dtype) for dtype in ("float16", "tf32", "float32") for b, s in shapes]
    return first + others + rest


# In order of their FLOPs, so that a peer's rate on one map tells how long the next one would take it.
CPU_MAPS = ((4, 4), (16, 16), (32, 32), (64, 64), (1, 1000), (97, 97), (5, 60, 80), (128, 128), (1, 4096), (256, 256))
CPU_DTYPES = ("float32", "bfloat16", "float16")


def cpu_suite() -> list[Case]:
    """Return the cases of the full measurement on a CPU: 97x97 in float32, then each dtype from small maps to large."""
    first = Case(1, (97, 97), "float32")
    cases = [Case(1, sizes, dtype) for dtype in CPU_DTYPES for sizes in CPU_MAPS]
    cases += [Case(1, sizes, "float64") for sizes in ((32, 32), (97, 97))]
    return [first, *(case for case in cases if case != first)]


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Allow TF32 in matrix products of float32 for "tf32", forbid it for every other dtype."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
