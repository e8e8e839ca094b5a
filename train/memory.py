"""Memory of a computation in bytes: tensors that forward saves for backward, and peak allocation."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ccgpu.bridges import numba_cpu

# The profiler, which counts the CPU's memory, prints every start and stop on stderr at lower log levels.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

Returned = TypeVar("Returned")


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Return the bytes that the forward of module(x) saves for backward, without parameters and buffers.

    Every storage counts once and in full, however many tensors share it. x counts if it is saved.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # the reference keeps its address from being used again
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        module(x)
    for tensor in (*module.parameters(), *module.buffers()):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in storages.values())


def peak_bytes(call: Callable[[], Returned], device: torch.device) -> tuple[int, Returned]:
    """Return the peak of the bytes allocated during a call, less the bytes allocated before it, and the call's result.

    CUDA: bytes requested on the current device; the allocator rounds each tensor up, by as much as a megabyte. CPU:
    torch's peak plus NumPy's, an upper bound of their joint peak. NumPy's includes Python's own objects, some tens of
    KB.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        result = call()
        torch.cuda.synchronize()
        return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before, result
    numba_cpu.forget_memory()  # what threads keep from earlier calls belongs to this one as well
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        tracemalloc.start()
        try:
            result = call()
            _, traced = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak + traced, result
