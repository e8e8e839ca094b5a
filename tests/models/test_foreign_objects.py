"""Files with objects of other programs beside their weights, as mmengine writes: read, and nothing of them is run."""

from __future__ import annotations

import contextlib
import enum
import io
import os
import pickle
import sys
import tarfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from ccgpu.models import checkpoint
from ccgpu.models.backbones import build_backbone, load_imagenet
from ccgpu.models.ccnet import CCNet
from ccgpu.models.checkpoint_keys import FORMAT
from ccgpu.models.foreign_objects import Foreign, unpickle
from ccgpu.models.weights import read_content
from tests.models.mmsegmentation_configs import KINDS, WANTED, of_1x
from tests.models.published_files import State, saved
from tests.models.test_checkpoint import run_checkpoint

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7)}
FORMATS = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])


class HistoryBuffer:
    """As in mmengine: arrays, and methods by name."""

    def __init__(self) -> None:
        self._log_history = np.array([0.5, 0.25])
        self._count_history = np.array([1, 2], dtype=np.int64)
        self._max_length = 1000000
        self._statistics_methods = {"min": HistoryBuffer.min, "mean": HistoryBuffer.mean}

    def min(self) -> Any:
        return self._log_history.min()

    def mean(self) -> Any:
        return self._log_history.mean()


class ConfigDict(dict):  # type: ignore[type-arg]
    pass


class Items(list):  # type: ignore[type-arg]
    pass


class Names(set):  # type: ignore[type-arg]
    pass


class Slotted:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 3


class Priority(enum.Enum):
    HIGH = 1


PLACES = {
    "mmengine.logging.history_buffer": (HistoryBuffer,),
    "mmengine.config.config": (ConfigDict, Items, Names, Slotted),
    "mmengine.runner.priority": (Priority,),
}


@pytest.fixture
def mmengine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a file while there are modules of mmengine; afterwards there are none."""

    def write(content: Any, path: Path, **options: Any) -> Path:
        with monkeypatch.context() as patch:
            for place, classes in PLACES.items():
                parts = place.split(".")
                for count in range(1, len(parts) + 1):
                    name = ".".join(parts[:count])
                    patch.setitem(sys.modules, name, sys.modules.get(name, ModuleType(name)))
                for kind in classes:
                    setattr(sys.modules[place], kind.__name__, kind)
                    patch.setattr(kind, "__module__", place)
            torch.save(content, path, **options)
        assert not any(name.startswith("mmengine") for name in sys.modules)
        return path

    return write


def beside() -> dict[str, Any]:
    """Return what mmengine's checkpoints hold beside the weights, and more of its kind."""
    defaults: defaultdict[str, list[int]] = defaultdict(list, {"a": [1]})
    logs = OrderedDict({"train/loss": HistoryBuffer(), "lr": HistoryBuffer()})
    return {
        "message_hub": {"log_scalars": logs, "runtime_info": OrderedDict(iter=80000), "resumed_keys": OrderedDict()},
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": np.float64(0.01)}]},
        "param_schedulers": [ConfigDict(begin=0, values=Items([1, 2]), names=Names("ab")), Slotted(), Priority.HIGH],
        "numpy": [np.float32(3), np.arange(4).reshape(2, 2), np.array(["x"], dtype=object), np.dtype("<i4")],
        "rest": [defaults, Fraction(1, 2), b"bytes", bytearray(b"a"), {1, 2}, frozenset({3}), 2j, Path("a"), range(3)],
    }


@FORMATS
def test_a_checkpoint_of_mmengine(is_zip: bool, mmsegmentation: State, mmengine: Any, tmp_path: Path) -> None:
    meta = {
        "cfg": of_1x(*KINDS["ade20k"]),
        "dataset_meta": {"classes": tuple("abcdefg"), "palette": [[i, 0, 0] for i in range(7)]},
        "hook_msgs": ConfigDict(a=1),
        "seed": np.int64(3),
        "time": "20230101",
        "epoch": 1,
        "iter": np.int64(160000),
    }
    content = {"meta": meta, "state_dict": mmsegmentation, **beside()}
    path = mmengine(content, tmp_path / "iter_160000.pth", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(Exception, match="mmengine"):  # the file does hold such objects
        torch.load(path, weights_only=False)
    found = checkpoint.read(path)
    known = {name: meta[name] for name in ("cfg", "dataset_meta")}
    plain = checkpoint.read(saved({"meta": known, "state_dict": mmsegmentation}, tmp_path))
    assert found.network == plain.network
    assert (found.labels, found.prediction, found.dataset) == (plain.labels, WANTED["ade20k"][1], "ade20k")
    assert found.labels is not None
    assert found.labels["names"] == [*"abcdefg"]
    assert all(torch.equal(value, plain.weights[name]) for name, value in found.weights.items())
    assert len(found.weights) == len(plain.weights)
    assert CCNet.from_checkpoint(path).config["num_classes"] == 7


@FORMATS
def test_plain_values_are_kept_and_others_stand_for_themselves(is_zip: bool, mmengine: Any, tmp_path: Path) -> None:
    content = {"state_dict": WEIGHTS, "list": [1, "a", (2.5, None)], **beside()}
    path = mmengine(content, tmp_path / "a.pth", _use_new_zipfile_serialization=is_zip)
    found, _ = read_content("read", path, accepts=lambda _: True)
    assert found["list"] == [1, "a", (2.5, None)]
    assert all(torch.equal(found["state_dict"][name], value) for name, value in WEIGHTS.items())
    assert found["message_hub"]["runtime_info"] == OrderedDict(iter=80000)
    assert found["rest"][0] == {"a": [1]}
    assert torch.equal(found["optimizer"]["state"][0]["momentum_buffer"], torch.ones(2))
    loss = found["message_hub"]["log_scalars"]["train/loss"]
    assert isinstance(loss, Foreign)
    assert repr(loss) == "<mmengine.logging.history_buffer.HistoryBuffer, not read>"
    assert all(isinstance(value, Foreign) for value in [*found["param_schedulers"], *found["numpy"]])
    assert not vars(type(loss)).get("_statistics_methods")


def test_a_file_is_taken_only_where_it_is_asked_for(mmengine: Any, tmp_path: Path) -> None:
    path = mmengine({**WEIGHTS, "hub": HistoryBuffer()}, tmp_path / "a.pth")
    for options in ({}, {"accepts": lambda _: False}):
        with pytest.raises(ValueError, match=r"it holds a mmengine\.logging\.history_buffer\.HistoryBuffer beside its"):
            read_content("read", path, **options)
    with pytest.raises(ValueError, match="must map names to tensors and nothing else, got other entries: hub"):
        CCNet.from_checkpoint(path)
    with pytest.raises(ValueError, match=r"holds a mmengine\.logging"):
        load_imagenet(build_backbone("resnet18"), path)


@pytest.mark.parametrize("kind", ["run", "file"])
def test_files_of_ours_hold_no_such_objects(kind: str, mmengine: Any, tmp_path: Path) -> None:
    """One that does was changed by someone else."""
    net = CCNet("resnet18", 2, head_channels=8, auxiliary=False)
    if kind == "run":
        content = run_checkpoint(net, settings={"lr": Fraction(1, 2)})
    else:
        header = {"format": FORMAT, "network": net.config, "notes": [HistoryBuffer()]}
        content = {"ccgpu": header, "state_dict": net.state_dict()}
    path = mmengine(content, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"holds a (fractions\.Fraction|mmengine\.\S+) beside its weights"):
        CCNet.from_checkpoint(path)


# Attacks: each would make a file


class Attack:
    """Asks to be made by calling a function."""

    def __init__(self, *made: Any) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return self.made


def attacks(target: Path) -> dict[str, Any]:
    code = f"__import__('pathlib').Path({str(target)!r}).touch()"
    system = Attack(getattr, (Attack(__import__, ("os",)), "system"))
    return {
        "os.system": Attack(os.system, (f"touch {target}",)),
        "eval": Attack(eval, (code,)),
        "exec": Attack(exec, (code,)),
        "open": Attack(open, (str(target), "w")),
        "getattr": Attack(list, (Attack(map, (system, [f"touch {target}"])),)),
        "path": Attack(Path.touch, (target,)),
        "numpy": Attack(np.memmap, (str(target), "u1", "w+", 0, (4,))),
        "torch": Attack(torch.from_file, (str(target), True, 4)),
        "state": Attack(Fraction, (1,), {"__setattr__": Attack(os.system, (f"touch {target}",))}),
        "iterator": Attack(Items, (), None, iter([Attack(os.system, (f"touch {target}",))])),
    }


@pytest.mark.parametrize("name", attacks(Path()))
def test_the_attacks_are_real(name: str, tmp_path: Path) -> None:
    content = pickle.dumps(attacks(tmp_path / "made")[name], protocol=2)
    with contextlib.suppress(Exception):
        pickle.loads(content)
    assert (tmp_path / "made").exists()


@FORMATS
@pytest.mark.parametrize("name", attacks(Path()))
def test_nothing_of_a_file_is_run(name: str, is_zip: bool, tmp_path: Path, mmengine: Any) -> None:
    target = tmp_path / "made"
    content = {"meta": {"cfg": attacks(target)[name]}, "state_dict": WEIGHTS}
    path = mmengine(content, tmp_path / "a.pth", _use_new_zipfile_serialization=is_zip)
    found, _ = read_content("read", path, accepts=lambda _: True)
    assert isinstance(found["meta"]["cfg"], Foreign)
    assert torch.equal(found["state_dict"]["a"], WEIGHTS["a"])
    assert not target.exists()
    with pytest.raises(ValueError, match="no such layout"):
        CCNet.from_checkpoint(path)
    assert not target.exists()


@pytest.mark.parametrize(("module", "name"), [("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict")])
def test_what_is_not_foreign_is_not_changed(module: str, name: str) -> None:
    """A state that a file gives to a function or class would become its attributes, such as a function's defaults."""
    place = f"{module}\n{name}\n".encode()
    for state in (b"}X\x01\x00\x00\x00xK\x01s", b"N}X\x01\x00\x00\x00xK\x01s\x86"):  # {"x": 1}; (None, {"x": 1})
        with pytest.raises((pickle.UnpicklingError, TypeError)):
            unpickle(io.BytesIO(b"\x80\x02c" + place + state + b"b."))
    assert not hasattr(getattr(sys.modules[module], name), "x")


@pytest.mark.filterwarnings("ignore")
def test_programs_and_unpacked_files_are_refused(tmp_path: Path) -> None:
    program = tmp_path / "program.pt"
    torch.jit.script(torch.nn.ReLU()).save(str(program))
    with tarfile.open(tmp_path / "old.pt", "w") as file:
        file.add(program, "storages")
    for path in (program, tmp_path / "old.pt"):
        with pytest.raises(ValueError, match="cannot be read as one"):
            read_content("read", path, accepts=lambda _: True)


@FORMATS
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_file_cut_short_is_refused(share: float, is_zip: bool, mmengine: Any, tmp_path: Path) -> None:
    content = {"state_dict": {"a": torch.ones(3000)}, **beside()}
    path = mmengine(content, tmp_path / "a.pth", _use_new_zipfile_serialization=is_zip)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="must be a file of weights"):
        read_content("read", path, accepts=lambda _: True)
