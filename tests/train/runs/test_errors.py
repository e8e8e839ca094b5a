"""A failure is explained in one line that says what to do; a mistake of the program keeps its traceback."""

import os
import signal
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from ccgpu.train import distributed
from ccgpu.train.loaders import load_batches
from ccgpu.train.runs import errors


class Deadly(Dataset[dict[str, Any]]):
    def __getitem__(self, index: int) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}


def test_a_loader_that_is_killed_is_told_in_one_line() -> None:
    batches = load_batches(Deadly(), batches=[[0]], workers=1, device=torch.device("cpu"))
    with pytest.raises(RuntimeError) as caught:
        next(iter(batches))
    message = errors.failure(caught.value, again="run it again", smaller="take fewer")
    assert message.startswith("a loader's process ended (DataLoader worker")
    assert message.endswith("lower --workers, then run it again")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("tried 3 GiB"), "out of memory (tried 3 GiB); take fewer"),
        (MemoryError("Unable to allocate 3 GiB"), "out of memory (Unable to allocate 3 GiB); take fewer"),
        (
            RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory\nat"),
            "can't allocate memory); take fewer",
        ),
        (PermissionError(13, "Permission denied", "a.png"), "'a.png'; make room or give access, then run it again"),
        (
            RuntimeError(
                "unable to open shared memory object </torch_1> in read-write mode: No space left on device (28)"
            ),
            "No space left on device (28)); give a container more of it with --shm-size 8g or --ipc=host, or add "
            "--workers 0, then run it again",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that"),
            "--shm-size 8g or --ipc=host, or add --workers 0",
        ),
        (
            RuntimeError("unable to write to file </torch_3_4>: No space left on device (28)"),
            "--shm-size 8g or --ipc=host, or add --workers 0",
        ),
        (
            RuntimeError("unable to allocate shared memory(shm) for file </torch_3_4>: Success (0)"),
            "shared memory ran out, through which loader processes hand over images (unable",
        ),
        (
            OSError(24, "Too many open files"),
            "raise ulimit -n or lower --workers, then run it again",
        ),
        (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1. GLHF"), "another process ended ([gloo]"),
    ],
)
def test_failures_are_told_with_what_to_do(error: Exception, message: str) -> None:
    assert message in errors.failure(error, again="run it again", smaller="take fewer")


def test_an_error_of_the_program_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="size of tensor a"):
        errors.failure(RuntimeError("The size of tensor a (3) must match"), again="", smaller="")


def test_every_process_tells_its_own_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert not distributed.is_main()
    assert errors.fail("camvid", "--lr must be more than 0", 2) == 2
    assert capsys.readouterr().err == ""
    assert errors.fail("camvid", "a.png does not decode", 1, everywhere=True) == 1
    assert capsys.readouterr().err == "camvid: a.png does not decode\n"


@pytest.mark.parametrize(
    ("stage", "error", "status", "message"),
    [
        ("prepare", ValueError("--lr must be more than 0"), 2, "camvid: --lr must be more than 0"),
        ("prepare", KeyboardInterrupt(), 130, "camvid: stopped"),
        ("run", ArithmeticError("nan in iteration 3"), 1, "camvid: nan in iteration 3"),
        ("run", LookupError("too many positions"), 2, "camvid: too many positions"),
        ("run", MemoryError("3 GiB"), 1, "camvid: out of memory (3 GiB); take fewer"),
        ("run", KeyboardInterrupt(), 130, "camvid: stopped"),
    ],
)
def test_run_command_tells_an_error_by_its_stage_and_kind(
    stage: str, error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepare() -> str:
        if stage == "prepare":
            raise error
        return "prepared"

    def run(prepared: str) -> int:
        assert prepared == "prepared"
        raise error

    explained = {ArithmeticError: 1, LookupError: 2}
    found = errors.run_command("camvid", prepare, run, again="", smaller="take fewer", explained=explained)
    assert (found, capsys.readouterr().err) == (status, f"{message}\n")


def test_run_command_raises_mistakes_of_the_program() -> None:
    with pytest.raises(TypeError, match="NoneType"):
        errors.run_command("camvid", lambda: None, lambda nothing: len(nothing), again="", smaller="")
    assert errors.run_command("camvid", lambda: 3, lambda prepared: prepared, again="", smaller="") == 3
