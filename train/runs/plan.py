"""How a run starts: as a new run or an exact continuation, its settings and its folder; and the lock of the folder."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import filelock
import torch

from ccgpu.models.checkpoint_keys import RunCheckpoint
from ccgpu.train import distributed
from ccgpu.train.runs import boards, checkpoints, records
from ccgpu.train.runs.flags import Decides, add_flags, changed_settings, combine, saved_values
from ccgpu.train.runs.initial import Initial
from ccgpu.train.runs.scores import Scores

S = TypeVar("S")
LOCK = "run.lock"
# Longest wait for the lock, because the loader processes of a killed run outlive it a little and still hold it.
LOCK_SECONDS = 10.0
REPORT = "dataset.txt"  # what a folder of images and masks was taken for
SCENES = "scenes"  # folder of a run's synthetic images
# What a run may have written, beside settings.json, before its first checkpoint.
RUN_FILES = (REPORT, records.METRICS, "images", boards.TENSORBOARD, boards.WANDB, boards.WANDB_ID)


@dataclass(frozen=True)
class Plan(Generic[S]):
    """How a run starts.

    Attributes:
        settings: all settings.
        out: the run folder.
        resume: whether --resume was given; even then a run without a checkpoint starts from the beginning, and so its
            flags are free.
        checkpoint_path: file of `checkpoint`; None without one.
        checkpoint: the checkpoint to continue from; None starts from the beginning.
        lengths: see `RunCheckpoint`.
    """

    settings: S
    out: Path
    resume: bool
    checkpoint_path: Path | None
    checkpoint: RunCheckpoint | None
    lengths: tuple[int, ...]

    @property
    def start(self) -> int:
        """Number of iterations that are done already."""
        return 0 if self.checkpoint is None else self.checkpoint["iteration"]

    @property
    def former_length(self) -> int | None:
        """Iterations of the finished run that --extend makes longer; None without it."""
        former = None if self.checkpoint is None else self.checkpoint["lengths"][-1]
        return None if former == self.lengths[-1] else former

    @property
    def needs_checkpoint(self) -> bool:
        """Whether the run folder lacks the checkpoint that the run continues from, with the run's settings."""
        if self.checkpoint_path is None:
            return False
        elsewhere = self.checkpoint_path.resolve().parent != self.out.resolve()
        return elsewhere or self.former_length is not None


@dataclass(frozen=True)
class Request(Generic[S]):
    """A command line, and the run that it continues: a plan that lacks the dataset's recipe.

    Attributes:
        kind: dataclass of the settings.
        flags: the settings that the command line gives, by name.
        out: the run folder.
        resume: whether --resume was given.
        checkpoint_path: file of `checkpoint`; None without one.
        checkpoint: the checkpoint to continue from; None starts from the beginning.
        saved: all settings of the run to continue; None for a new run.
        kept: which of the saved settings a flag may not change, by what they decide.
        initial: the network that a run starts from (--init), which decides settings; None without one.
    """

    kind: type[S]
    flags: Mapping[str, Any]
    out: Path
    resume: bool
    checkpoint_path: Path | None
    checkpoint: RunCheckpoint | None
    saved: Mapping[str, Any] | None
    kept: Sequence[Decides]
    initial: Initial | None = None

    @property
    def given(self) -> Mapping[str, Any]:
        """The settings that the command line gives, its --init decides, or a run without a checkpoint began with."""
        saved = {} if self.saved is None or self.checkpoint is not None else self.saved
        known = {name: value for name, value in saved.items() if value is not None}
        return {**known, **({} if self.initial is None else self.initial.settings), **self.flags}

    def settings(self, presets: Mapping[str | None, Mapping[str, Any]]) -> S:
        """Return the settings for these presets; None is the recipe.

        Raises:
            ValueError: flags contradict the saved run, or it is of another version.
        """
        own = {} if self.initial is None else self.initial.settings
        preset = {**presets.get(self.flags.get("preset"), {}), **own}
        saved = self.saved
        if saved is not None and self.flags.get("init", saved.get("init")) != saved.get("init"):
            saved = {**saved, **own}  # a run without a checkpoint begins anew, from another network
        return combine(self.kind, preset=preset, saved=saved, flags=self.flags, kept=self.kept)

    def plan(self, presets: Mapping[str | None, Mapping[str, Any]]) -> Plan[S]:
        """Return the plan; errors are those of `settings`."""
        settings = self.settings(presets)
        length = settings.iterations  # type: ignore[attr-defined]  # every run has some
        known = () if self.checkpoint is None else tuple(self.checkpoint["lengths"])
        lengths = known if known[-1:] == (length,) else (*known, length)
        return Plan(settings, self.out, self.resume, self.checkpoint_path, self.checkpoint, lengths)


def read_request(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    settings: type[S],
    defaults: Mapping[str, Any],
    default_out: Callable[[Mapping[str, Any]], Path],
    unset: Mapping[str, str] | None = None,
) -> Request[S]:
    """Return the request of a command line; on resume the saved run is read. Nothing is written.

    Args:
        parser: the command's parser; --out, --resume and a flag for each setting are added to it.
        argv: the command line without the program's name; None: the process's own.
        settings: dataclass of `option`s, one of them named "preset".
        defaults: the defaults by name that the help shows, where they are not those of the dataclass.
        default_out: flags by name -> run folder, for a command line without --out.
        unset: see `add_flags`; "out" is the place of run folders for the help.

    Raises:
        ValueError: the run's folder and its checkpoint are of different runs, or of another version; --resume would go
            back to best.pt in the run's own folder; --extend comes without a finished run.
        FileNotFoundError: --resume names no file.
        FileExistsError: the folder of a new run holds a checkpoint or other files.
        checkpoints.CheckpointError: the checkpoint is damaged.
    """
    groups = add_flags(parser, settings, defaults, unset)
    run = groups.get("run", parser)
    place = (unset or {}).get("out", "in runs/")
    run.add_argument("--out", type=Path, metavar="DIR", help=f"run folder (default: {place})")
    run.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="continue a run exactly: from the last checkpoint of --out, or from PATH, a checkpoint or a run folder",
    )
    run.add_argument(
        "--extend",
        type=int,
        metavar="N",
        help="with --resume: train a finished run N steps more, by the schedule of the new length",
    )
    flags = vars(parser.parse_args(argv))
    out, resume, extend = flags.pop("out"), flags.pop("resume"), flags.pop("extend", None)
    if resume and Path(resume).is_dir():
        resume = str(checkpoints.find_checkpoint(Path(resume)) or Path(resume) / checkpoints.LAST)
    if out is None:
        out = Path(resume).parent if resume else default_out(flags)
    elsewhere = bool(resume) and Path(resume).resolve().parent != out.resolve()
    path = Path(resume) if resume else checkpoints.find_checkpoint(out) if resume is not None else None
    if path is not None and not elsewhere and path.name == checkpoints.BEST:
        raise ValueError(
            f"--resume must come with another --out for {path}, got the run's own folder, where all that was trained "
            "after it would be lost; name a new folder, or --resume alone continues the run."
        )
    if path is None or elsewhere:
        _check_new(out)
    checkpoint = None if path is None else checkpoints.read_checkpoint(path)
    saved = records.read_settings(out) if resume is not None and not elsewhere else None
    kept: Sequence[Decides] = ()
    if checkpoint is not None:
        if saved is not None:
            _check_same_run(settings, saved, checkpoint, path, out)
        saved = checkpoint["settings"]
        kept = ("result",) if elsewhere else ("result", "records")
    if extend is not None:
        saved = _extended(extend, flags, checkpoint, path)
    return Request(settings, flags, out, resume is not None, path, checkpoint, saved, kept)


def _extended(
    steps: int, flags: Mapping[str, Any], checkpoint: RunCheckpoint | None, path: Path | None
) -> dict[str, Any]:
    """Return the settings of a finished run that --extend makes longer by `steps`.

    Raises:
        ValueError: there is no finished run, or --iterations asks for another length.
    """
    if steps < 1:
        raise ValueError(f"--extend must be 1 or more, got {steps}")
    if checkpoint is None:
        raise ValueError("--extend must come with --resume and a finished run, got no checkpoint; train one first.")
    if "iterations" in flags:
        raise ValueError(f"--extend must come without --iterations, got both; --extend {steps} adds to the run's own.")
    done, length = checkpoint["iteration"], checkpoint["settings"]["iterations"]
    if done != length:
        patience = checkpoint["settings"].get("patience")
        early = " (--patience 0 with it, where --patience ended the run)" if patience else ""
        raise ValueError(
            f"--extend must come with a finished run, got {path} after {done} of {length} iterations; continue it "
            f"first, with --resume alone{early}."
        )
    return {**checkpoint["settings"], "iterations": length + steps}


def _check_new(out: Path) -> None:
    """Raise FileExistsError unless a new run may begin in a folder: one of a run without a checkpoint, or an empty one.

    A run that failed before its first checkpoint, for example because it ran out of memory, has nothing to lose: it is
    begun again in the same folder, with other flags if need be.
    """
    if not out.exists():
        return
    names = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
    left = {LOCK, SCENES, *((*RUN_FILES, records.SETTINGS) if records.SETTINGS in names else ())}
    if not out.is_dir() or not {name for name in names if not name.endswith(".partial")} <= left:
        raise FileExistsError(
            f"--out must be a new or empty folder, got {out}, which already holds files; continue the run in "
            "it with --resume, or name another folder."
        )
    records.read_settings(out)  # raises where the file is not one of a run


def _check_same_run(
    settings: type[S], folder: Mapping[str, Any], checkpoint: RunCheckpoint, path: Any, out: Path
) -> None:
    """Raise ValueError unless a checkpoint has the settings of the run in whose folder it lies."""
    ours = saved_values(settings, folder, f"resume: {out / records.SETTINGS}")
    theirs = saved_values(settings, checkpoint["settings"], f"resume: {path}")
    if ours["iterations"] in checkpoint["lengths"]:  # killed in between, --extend has changed the checkpoint alone
        ours = {**ours, "iterations": theirs["iterations"]}
    differing = changed_settings(settings, ours, theirs, ("result", "records"))
    if differing:
        raise ValueError(
            f"resume: {path} must be a checkpoint of the run in {out}, got one whose settings differ from "
            f"{out / records.SETTINGS}: {'; '.join(differing)}; put the run's own file back, or continue the "
            "checkpoint in another --out."
        )


@contextlib.contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Lock the run folder for other commands: two at once would mix their records and checkpoints.

    The first of several processes holds the lock, and the system releases it when that process ends, even by a kill.

    Raises:
        ValueError: another command holds the lock.
    """
    if not distributed.is_main():
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(out / LOCK, timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ValueError(
            f"--out must be a folder that no other command writes to, got {out}, where a run is under way; wait for "
            "it, stop it, or name another folder."
        ) from None
    try:
        yield
    finally:
        lock.release()


def open_run_folder(plan: Plan[Any], score: str) -> list[dict[str, Any]]:
    """Prepare the run folder for a new or continued run; return its records up to the plan's checkpoint.

    Args:
        plan: how the run starts.
        score: the dataset's first score, by which best.pt is chosen.

    Raises:
        FileExistsError: another command wrote a checkpoint since the plan was made, which found none.
        ValueError, OSError: the folder's records are damaged, or cannot be written.
    """
    distributed.let_first_process(lambda: _prepare_folder(plan, score))
    kept = records.read_records(plan.out / records.METRICS)
    distributed.wait_for_all()  # all processes have read before the first one adds a record
    return kept


def _prepare_folder(plan: Plan[Any], score: str) -> Generator[None, None, None]:
    """Cut the records, and best.pt, back to the plan's checkpoint."""
    if plan.checkpoint is None and checkpoints.find_checkpoint(plan.out) is not None:
        raise FileExistsError(f"--out must be a folder without a checkpoint, got {plan.out}, where one now is")
    metrics = plan.out / records.METRICS
    plan.out.mkdir(parents=True, exist_ok=True)
    yield
    checkpoints.remove_partial(plan.out)
    checkpoints.set_aside_newer(plan.out, plan.checkpoint_path)
    if plan.checkpoint is None:
        metrics.unlink(missing_ok=True)  # of a start that came to no checkpoint, maybe with other settings
    best = Scores.of(records.cut_records(metrics, plan.start), score).best()
    checkpoints.check_best(plan.out, None if best is None else best[0], plan.start)


def write_settings(plan: Plan[Any], device: torch.device, class_weights: Mapping[str, float]) -> None:
    """Write the run folder's settings.json, in the first of several processes; the others wait.

    Args:
        plan: settings and start of the run.
        device: the device of the run.
        class_weights: weights of the classes in the loss by name; none where all weigh the same.
    """
    distributed.let_first_process(lambda: _write_settings(plan, device, class_weights))


def _write_settings(
    plan: Plan[Any], device: torch.device, class_weights: Mapping[str, float]
) -> Generator[None, None, None]:
    yield
    settings = dataclasses.asdict(plan.settings)
    records.write_settings(plan.out, settings, device, distributed.world_size(), class_weights)
