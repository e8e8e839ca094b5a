"""Memory of a computation in bytes: tensors that forward saves for backward, and peak allocation.

It is measured while a computation runs, or counted from the shapes of its tensors, which needs none of that memory
(`counted_peak`).
"""

from __future__ import annotations

import os
import tracemalloc
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ccgpu.bridges import numba_cpu

# The profiler, which counts the CPU's memory, prints every start and stop on stderr at lower log levels.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

Returned = TypeVar("Returned")
Enter = Callable[[str], None]
"""Told the name of a part of a computation when that part begins or goes on; the part before it pauses or ends."""
_PART = "ccgpu part: "  # how the names of parts begin among the profiler's events


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Return the bytes that the forward of module(x) saves for backward, without parameters and buffers.

    Every storage counts once and in full, however many tensors share it. x counts if it is saved.
    """
    return sum(saved_bytes_of_parts(lambda enter: module(x), module).values())


def saved_bytes_of_parts(call: Callable[[Enter], object], module: nn.Module) -> dict[str, int]:
    """Return the bytes that each part of a forward saves for backward, without the module's parameters and buffers.

    A storage counts for the part that saves it first. Tensors without data, such as fake ones, count as if they had
    them.

    Args:
        call: runs the forward, and tells the function that it gets which part begins; what it saves before it says so
            is that of the part "".
        module: the module whose parameters and buffers do not count.
    """
    part = ""
    storages: dict[int, tuple[str, torch.UntypedStorage]] = {}

    def enter(name: str) -> None:
        nonlocal part
        part = name

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages.setdefault(_key(storage), (part, storage))  # the reference keeps the key from being used again
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        call(enter)
    for tensor in (*module.parameters(), *module.buffers()):
        storages.pop(_key(tensor.untyped_storage()), None)
    found: dict[str, int] = {}
    for name, storage in storages.values():
        found[name] = found.get(name, 0) + storage.nbytes()
    return found


def _key(storage: torch.UntypedStorage) -> int:
    """Return what two tensors of one storage have in common, whether it has data or not."""
    return storage._cdata


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
    with _recorded() as (events, traced):
        result = call()
    return _peaks(events)[""] + traced[0], result


def peak_bytes_of_parts(call: Callable[[Enter], object], device: torch.device) -> dict[str, int]:
    """Return the peak of `peak_bytes` while each part of a call ran: the most that was allocated, by whichever part.

    Args:
        call: runs the computation, and tells the function that it gets which part begins; what it does before it says
            so is the part "".
        device: where the call computes.
    """
    part, peaks = "", {"": 0}
    if device.type == "cuda":

        def enter(name: str) -> None:
            nonlocal part
            torch.cuda.synchronize()
            peaks[part] = max(peaks.get(part, 0), torch.cuda.memory_stats()["requested_bytes.all.peak"] - before)
            torch.cuda.reset_peak_memory_stats()
            part = name

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        call(enter)
        enter("")
        return peaks
    arrays: dict[str, int] = {}  # NumPy's

    def note(name: str) -> None:
        nonlocal part
        arrays[part] = max(arrays.get(part, 0), tracemalloc.get_traced_memory()[1])
        tracemalloc.reset_peak()
        with record_function(_PART + name):  # among the allocations, in the profiler's own time
            part = name

    with _recorded() as (events, _):
        call(note)
        note("")
    return {name: peak + arrays.get(name, 0) for name, peak in _peaks(events).items()}


@contextmanager
def _recorded() -> Iterator[tuple[list[Any], list[int]]]:
    """Record what a block allocates on the CPU: the profiler's events, and the peak of NumPy's bytes, at its end."""
    numba_cpu.forget_memory()  # what threads keep from earlier calls belongs to this one as well
    events: list[Any] = []
    traced: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        tracemalloc.start()
        try:
            yield events, traced
            traced.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    events += recorded.profiler.kineto_results.events()


def _peaks(events: Sequence[Any]) -> Mapping[str, int]:
    """Return the most bytes that torch held in each part of a recorded block, "" where none was named."""
    wanted = [event for event in events if event.name() == "[memory]" or event.name().startswith(_PART)]
    part, held, peaks = "", 0, {"": 0}
    for event in sorted(wanted, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
        else:
            part = event.name().removeprefix(_PART)
        peaks[part] = max(peaks.get(part, 0), held)
    return peaks


def counted_peak(call: Callable[[], object]) -> int:
    """Return the peak of the bytes that a call on fake or meta tensors would allocate, from the shapes of its tensors.

        peak over the operations of  sum of nbytes of the storages that operations have made and that still exist

    Nothing is computed and no memory is taken, so the call may be one that no machine could hold. Left out is what an
    operation allocates only while it runs, such as the workspace of a convolution: the count is a lower bound of the
    peak that `peak_bytes` measures.
    """
    with _Storages() as storages:
        call()
    return storages.peak


class _Storages(TorchDispatchMode):
    """Adds up the storages that operations make, for as long as they exist."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.held = 0
        self.existing: set[int] = set()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        results = operation(*args, **(kwargs or {}))
        given = {_key(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and _key(result.untyped_storage()) not in given | self.existing:
                self._add(result.untyped_storage())
        self.peak = max(self.peak, self.held)
        return results

    def _add(self, storage: torch.UntypedStorage) -> None:
        self.existing.add(_key(storage))
        self.held += storage.nbytes()
        weakref.finalize(storage, self._remove, _key(storage), storage.nbytes())

    def _remove(self, key: int, nbytes: int) -> None:
        self.existing.discard(key)
        self.held -= nbytes
