"""Loader processes: samples read ahead by worker processes, which begin and end with the process that trains."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any, TypeAlias

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

Sample: TypeAlias = dict[str, Any]


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


LOADERS = min(4, available_cores())
"""Loader processes where nothing else is asked for: torch warns of more than there are cores."""


def load_batches(
    dataset: Dataset[Sample],
    *,
    batches: Iterable[list[int]],
    workers: int,
    device: torch.device,
    again: bool = False,
) -> DataLoader[Sample]:
    """Return a loader whose samples are the same, in the same order, for any number of workers.

    Workers are spawned, not forked: Numba's OpenMP threads kill forked children. Each computes with one thread. The
    loader leaves the global random state alone, because exact resume depends on it.

    Args:
        dataset: index -> sample.
        batches: the indices of each batch.
        workers: loader processes; 0: samples are read in this process.
        device: the device of the network; memory is pinned for CUDA.
        again: whether the loader is iterated more than once; workers then stay alive after the last batch.

    Raises:
        OSError: (from the loader's iterator) the processes cannot be started.
    """
    return _Loader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        worker_init_fn=_start_worker,
        multiprocessing_context="spawn" if workers > 0 else None,
        persistent_workers=again and workers > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
    )


def is_lost_loader(error: BaseException) -> bool:
    """Return whether a loader's process ended, as where memory runs out."""
    return str(error).startswith("DataLoader worker")


class _Loader(DataLoader[Sample]):
    def __iter__(self) -> Any:
        try:
            with _blocked_signals():
                return super().__iter__()
        except OSError as error:  # of queues, locks and processes: nothing is read yet
            for frame, _ in traceback.walk_tb(error.__traceback__):
                unfinished: Any = frame.f_locals.get("self")
                # torch's iterator expects this when it is deleted, even if its own __init__ did not come so far.
                if isinstance(unfinished, _MultiProcessingDataLoaderIter) and not hasattr(unfinished, "_shutdown"):
                    unfinished._shutdown = True
            raise OSError(
                f"load_batches: loader processes must be able to start, got {error}; lower --workers, or add --workers "
                "0; give a container more memory for them with --shm-size 8g or --ipc=host."
            ) from error


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Put Ctrl-C and SIGTERM off, and start processes that never see the former.

    Ctrl-C reaches the whole process group, a scheduler's SIGTERM all processes of a job, but only the main process
    decides when its workers end: were they to end first, it would fail amid the checkpoint that it writes before it
    stops. They inherit the blocked signals, as they could not handle them in the seconds in which they import their
    modules. (Windows has no blocked signals; macOS does not tell who sent a SIGTERM, so it stays unblocked there.)
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    blocked = {signal.SIGINT, signal.SIGTERM} if hasattr(signal, "sigwaitinfo") else {signal.SIGINT}
    resource_tracker.ensure_running()  # before Python 3.13 its start unblocks the signals again
    former = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _start_worker(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_main_process, daemon=True).start()
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_end_if_main_process_asks, daemon=True).start()


def _end_if_main_process_asks() -> None:
    """Wait for a SIGTERM from the main process, which ends stuck workers so, and end this worker; ignore others'."""
    main = multiprocessing.parent_process()
    assert main is not None  # workers are spawned by multiprocessing
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main.pid:
        pass
    os._exit(0)


def _end_with_main_process() -> None:
    """Wait until the main process has ended, by a kill too, and end this worker.

    torch's own watchdog compares the parent with the one that it found first. Where the main process is killed while
    its workers import their modules, that is already another process, and the worker would wait for it for ever.
    """
    main = multiprocessing.parent_process()
    assert main is not None  # workers are spawned by multiprocessing
    main.join()
    os._exit(1)
