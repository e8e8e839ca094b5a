"""Memory of a computation: what forward keeps for backward, and the most that is allocated at once. Bytes."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

# The profiler, which counts the CPU's memory, announces every start and stop on stderr otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

Result = TypeVar("Result")


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Return the bytes that module(x) keeps from forward to backward, parameters and buffers aside.

    Every piece of memory counts once, and whole, however many tensors lie in it. x counts where it is kept.
    """
    pieces: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        pieces[storage.data_ptr()] = storage  # held, so that no other tensor takes its place while this counts
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        module(x)
    for tensor in (*module.parameters(), *module.buffers()):
        pieces.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in pieces.values())


def peak_bytes(call: Callable[[], Result], device: torch.device) -> tuple[int, Result]:
    """Return the most bytes held at once during a call, over those held before, and what the call returned.

    CUDA: bytes asked for, on the current device; what the allocator holds is rounded up, by as much as a megabyte a
    tensor. CPU: the sum of what torch and what NumPy hold at most, which is more than both at once where they take
    turns. Python traces NumPy's memory together with its own objects: some tens of KB.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        result = call()
        torch.cuda.synchronize()
        return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before, result
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
