"""Processes of a distributed run, and the operations on its global batch: sums, batch norm, dropout.

A run on N processes computes the same as one process with the same global batch: batch norm uses the statistics of the
global batch, and dropout masks are drawn for all of it. All processes have the same random state, so a checkpoint holds
a single one.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

T = TypeVar("T")
_SIGN_OF_LIFE = 60.0  # seconds between two signs of life to processes that wait


def rank() -> int:
    """Return this process's number, 0 .. world_size() - 1; 0 outside of a distributed run."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes; 1 outside of a distributed run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this is rank 0, which writes files and prints; also valid before the processes are joined."""
    return (rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))) == 0


def say(text: str) -> None:
    """Print a line in the first process alone, above its progress bar if there is one.

    Characters that the console cannot show, in names of classes or files, are written as escapes.
    """
    if is_main():
        encoding = sys.stdout.encoding or "utf-8"
        tqdm.write(text.encode(encoding, "backslashreplace").decode(encoding))


def bar_interval() -> float:
    """Return the seconds between two prints of a progress bar; a log file needs few lines."""
    return 0.2 if sys.stderr.isatty() else 10.0


def launched_world_size() -> int:
    """Return torchrun's WORLD_SIZE, the number of processes before they are joined; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def choose_device(name: str) -> torch.device:
    """Return the device of this process for `name`: "auto" (CUDA where there is one), "cpu" or "cuda".

    With torchrun, the process with LOCAL_RANK i takes CUDA device i of its machine.

    Raises:
        ValueError: the name is none of these, there is no CUDA device for "cuda", or this machine has fewer CUDA
            devices than processes.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"choose_device: name must be auto, cpu or cuda, got {name!r}.")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("choose_device: --device cuda needs a CUDA device, got none; use --device cpu or auto.")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    needed = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))  # set by torchrun for all of a machine
    if needed > torch.cuda.device_count():
        raise ValueError(
            f"choose_device: the {needed} processes of this machine need a CUDA device each, got "
            f"{torch.cuda.device_count()}; start no more processes than devices."
        )
    return torch.device("cuda", local_rank)


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Join torchrun's processes into a group within a `with` block; do nothing without torchrun.

    Reads torchrun's RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. CUDA devices communicate by NCCL, others by gloo.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Wait until every process has called this."""
    if dist.is_initialized():
        dist.barrier()


def let_first_process(work: Callable[[], Generator[None, None, T]]) -> T:
    """Let the first process do a piece of work while the others wait for it; an error ends the waiting of all.

    Args:
        work: a generator function, run in the first process alone. Where it takes minutes it yields now and then, since
            a process that waits for more than ten minutes without a sign of life gives up.

    Returns:
        What `work` returns, in all processes.

    Raises:
        ValueError: `work` failed in the first process with an exception, which that process itself raises as it was.
    """
    if not is_main():
        while True:
            finished, problem, result = _from_first(None)
            if problem is not None:
                raise ValueError(problem)
            if finished:
                return cast(T, result)
    said, steps = time.monotonic(), work()
    try:
        while True:
            try:
                next(steps)
            except StopIteration as end:
                found = cast(T, end.value)
                break
            if time.monotonic() - said > _SIGN_OF_LIFE:
                _from_first((False, None, None))
                said = time.monotonic()
    except BaseException as error:
        _from_first((True, str(error), None))
        raise
    _from_first((True, None, found))
    return found


def gather_values(value: T) -> list[T]:
    """Return the values, small picklable ones, of all processes, by rank; every process must call it."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def _from_first(value: Any) -> Any:
    """Return the first process's value in all processes."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def sum_over_processes(value: torch.Tensor) -> torch.Tensor:
    """Return the sum of `value` over all processes, not differentiable; `value` itself does not change."""
    total = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


class _DifferentiableSum(torch.autograd.Function):
    """Autograd rule of `differentiable_sum`."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return sum_over_processes(value)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return sum_over_processes(gradients[0].contiguous())


def differentiable_sum(value: torch.Tensor) -> torch.Tensor:
    """Return the sum of `value` over all processes, differentiable.

        y = sum over processes of x;    dx = sum over processes of dy, because every process's y depends on every x

    Every process must run forward and backward. With one process the result is `value` itself.
    """
    return _DifferentiableSum.apply(value) if dist.is_initialized() else value


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with the statistics of the global batch, on any device.

        y = (x - mean) / sqrt(var + eps) * weight + bias,    mean and var over batch and positions of all processes

    `torch.nn.SyncBatchNorm` takes CUDA tensors only; this module runs over gloo on the CPU. The variance is computed
    from deviations from the global mean (two reductions), so that it does not cancel where the mean is large. Running
    statistics equal those of one process: `running_var` takes the unbiased variance with the global count. Arguments,
    state dict and eval mode are those of `torch.nn.BatchNorm2d`.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the normalised (B, C, H, W) `input`; in train mode every process must call it."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        own = torch.tensor(float(x.numel() // x.shape[1]), dtype=torch.float64)
        count = float(sum_over_processes(own))
        if count <= 1:
            raise ValueError(
                "GlobalBatchNorm2d: the global batch must hold more than 1 value per channel in train mode, "
                f"got {count:.0f}; use a larger batch or crop."
            )
        mean = differentiable_sum(x.sum(dim=(0, 2, 3))) / count
        centred = x - mean[None, :, None, None]
        variance = differentiable_sum(centred.square().sum(dim=(0, 2, 3))) / count
        self._track(mean.detach(), variance.detach() * (count / (count - 1)))
        gain = torch.rsqrt(variance + self.eps)
        if self.affine:
            gain = gain * self.weight
        out = centred * gain[None, :, None, None]
        if self.affine:
            out = out + self.bias[None, :, None, None]
        return out.to(input.dtype)

    def _track(self, mean: torch.Tensor, unbiased_variance: torch.Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None  # a buffer wherever the two others are
        self.num_batches_tracked.add_(1)
        # momentum None asks for the cumulative average, as in torch.nn.BatchNorm2d.
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
            self.running_var.lerp_(unbiased_variance.to(self.running_var.dtype), momentum)


class GlobalDropout2d(nn.Dropout2d):
    """Dropout of whole channels with probability p, with one mask for the global batch.

    Every process draws the mask of all world_size * B samples from the same random state and takes its own rows, so
    that masks and the random state afterwards equal those of one process with the global batch. Without a distributed
    run the module equals `torch.nn.Dropout2d`.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return `input` (B, C, H, W), in train mode with dropped channels 0 and the others divided by 1 - p."""
        if not self.training or self.p == 0:
            return input
        if input.ndim != 4:
            raise ValueError(f"GlobalDropout2d: input must be (B, C, H, W), got shape {tuple(input.shape)}.")
        batch, channels = input.shape[:2]
        ones = torch.ones(world_size() * batch, channels, dtype=input.dtype, device=input.device)
        mask = F.dropout(ones, self.p, training=True)[rank() * batch : (rank() + 1) * batch]
        return input * mask[:, :, None, None]


def convert_for_global_batch(model: nn.Module) -> nn.Module:
    """Let a model's batch norms and dropouts work on the global batch, in place; return the model.

    `torch.nn.Dropout2d` becomes `GlobalDropout2d`. With more than one process `torch.nn.BatchNorm2d` becomes
    `torch.nn.SyncBatchNorm` (parameters on CUDA) or `GlobalBatchNorm2d` (elsewhere), so move the model to its device
    first. Parameters, buffers, hooks and the state dict stay the same.

    Raises:
        TypeError: a batch norm or dropout is of another class, which would work on one process's share of the batch;
            the model is as before.
    """
    found = [(module, _counterpart(module, name or "model")) for name, module in model.named_modules()]
    for module, counterpart in found:
        if counterpart is not None:
            # Another class instead of another module: hooks and other names of the module stay valid.
            module.__class__ = counterpart
            if isinstance(module, nn.SyncBatchNorm):
                module.process_group = None  # all processes
    return model


def _counterpart(module: nn.Module, name: str) -> type[nn.Module] | None:
    """Return the class that a module gets for the global batch, or None if it stays as it is.

    Raises:
        TypeError: it would work on one process's share of the batch.
    """
    if isinstance(module, (GlobalBatchNorm2d, GlobalDropout2d, nn.SyncBatchNorm)):
        return None
    if type(module) is nn.Dropout2d:
        return GlobalDropout2d
    if type(module) is nn.BatchNorm2d:
        if world_size() == 1:
            return None
        on_cuda = any(t.is_cuda for t in [*module.parameters(), *module.buffers()])
        return nn.SyncBatchNorm if on_cuda else GlobalBatchNorm2d
    if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)) and not (
        isinstance(module, nn.modules.dropout._DropoutNd) and module.p == 0
    ):
        raise TypeError(
            "convert_for_global_batch: batch norm and dropout must be torch.nn.BatchNorm2d and "
            f"torch.nn.Dropout2d, got {type(module).__name__} at {name}; it would work on one process's "
            "share of the batch."
        )
    return None


def wrap(net: nn.Module, device: torch.device) -> nn.Module:
    """Return `net`, in a distributed run wrapped so that gradients are averaged over the processes."""
    if not dist.is_initialized():
        return net
    device_ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(net, device_ids=device_ids)
