"""Checkpoints of a run: written atomically, read back exactly.

A run folder holds the newest checkpoint, `last.pt`, and the one before, `previous.pt`. A checkpoint is first written to
`last.pt.partial` and synchronised to the disk; then `last.pt` is renamed to `previous.pt`, the new file to `last.pt`.
Renaming is atomic, so a run killed at any moment leaves at least one whole checkpoint where there was one before, and
training from either gives the same result. The keys of a checkpoint are those of
`models.checkpoint_keys.RunCheckpoint`.

`best.pt` is the checkpoint whose evaluation has the best first score. A checkpoint is written before it is evaluated,
so that `best.pt` is a second name (a hard link) of it, or a copy where a file system has no links.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ccgpu.models.checkpoint_keys import LAST, RUN_FORMAT, RunCheckpoint, run_problems
from ccgpu.models.weights import (
    broken_weights,
    differences,
    is_dense,
    listed,
    load_pickled,
    partial_path,
    write_partial,
)
from ccgpu.train.loaders import is_lost_loader
from ccgpu.train.optimisation.optimisers import state_problems

KEYS = frozenset(RunCheckpoint.__required_keys__)
PREVIOUS, ABANDONED = "previous.pt", "abandoned.pt"
BEST, ABANDONED_BEST = "best.pt", "abandoned-best.pt"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used; the message names the file and what to do."""


def seed_all(seed: int) -> None:
    """Seed all random generators whose states a checkpoint holds; `seed`: 0 .. 2**63 - 1."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  # NumPy takes no larger ones
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """Return the states of all random generators (torch on CPU and CUDA, NumPy, Python) as plain values and tensors."""
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002  # a timm or user module may draw from the global one
    assert isinstance(numpy_state, dict)  # legacy=False returns the dictionary form
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": {
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set all random generators to the states that `random_state` returned.

    All processes draw the same random numbers, so a CUDA device without a saved state gets the state of device 0.
    """
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        for device in range(torch.cuda.device_count()):
            known = state["cuda"][device] if device < len(state["cuda"]) else state["cuda"][0]
            torch.cuda.set_rng_state(known, device)
    numpy_state = state["numpy"]
    np.random.set_state(  # noqa: NPY002
        {
            "bit_generator": "MT19937",
            "state": {"key": numpy_state["key"].numpy().astype(np.uint32), "pos": numpy_state["pos"]},
            "has_gauss": numpy_state["has_gauss"],
            "gauss": numpy_state["gauss"],
        }
    )
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def remove_partial(folder: Path) -> None:
    """Remove the partial files that a run leaves in `folder` if it is killed while writing a checkpoint."""
    for name in (LAST, BEST):
        partial_path(folder / name).unlink(missing_ok=True)


def set_aside_newer(folder: Path, used: Path | None) -> None:
    """Rename last.pt to abandoned.pt if a run continues from `used` and that is the folder's previous.pt.

    Otherwise the next checkpoint would replace the good previous.pt by a last.pt that may be damaged.
    """
    last = folder / LAST
    if used is not None and last.exists() and used.resolve() == (folder / PREVIOUS).resolve():
        os.replace(last, folder / ABANDONED)


def find_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint of a folder, or None: last.pt, or previous.pt after a kill between two renames."""
    for name in (LAST, PREVIOUS):
        if (folder / name).exists():
            return folder / name
    return None


def save_checkpoint(folder: Path, checkpoint: RunCheckpoint) -> Path:
    """Write `checkpoint` as folder/last.pt, atomically; the former last.pt becomes previous.pt.

    Args:
        folder: an existing run folder.
        checkpoint: exactly the keys of `RunCheckpoint`, tensors and plain values.

    Returns:
        The path of last.pt.

    Raises:
        ValueError: checkpoint has other keys.
        CheckpointError: the file cannot be written (full disk, no permission). Earlier checkpoints stay, the partial
            file is removed.
        RuntimeError: a loader's process ended meanwhile.
    """
    if set(checkpoint) != KEYS:
        raise ValueError(f"save_checkpoint: checkpoint must have the keys {sorted(KEYS)}, got {tuple(checkpoint)}.")
    last = folder / LAST
    try:
        try:
            partial = write_partial(last, lambda file: torch.save(checkpoint, file))
            if last.exists():
                os.replace(last, folder / PREVIOUS)
            os.replace(partial, last)
        finally:
            remove_partial(folder)
        sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError of its own
        if is_lost_loader(error):  # raised wherever the main process is when it hears of it
            raise
        kept = find_checkpoint(folder)
        have = f"{kept} is kept" if kept is not None else "there is no earlier checkpoint"
        raise CheckpointError(
            f"save_checkpoint: {last} must be writable, got {_reason(error)!r} at iteration "
            f"{checkpoint['iteration']}; {have}. Make room on the disk, then continue with --resume."
        ) from error
    return last


def keep_best(folder: Path) -> None:
    """Make the newest checkpoint of a folder its best.pt, atomically.

    Raises:
        FileNotFoundError: there is no checkpoint.
        CheckpointError: the file cannot be written; the former best.pt stays, the partial file is removed.
    """
    newest = find_checkpoint(folder)
    if newest is None:
        raise FileNotFoundError(f"keep_best: folder must hold a checkpoint, got {folder} without one.")
    best, partial = folder / BEST, partial_path(folder / BEST)
    try:
        try:
            partial.unlink(missing_ok=True)
            _link_or_copy(newest, partial)
            os.replace(partial, best)
        finally:
            # Also after a rename: one of two names of the same file onto the other does nothing.
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        sync_folder(folder)
    except OSError as error:
        raise CheckpointError(
            f"keep_best: {best} must be writable, got {_reason(error)!r}; the evaluation is not recorded. Make room on "
            "the disk, then continue with --resume, which evaluates again."
        ) from error


def _link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it, synchronised to the disk, where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:  # what a file system without links raises differs
        shutil.copyfile(source, target)
        with open(target, "rb+") as file:
            os.fsync(file.fileno())


def check_best(folder: Path, iteration: int | None, start: int) -> None:
    """Let best.pt be the checkpoint of the best recorded evaluation, or be missing.

    A run that goes on from an earlier checkpoint than its newest has no records of the evaluations after it; a best.pt
    of one of these becomes abandoned-best.pt.

    Args:
        folder: the run folder, whose records have been cut back.
        iteration: that of the best recorded evaluation; None where there is none.
        start: iteration of the checkpoint that the run continues from, the newest of the folder.
    """
    best = folder / BEST
    found = _iteration_of(best) if best.exists() else None
    if found is not None and found == iteration:
        return
    if best.exists() and found == start:  # killed before the evaluation was recorded, which is now made again
        best.unlink()
    elif best.exists():
        os.replace(best, folder / ABANDONED_BEST)
    if iteration is not None and iteration == start and find_checkpoint(folder) is not None:
        keep_best(folder)


def _iteration_of(path: Path) -> int | None:
    """Return the iteration of a checkpoint without reading its tensors; None for a damaged file."""
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["iteration"])
    except Exception:  # for a damaged file the unpickler can raise anything
        return None


def sync_folder(folder: Path) -> None:
    """Synchronise renames within `folder` to the disk, where the system can (POSIX)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    """Return the system's message for a failed write, which torch may have wrapped in an error of its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.strerror if cause.strerror is not None else str(cause)
        cause = cause.__cause__ if cause.__cause__ is not None else cause.__context__
    return repr(error)


def read_checkpoint(path: Path) -> RunCheckpoint:
    """Read a checkpoint to the CPU; only tensors and plain values are unpickled (weights_only).

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated, damaged, of another kind or of another format version, or keys are
            missing or of a wrong type.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"read_checkpoint: path must be a checkpoint file, got {path}, which is none; name a run's {LAST}."
        )
    try:
        with open(path, "rb") as file:
            checkpoint = load_pickled(file)
    except Exception as error:  # for a damaged file the unpickler can raise anything
        raise CheckpointError(
            f"read_checkpoint: {path} must be a whole checkpoint of this program, got a truncated, damaged "
            f"or foreign file ({type(error).__name__} while reading); {_other_choice(path)}"
        ) from error
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise CheckpointError(
            f"read_checkpoint: {path} must be a checkpoint of a run, got a file of other contents (weights "
            f"alone?); {_other_choice(path)}"
        )
    if checkpoint["format"] != RUN_FORMAT:
        raise CheckpointError(
            f"read_checkpoint: {path} must have checkpoint format {RUN_FORMAT}, got {checkpoint['format']}; "
            "continue it with the version of ccgpu that wrote it."
        )
    problems = run_problems(checkpoint)
    if problems:
        raise CheckpointError(
            f"read_checkpoint: {path} must have the keys of a run's checkpoint, got {listed(problems)}; "
            f"{_other_choice(path)}"
        )
    return RunCheckpoint(**checkpoint)  # type: ignore[typeddict-item]  # the keys were checked above


def _other_choice(path: Path) -> str:
    previous = path.parent / PREVIOUS
    if path.name == LAST and previous.exists():
        return f"take the one before, {previous}."
    return "name another file."


def load_weights(saved: Mapping[str, Any], path: Path, net: nn.Module) -> None:
    """Copy the weights of a checkpoint into `net`; names, shapes and dtypes are compared before anything is copied.

    Raises:
        CheckpointError: the weights are of another network or number of classes, or are not finite.
    """
    own = net.state_dict()
    strangers = [f"{name} is no dense tensor" for name, value in saved.items() if not is_dense(value)]
    found = strangers or differences(saved, own)
    if found:
        raise CheckpointError(
            f"load_weights: {path} must hold this network, got {len(found)} difference(s): {listed(found, 5)}; "
            "use the backbone, head and number of classes the run was started with."
        )
    broken = broken_weights(saved)
    if broken:
        raise CheckpointError(
            f"load_weights: {path} must hold finite weights, got {listed(broken, 5)}; {_other_choice(path)}"
        )
    net.load_state_dict({**own, **saved})


def restore(
    checkpoint: RunCheckpoint,
    path: Path,
    data: str,
    net: nn.Module,
    optimiser: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    average: nn.Module | None = None,
) -> None:
    """Set network, optimiser, gradient scaler, average and random generators to the states of a checkpoint.

    Args:
        checkpoint: the checkpoint, read from `path`.
        path: the checkpoint's file, for messages.
        data: digest of this run's training images. It must equal the checkpoint's, because a position in the stream of
            samples is meaningful for the same images only.
        net: the network; like those below, it is changed in place.
        optimiser: the optimiser of `net`'s parameters.
        scaler: the gradient scaler of the run.
        average: the averaged network of a run with --ema.

    Raises:
        CheckpointError: the checkpoint is of another network, number of classes or dataset, or has no averaged network
            for `average`.
    """
    if checkpoint["data"] != data:
        raise CheckpointError(
            f"restore: the training images must be those that {path} was trained on, got others; name the "
            "same --data and --train-split, or start a new run in another --out."
        )
    if (average is None) != (checkpoint["average"] is None):
        raise CheckpointError(
            f"restore: {path} must hold averaged weights for a run with --ema alone, got "
            f"{'none' if checkpoint['average'] is None else 'some'}; {_other_choice(path)}"
        )
    load_weights(checkpoint["model"], path, net)
    if average is not None and checkpoint["average"] is not None:
        load_weights(checkpoint["average"], path, average)
    problems = state_problems(optimiser, checkpoint["optimiser"])
    if problems:
        raise CheckpointError(
            f"restore: {path} must hold the optimiser of this network, got {listed(problems, 5)}; {_other_choice(path)}"
        )
    part = "optimiser"
    try:
        optimiser.load_state_dict(checkpoint["optimiser"])
        part = "gradient scaler"
        if scaler.is_enabled():
            scaler.load_state_dict(checkpoint["scaler"])
        part = "random generators"
        set_random_state(checkpoint["random"])
    # What torch, NumPy and Python raise for states of another kind is not documented.
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"restore: {path} must hold the state of the run's {part}, got another one "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}); {_other_choice(path)}"
        ) from error


def check_finite(net: nn.Module, iteration: int) -> None:
    """Raise if weights are not finite, so that a broken checkpoint never replaces a good one.

    Raises:
        CheckpointError: a parameter or buffer contains infinity or NaN, or a variance is negative.
    """
    broken = broken_weights(net.state_dict())
    if broken:
        raise CheckpointError(
            f"check_finite: weights must be finite, got {listed(broken, 3)} after iteration {iteration}; nothing was "
            "saved. Continue from the last checkpoint with a lower --lr in a new run, or --amp off."
        )
