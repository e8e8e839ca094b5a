import os
import pickle
import random
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ccgpu.models.checkpoint_keys import RUN_FORMAT, RunCheckpoint
from ccgpu.models.image_format import ImageFormat
from ccgpu.train.runs import checkpoints

ROOT = Path(__file__).resolve().parents[3]


def network(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, classes, 1))


def trained(classes: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    net = network(classes)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.randn(2, 3, 5, 5)).square().mean().backward()
    optimiser.step()
    return net, optimiser


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=False)


def checkpoint(iteration: int = 7, net: nn.Module | None = None, optimiser: Any = None) -> RunCheckpoint:
    if net is None:
        net, optimiser = trained()
    return {
        "format": RUN_FORMAT,
        "iteration": iteration,
        "position": 8 * iteration,
        "dataset": "cityscapes",
        "network": {"backbone": "resnet18"},
        "prediction": {},
        "value_range": None,
        "images": ImageFormat().as_plain(),
        "labels": {"names": ["road"], "colours": [[1, 2, 3]], "ids": [7], "void": []},
        "settings": {"lr": 0.1, "crop": (33, 33), "data": None},
        "lengths": [9],
        "data": "digest",
        "folder": None,
        "class_weights": None,
        "model": net.state_dict(),
        "average": None,
        "optimiser": optimiser.state_dict(),
        "scaler": scaler().state_dict(),
        "random": checkpoints.random_state(),
    }


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def draws() -> list[float]:
    # An odd number of normal draws leaves a spare one in NumPy's and Python's state.
    return [
        *torch.rand(3).tolist(),
        *np.random.rand(3).tolist(),  # noqa: NPY002
        float(np.random.randn()),  # noqa: NPY002
        random.random(),
        random.gauss(0, 1),
    ]


def test_random_state_returns_every_generator(tmp_path: Path) -> None:
    draws()
    checkpoints.save_checkpoint(tmp_path, checkpoint())
    first = draws()
    assert draws() != first
    checkpoints.set_random_state(checkpoints.read_checkpoint(tmp_path / "last.pt")["random"])
    assert draws() == first


def test_a_seed_decides_every_generator() -> None:
    before = checkpoints.random_state()
    try:
        checkpoints.seed_all(2**40 + 7)
        first = draws()
        checkpoints.seed_all(2**40 + 7)
        assert draws() == first
        checkpoints.seed_all(2**40 + 8)
        assert not {*draws()} & {*first}
    finally:
        checkpoints.set_random_state(before)


def test_restore_returns_network_and_optimiser(tmp_path: Path) -> None:
    net, optimiser = trained()
    checkpoints.save_checkpoint(tmp_path, checkpoint(5, net, optimiser))
    other, other_optimiser = trained()
    path = tmp_path / "last.pt"
    saved = checkpoints.read_checkpoint(path)
    checkpoints.restore(saved, path, "digest", other, other_optimiser, scaler())
    assert saved["iteration"] == 5
    assert saved["settings"] == {"lr": 0.1, "crop": (33, 33), "data": None}
    for name, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    for old, new in zip(net.parameters(), other.parameters(), strict=True):
        momentum = optimiser.state[old]["momentum_buffer"]
        assert torch.equal(momentum, other_optimiser.state[new]["momentum_buffer"])


def test_save_checkpoint_keeps_the_one_before(tmp_path: Path) -> None:
    for iteration in (1, 2, 3):
        checkpoints.save_checkpoint(tmp_path, checkpoint(iteration))
    assert files(tmp_path) == {"last.pt", "previous.pt"}
    assert checkpoints.read_checkpoint(tmp_path / "last.pt")["iteration"] == 3
    assert checkpoints.read_checkpoint(tmp_path / "previous.pt")["iteration"] == 2


def test_save_checkpoint_refuses_other_keys(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have the keys"):
        checkpoints.save_checkpoint(tmp_path, {"iteration": 1})
    assert files(tmp_path) == set()


@pytest.mark.parametrize("failing", ["write", "fsync"])
def test_save_checkpoint_on_a_full_disk_keeps_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    checkpoints.save_checkpoint(tmp_path, checkpoint(1))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((torch, "save", full) if failing == "write" else (os, "fsync", full)))
    with pytest.raises(checkpoints.CheckpointError, match=r"last\.pt.*No space left.*iteration 2.*is kept.*--resume"):
        checkpoints.save_checkpoint(tmp_path, checkpoint(2))
    assert files(tmp_path) == {"last.pt"}
    assert checkpoints.read_checkpoint(tmp_path / "last.pt")["iteration"] == 1


def test_a_loader_that_ends_while_a_checkpoint_is_written_is_no_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch raises such an error from a signal handler, wherever the main process is."""
    checkpoints.save_checkpoint(tmp_path, checkpoint(1))

    def lose(*_: Any) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(torch, "save", lose)
    with pytest.raises(RuntimeError, match=r"^DataLoader worker"):
        checkpoints.save_checkpoint(tmp_path, checkpoint(2))
    assert files(tmp_path) == {"last.pt"}


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is POSIX")
def test_save_checkpoint_over_the_file_size_limit_keeps_the_last(tmp_path: Path) -> None:
    """The system refuses the write in the middle of the file, which torch reports as an error of its own."""
    checkpoints.save_checkpoint(tmp_path, checkpoint(1))
    program = """
        import resource, sys, torch
        from pathlib import Path
        import ccgpu
        from ccgpu.train.runs import checkpoints
        folder = Path(sys.argv[1])
        saved = checkpoints.read_checkpoint(folder / "last.pt")
        saved["iteration"], saved["model"]["large"] = 2, torch.zeros(1_000_000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        try:
            checkpoints.save_checkpoint(folder, saved)
        except checkpoints.CheckpointError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "File too large" in done.stdout, done.stderr
    assert "at iteration 2" in done.stdout
    assert files(tmp_path) == {"last.pt"}
    assert checkpoints.read_checkpoint(tmp_path / "last.pt")["iteration"] == 1


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_read_checkpoint_names_a_truncated_file_and_the_way_out(tmp_path: Path, share: float) -> None:
    for iteration in (1, 2):
        checkpoints.save_checkpoint(tmp_path, checkpoint(iteration))
    path = tmp_path / "last.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(checkpoints.CheckpointError, match=r"last\.pt must be a whole checkpoint.*previous\.pt"):
        checkpoints.read_checkpoint(path)
    assert checkpoints.read_checkpoint(tmp_path / "previous.pt")["iteration"] == 1


def test_read_checkpoint_refuses_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "some.pt"
    path.write_text("not a checkpoint")
    with pytest.raises(checkpoints.CheckpointError, match=r"some\.pt must be a whole checkpoint"):
        checkpoints.read_checkpoint(path)
    torch.save(network().state_dict(), path)
    with pytest.raises(checkpoints.CheckpointError, match="other contents"):
        checkpoints.read_checkpoint(path)
    torch.save({**checkpoint(), "format": 99}, path)
    with pytest.raises(checkpoints.CheckpointError, match=f"format {RUN_FORMAT}, got 99"):
        checkpoints.read_checkpoint(path)
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        checkpoints.read_checkpoint(tmp_path / "absent.pt")


class _Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_read_checkpoint_runs_no_code_of_the_file(tmp_path: Path) -> None:
    torch.save({**checkpoint(), "data": _Trap(tmp_path / "ran")}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(_Trap(tmp_path / "ran"), protocol=2))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(checkpoints.CheckpointError, match=name):
            checkpoints.read_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_restore_refuses_another_network_and_copies_nothing(tmp_path: Path) -> None:
    net, optimiser = trained(classes=5)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(checkpoints.CheckpointError, match=r"2\.weight must be \(5, 4, 1, 1\), got \(3, 4, 1, 1\)"):
        checkpoints.restore(checkpoint(), tmp_path / "x.pt", "digest", net, optimiser, scaler())
    with pytest.raises(checkpoints.CheckpointError, match=r"surplus: 0\.weight"):
        checkpoints.restore(checkpoint(), tmp_path / "x.pt", "digest", nn.Linear(2, 2), optimiser, scaler())
    for name, value in net.state_dict().items():
        assert torch.equal(before[name], value)


def test_restore_refuses_other_training_images(tmp_path: Path) -> None:
    net, optimiser = trained()
    with pytest.raises(checkpoints.CheckpointError, match=r"x\.pt was trained on.*--data"):
        checkpoints.restore(checkpoint(), tmp_path / "x.pt", "other", net, optimiser, scaler())


def test_find_checkpoint_takes_previous_after_a_kill_between_the_renames(tmp_path: Path) -> None:
    assert checkpoints.find_checkpoint(tmp_path) is None
    for iteration in (1, 2):
        checkpoints.save_checkpoint(tmp_path, checkpoint(iteration))
    assert checkpoints.find_checkpoint(tmp_path) == tmp_path / "last.pt"
    (tmp_path / "last.pt").rename(tmp_path / "last.pt.partial")
    assert checkpoints.find_checkpoint(tmp_path) == tmp_path / "previous.pt"
    checkpoints.remove_partial(tmp_path)
    assert files(tmp_path) == {"previous.pt"}


def test_set_aside_newer_protects_the_previous_one_that_a_run_continues_from(tmp_path: Path) -> None:
    for iteration in (1, 2):
        checkpoints.save_checkpoint(tmp_path, checkpoint(iteration))
    checkpoints.set_aside_newer(tmp_path, tmp_path / "last.pt")
    assert files(tmp_path) == {"last.pt", "previous.pt"}
    checkpoints.set_aside_newer(tmp_path, tmp_path / "previous.pt")
    assert files(tmp_path) == {"abandoned.pt", "previous.pt"}
    checkpoints.save_checkpoint(tmp_path, checkpoint(3))
    assert checkpoints.read_checkpoint(tmp_path / "previous.pt")["iteration"] == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_check_finite_refuses_broken_weights(value: float) -> None:
    net = network()
    checkpoints.check_finite(net, 4)
    with torch.no_grad():
        net.state_dict()["1.running_var"][2] = value
    with pytest.raises(checkpoints.CheckpointError, match=r"1\.running_var has 1 of 4 values .* after iteration 4"):
        checkpoints.check_finite(net, 4)


def broken(*path: Any, value: Any) -> RunCheckpoint:
    """Return a checkpoint with one value in its depth replaced, or removed where value is KeyError."""
    content = inner = checkpoint()
    for key in path[:-1]:
        inner = inner[key]
    if value is KeyError:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("iteration",), "7", "got iteration of type str"),
        (("iteration",), True, "got iteration of type bool"),
        (("position",), -8, "got position -8"),
        (("model",), [1, 2], "got model of type list"),
        (("class_weights",), [1.0, -2.0], r"got class_weights \[1.0, -2.0\]"),
        (("class_weights",), [float("nan")], r"got class_weights \[nan\]"),
        (("class_weights",), "many", "got class_weights 'many'"),
        (("settings",), None, "got settings of type NoneType"),
        (("network",), 3, "got network of type int"),
        (("labels",), {"names": [3]}, r"got labels \{'names': \[3\]\}"),
        (("random",), KeyError, "got no random"),
        (("model", "0.weight"), 3, "0.weight is no dense tensor"),
        (("model", "0.weight"), torch.zeros(2).to_sparse(), "0.weight is no dense tensor"),
        (("model", "0.bias"), torch.tensor([1.0, float("nan"), 0, 0]), "0.bias has 1 of 4 values NaN"),
        (("optimiser", "state"), KeyError, "got no state of the parameters"),
        (("optimiser", "state"), {0: {"momentum_buffer": torch.zeros(2)}}, "got another state for parameter 0"),
        (("optimiser", "state"), {"a": {}}, "got another state for parameter a"),
        (
            ("optimiser", "state"),
            {0: {"momentum_buffer": torch.full((4, 3, 3, 3), torch.inf)}},
            "NaN or infinity in the",
        ),
        (("optimiser", "param_groups"), KeyError, r"the run's optimiser, got another one \(KeyError"),
        (("optimiser", "param_groups"), [], r"the run's optimiser, got another one \(ValueError"),
        (("random",), {}, r"random generators, got another one \(KeyError"),
        (("random", "torch"), torch.zeros(3), r"random generators, got another one \(TypeError"),
        (("random", "numpy"), [], r"random generators, got another one \(TypeError"),
        (("random", "python"), (3,), r"random generators, got another one \(ValueError"),
    ],
)
def test_sections_of_another_kind_are_told(tmp_path: Path, path: tuple[Any, ...], value: Any, message: str) -> None:
    file = tmp_path / "last.pt"
    torch.save(broken(*path, value=value), file)
    net, optimiser = trained()
    before = checkpoints.random_state()
    try:
        with pytest.raises(checkpoints.CheckpointError, match=rf"last\.pt must hold.*{message}|must have.*{message}"):
            checkpoints.restore(checkpoints.read_checkpoint(file), file, "digest", net, optimiser, scaler())
    finally:
        checkpoints.set_random_state(before)


def test_a_changed_bit_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    """Unlike its settings and weights, torch's archive of them has a checksum of every record."""
    path, draw = checkpoints.save_checkpoint(tmp_path, checkpoint()), random.Random(3)
    content = path.read_bytes()
    whole = repr(checkpoints.read_checkpoint(path))
    found = 0
    for _ in range(300):
        changed = bytearray(content)
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            assert repr(checkpoints.read_checkpoint(path)) == whole
        except checkpoints.CheckpointError:
            found += 1
    assert found > 100


def test_nothing_is_left_where_a_checkpoint_cannot_be_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.save_checkpoint(tmp_path, checkpoint(1))
    for error in (PermissionError(13, "Permission denied"), KeyboardInterrupt()):
        monkeypatch.setattr(os, "replace", lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises((checkpoints.CheckpointError, KeyboardInterrupt)):
            checkpoints.save_checkpoint(tmp_path, checkpoint(2))
        assert files(tmp_path) == {"last.pt"}
