"""torch.hub loads from a checkout, in another folder and with nothing of this project installed."""

from __future__ import annotations

import configparser
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
# A program of somebody who has packages named like our folders, some imported before the hub loads and some after.
PROGRAM = f"""
import sys
sys.path[:0] = ["."]
sys.path.append({sysconfig.get_paths()["purelib"]!r})  # the dependencies, without this environment's editable install
import models
import torch

path = {str(ROOT)!r}
hub = dict(source="local", trust_repo=True)
x = torch.randn(1, 16, 5, 7)
net = torch.hub.load(path, "ccnet", "resnet18", num_classes=5, head_channels=8, **hub)
rcca = torch.hub.load(path, "rcca", 16, recurrence=3, gamma=1.0, **hub)
loop = torch.hub.load(path, "criss_cross_attention", 16, gamma=1.0, **hub)
loop.load_state_dict(rcca.state_dict())
torch.testing.assert_close(rcca(x), loop(loop(loop(x))))
assert not torch.equal(rcca(x), x)
assert net.eval()(torch.zeros(1, 3, 33, 33)).shape == (1, 5, 33, 33)
torch.save({{"config": 1}}, "broken.pt")
try:
    torch.hub.load(path, "segmenter", "broken.pt", **hub)
except ValueError as error:
    assert "broken.pt" in str(error), error
else:
    raise AssertionError("a file without a network was accepted")
import kernels.deep, train
assert [models.OWNER, train.OWNER, kernels.deep.OWNER] == ["theirs"] * 3
assert path not in sys.path
assert not [name for name in ("tests", "docs", "benchmarks", "hubconf") if name in sys.modules]
import ccgpu.models.segmenter  # imported later, when the hub has taken the folder off the path again
print("done")
"""


def test_the_hub_loads_and_leaves_the_packages_of_the_caller_alone(tmp_path: Path) -> None:
    for name in ("models/__init__.py", "train.py", "kernels/__init__.py", "kernels/deep.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('OWNER = "theirs"\n')
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "done"


def hubconf() -> ModuleType:
    """hubconf.py as torch.hub imports it."""
    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_entry_points_are_these_and_say_what_they_take() -> None:
    """torch.hub lists every callable without an underscore, and shows its docstring."""
    module = hubconf()
    points = {name: getattr(module, name) for name in dir(module) if not name.startswith("_")}
    found = {name: value.__doc__ for name, value in points.items() if callable(value)}
    assert found.keys() == {"ccnet", "criss_cross_attention", "rcca", "segmenter"}
    for name, text in found.items():
        assert text.startswith("Return a"), name
        assert f'torch.hub.load(path, "{name}"' in text


def test_every_dependency_is_one_of_the_package() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    required = {line.partition(">")[0] for line in settings["options"]["install_requires"].split()}
    dependencies = {"PIL": "pillow"}
    assert {dependencies.get(name, name) for name in hubconf().dependencies} <= required
