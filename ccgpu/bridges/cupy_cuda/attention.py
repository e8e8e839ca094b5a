"""Criss-cross attention on the CUDA kernels: layouts, padding and alignment of the tensors whose addresses they get.

The kernels read and write channels-last memory, (B, *S, channels), in steps of 16 bytes. Tensors in channels-last
memory are passed without a copy. Others are copied into it once, padded with zero channels to a multiple of 16 bytes.
Results are written in place if their layout allows it, else copied once. All memory is torch's and belongs to its
current stream, so a temporary may be dropped once the kernel that uses it is enqueued.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ccgpu.bridges.cupy_cuda.launch import LAUNCHER, Launcher
from ccgpu.interchange import address
from ccgpu.kernels.cuda import configurations, plans
from ccgpu.kernels.cuda.configurations import Limits
from ccgpu.kernels.cuda.plans import Launch
from ccgpu.layouts import MEMORY_FORMATS, NAMES, Result, energy_dtype

STEP_BYTES = 16
# torch 2.9 has one setting that covers the older two, which raise once it has been used.
_HAS_FP32_PRECISION = hasattr(torch.backends.cuda.matmul, "fp32_precision")


def tf32_allowed() -> bool:
    """Return whether torch may multiply float32 matrices in TF32 on CUDA devices, by any of its settings."""
    if _HAS_FP32_PRECISION:
        return torch.backends.cuda.matmul.fp32_precision == "tf32"
    return torch.backends.cuda.matmul.allow_tf32 or torch.get_float32_matmul_precision() != "highest"


def _is_native(x: Tensor) -> bool:
    """Return whether the kernels can use the memory of x (B, channels, *S) without a copy."""
    if x.size(1) * x.element_size() % STEP_BYTES or address(x) % STEP_BYTES:
        return False
    if x.ndim == 3:
        return x.transpose(1, 2).is_contiguous()
    return x.is_contiguous(memory_format=MEMORY_FORMATS[x.ndim])


def _padded(channels: int, dtype: torch.dtype) -> int:
    """Return the number of channels padded to a multiple of 16 bytes."""
    step = STEP_BYTES // dtype.itemsize
    return -(-channels // step) * step


def _memory(x: Tensor) -> Tensor:
    """Return uninitialised memory (B, *S, padded channels) for x (B, channels, *S)."""
    return x.new_empty((x.shape[0], *x.shape[2:], _padded(x.shape[1], x.dtype)))


def native(x: Tensor) -> Tensor:
    """Return x (B, channels, *S) in the kernels' layout: x itself, or a copy (B, *S, padded channels)."""
    if _is_native(x):
        return x
    copy = _memory(x)
    channels = x.shape[1]
    copy[..., :channels].copy_(x.movedim(1, -1))
    if copy.shape[-1] != channels:
        copy[..., channels:].zero_()
    return copy


def aligned(x: Tensor) -> Tensor:
    """Return x contiguous and aligned to 16 bytes: x itself, or a copy."""
    x = x.contiguous()
    return x.clone() if address(x) % STEP_BYTES else x


def plan(
    kernel: str,
    dtype: torch.dtype,
    images: int,
    sizes: tuple[int, ...],
    depth: int,
    channels: int,
    limits: Limits,
    **options: int | None,
) -> tuple[Launch, ...]:
    """Return a kernel's launches for a dtype, depth D and channels C, under torch's current TF32 setting.

    `options` are further arguments of `plans.plan`: `crossing`, and those that only change the order of the work.
    """
    tf32 = dtype == torch.float32 and tf32_allowed()
    arithmetic = configurations.arithmetic(NAMES[dtype], limits.capability, tf32)
    depth, channels = _padded(depth, dtype), _padded(channels, dtype)
    return plans.plan(kernel, arithmetic, images, sizes, depth, channels, limits, **options)


def result_like(x: Tensor) -> Result:
    """Return a result in the layout of x (B, channels, *S), with memory in the kernels' layout."""
    target = torch.empty_like(x)
    return Result(target) if _is_native(target) else Result(target, _memory(target).movedim(-1, 1))


class Kernels:
    """The kernels behind a launcher, as functions of torch tensors; measurements pass a `schedule` (see `plan`)."""

    def __init__(self, launcher: Launcher, **schedule: int) -> None:
        self._launcher, self._schedule = launcher, schedule

    def run(
        self,
        kernel: str,
        q: Tensor,
        v: Tensor,
        tensors: dict[str, Tensor],
        scale: float,
        crossing: int | None = None,
    ) -> None:
        """Enqueue a kernel on the tensors; q (B, D, *S) and v (B, C, *S) give the problem's size and dtype."""
        shape, device = q.shape, q.device
        limits = self._launcher.limits(device)
        options: dict[str, int | None] = {"crossing": crossing, **self._schedule}
        launches = plan(kernel, q.dtype, shape[0], shape[2:], shape[1], v.shape[1], limits, **options)
        most = max(launch.counters for launch in launches)
        counters = torch.zeros((len(launches), most), dtype=torch.int32, device=device)
        if launches[0].scratch > 0:
            lse = tensors["lse"]
            tensors = {**tensors, "scratch": lse.new_empty((launches[0].scratch, *lse.shape))}
        self._launcher.launch(launches, tensors, counters, scale)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, crossing: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return out (B, C, *S) in v's dtype and layout and lse (B, *S); see `ccgpu.cca` for the formula."""
        shape = q.shape
        lse = torch.empty((shape[0], *shape[2:]), dtype=energy_dtype(q.dtype), device=q.device)
        if lse.numel() == 0:
            return torch.empty_like(v), lse
        out = result_like(v)
        tensors = {"q": native(q), "k": native(k), "v": native(v), "out": out.memory, "lse": lse}
        self.run("forward", q, v, tensors, scale, crossing)
        return out.finish(), lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor,
        scale: float,
        crossing: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk, dv in the layouts of q, k, v, given the gradients of out and lse."""
        if lse.numel() == 0:
            return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dq, dk, dv = result_like(q), result_like(k), result_like(v)
        tensors = {
            "q": native(q),
            "k": native(k),
            "v": native(v),
            "out": native(out),
            "lse": aligned(lse),
            "dout": native(dout),
            "dlse": aligned(dlse),
            "delta": torch.empty_like(lse, memory_format=torch.contiguous_format),
            "dq": dq.memory,
            "dk": dk.memory,
            "dv": dv.memory,
        }
        self.run("backward", q, v, tensors, scale, crossing)
        return dq.finish(), dk.finish(), dv.finish()


_KERNELS = Kernels(LAUNCHER)
forward = _KERNELS.forward
backward = _KERNELS.backward
