"""Loader processes: the same samples for any number of them; they end with the main process, and it with Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from ccgpu.models.normalisation import Normalise
from ccgpu.train import camvid, engine, evaluate
from ccgpu.train.cityscapes import find_pairs
from ccgpu.train.data.cityscapes_labels import CITYSCAPES
from ccgpu.train.data.samples import EvaluationSet, StreamSampler, TrainStream
from ccgpu.train.data.transforms import EvaluationTransform, TrainTransform
from ccgpu.train.loaders import load_batches
from tests.train.training import TINY, told

ROOT = Path(__file__).resolve().parents[2]
TELLS_SENDERS = pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the system does not tell who signals")


def test_load_batches_is_the_same_with_a_worker_and_leaves_the_random_state_alone(tiny_data: Path) -> None:
    clips = [(pair,) for pair in find_pairs(tiny_data, "train")]
    transform = TrainTransform((24, 32), (0.75, 2.0), True, Normalise())
    stream = TrainStream(clips, CITYSCAPES, transform, seed=3, length=40)
    before = torch.get_rng_state()
    seen = []
    for workers in (0, 1):
        order = StreamSampler(4, 7, 2)
        loader = load_batches(stream, batches=order, workers=workers, device=torch.device("cpu"))
        seen.append(list(loader))
    assert torch.equal(torch.get_rng_state(), before)
    assert [batch["names"] for batch in seen[0]] == [batch["names"] for batch in seen[1]]
    for alone, worker, positions in zip(*seen, StreamSampler(4, 7, 2), strict=True):
        assert torch.equal(alone["image"], worker["image"])
        assert torch.equal(alone["label"], worker["label"])
        assert torch.equal(alone["image"][1], stream[positions[1]]["image"])


def test_load_batches_of_an_evaluation_set(tiny_data: Path) -> None:
    clips = [((pair,), 0) for pair in find_pairs(tiny_data, "val")]
    data = EvaluationSet(clips, CITYSCAPES, EvaluationTransform(Normalise()))
    loader = load_batches(data, batches=[[0], [2]], workers=0, device=torch.device("cpu"))
    assert [batch["names"][0] for batch in loader] == [data[0]["names"], data[2]["names"]]


# A process that starts a loader and says so, at a time when it still imports torch, long before its first sample.
LOADERS = """
import sys, time
import torch
from tests.train.test_loaders import Numbers
from ccgpu.train.loaders import load_batches
from ccgpu.train.runs.interrupts import DeferredInterrupts

if __name__ == "__main__":
    with DeferredInterrupts() as interrupts:
        batches = load_batches(Numbers(), batches=[[0], [1]], workers=1, device=torch.device("cpu"))
        loading = iter(batches)
        print(*(worker.pid for worker in loading._workers), flush=True)
        if "wait" in sys.argv:
            time.sleep(600)
        print(*(int(batch["number"]) for batch in loading), interrupts(), flush=True)
"""


class Numbers(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"number": 7 + index}


def test_loaders_that_cannot_be_started_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a container has no shared memory for the locks of their queues, or allows no more processes."""

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("multiprocessing.context.SpawnProcess._Popen", staticmethod(refuse))
    batches = load_batches(Numbers(), batches=[[0]], workers=1, device=torch.device("cpu"))
    with pytest.raises(OSError, match=r"No space left on device; lower --workers, or add --workers 0.* --shm-size 8g"):
        iter(batches)


def start_loaders(folder: Path, *arguments: str) -> tuple[subprocess.Popen[str], list[int]]:
    """Run LOADERS in a process group of its own; return it and the loaders' process ids."""
    (folder / "loaders.py").write_text(LOADERS)
    process = subprocess.Popen(
        [sys.executable, str(folder / "loaders.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    return process, [int(word) for word in process.stdout.readline().split()]


def is_running(process: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks for processes in /proc")
def test_loaders_end_when_the_main_process_is_killed_while_they_start(tmp_path: Path) -> None:
    process, loaders = start_loaders(tmp_path, "wait")
    assert len(loaders) == 1
    assert all(map(is_running, loaders))
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    try:
        while any(map(is_running, loaders)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        for loader in filter(is_running, loaders):
            os.kill(loader, signal.SIGKILL)


@TELLS_SENDERS
def test_a_loader_ends_when_the_main_process_asks_it_to() -> None:
    """As torch and multiprocessing do with those that are stuck; a signal from elsewhere is not heard."""
    loading = iter(load_batches(Numbers(), batches=[[0], [1]], workers=1, device=torch.device("cpu")))
    next(loading)
    (worker,) = loading._workers
    subprocess.run(["kill", str(worker.pid)], check=True)
    assert int(next(loading)["number"]) == 8
    deadline = time.monotonic() + 60
    while worker.exitcode is None:
        assert time.monotonic() < deadline
        worker.terminate()  # again, because the system delivers two signals at once as one
        worker.join(0.2)
    assert worker.exitcode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="process groups are POSIX")
@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGTERM", marks=TELLS_SENDERS)])
def test_loaders_that_start_survive_signals_to_all_processes(name: str, tmp_path: Path) -> None:
    """Ctrl-C reaches the process group, a scheduler's SIGTERM the job; the main process decides when its loaders end.

    A loader that ended at once would raise an error in the main process, which may be writing its last checkpoint.
    """
    process, loaders = start_loaders(tmp_path)
    os.killpg(process.pid, getattr(signal, name))
    out, errors = process.communicate(timeout=60)
    assert (out, errors) == ("7 8 True\n", "")
    assert not any(map(is_running, loaders))


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_a_signal_that_ends_the_loaders_too_stops_the_command(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A scheduler sends SIGTERM to all processes of a job: the loaders end, which is no failure of theirs."""

    def lose_a_loader() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. ")

    def train(*_: Any, **__: Any) -> Iterator[engine.Step]:
        lose_a_loader()
        yield

    monkeypatch.setattr(engine, "train", train)
    monkeypatch.setattr(engine, "evaluate", lambda *_, **__: lose_a_loader())
    assert camvid.main([*TINY, "--context", "none", "--out", str(tmp_path / "run")]) == 143
    assert (
        told(capsys, "train") == f"train: stopped; continue with ccgpu train camvid --resume --out {tmp_path / 'run'}"
    )
    assert evaluate.main(["--checkpoint", str(trained / "last.pt"), "--workers", "0"]) == 143
    assert told(capsys, "evaluate") == "evaluate: stopped"
