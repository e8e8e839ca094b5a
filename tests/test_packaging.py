"""The wheel: one top-level name, usable next to other people's `kernels`, `models` and `train`."""

import configparser
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TREES = ("ccgpu", "kernels", "models", "train")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a copy of the tracked files."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    for name in TREES:
        for path in (ROOT / name).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                target = source / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """An environment with the wheel and a foreign package named kernels; the dependencies come from this one."""
    folder = tmp_path_factory.mktemp("environment")
    site = folder / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    for name in ("kernels", "models", "train"):
        (site / name).mkdir()
        (site / name / "__init__.py").write_text(f"OWNER = 'somebody else: {name}'\n")
    # -S and -I keep this environment's editable install out; the dependencies' folder comes last.
    dependencies = sysconfig.get_paths()["purelib"]
    start = f"import sys; sys.path[:0] = [{str(site)!r}]; sys.path.append({dependencies!r})\n"

    def run(code):
        answer = subprocess.run(
            [sys.executable, "-I", "-S", "-c", start + code],
            capture_output=True,
            text=True,
            cwd=folder,
            env={k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
        )
        assert answer.returncode == 0, answer.stderr
        return answer.stdout

    return run


def test_one_top_level_name(wheel):
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {n for n in names if not n.endswith(".dist-info")} == {"ccgpu"}


def test_wheel_holds_every_file(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    for folder in TREES:
        inside = "" if folder == "ccgpu" else "ccgpu/"
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"{inside}{path.relative_to(ROOT).as_posix()}" in held


def test_every_folder_with_modules_is_a_package_of_its_name():
    """An editable install finds what setup.cfg lists, and no more."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    listed = settings["options"]["packages"].split()
    folders = {path.parent.relative_to(ROOT) for tree in TREES for path in (ROOT / tree).rglob("*.py")}
    names = {".".join(folder.parts if folder.parts[0] == "ccgpu" else ("ccgpu", *folder.parts)) for folder in folders}
    assert listed == sorted(names)
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)


def test_works_next_to_foreign_packages(environment):
    answer = environment(
        "import kernels, models, train, ccgpu, ccgpu.kernels.reference, ccgpu.models.attention, ccgpu.models.labels\n"
        "import torch\n"
        "q = torch.randn(1, 2, 3, 4)\n"
        "print(kernels.OWNER, models.OWNER, train.OWNER)\n"
        "print(tuple(ccgpu.cca(q, q, q).shape), tuple(ccgpu.models.attention.RCCA(8)(torch.randn(1, 8, 3, 4)).shape))\n"
        f"print({str(ROOT)!r} in ccgpu.__file__, len(ccgpu.__path__))\n"
    )
    assert answer.splitlines() == [
        "somebody else: kernels somebody else: models somebody else: train",
        "(1, 2, 3, 4) (1, 8, 3, 4)",
        "False 1",
    ]


COMMANDS = [
    *("cityscapes", "ade20k", "voc", "lip", "camvid", "far_context"),
    *("evaluate", "predict", "attention", "export", "convert", "cost"),
]


def test_commands_run_from_the_wheel(environment):
    answer = environment(
        "import contextlib, io, runpy\n"
        f"for name in {COMMANDS}:\n"
        "    sys.argv = [name, '--help']\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        runpy.run_module(f'ccgpu.train.{name}', run_name='__main__')\n"
    )
    assert answer.count("usage: ") == len(COMMANDS)
    assert "--data" in answer


def test_the_wheel_has_the_command_ccgpu(wheel, environment):
    (name,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("entry_points.txt"))
    script = "ccgpu = ccgpu.train.__main__:main"
    assert zipfile.ZipFile(wheel).read(name).decode().split("\n")[:2] == ["[console_scripts]", script]
    answer = environment(
        "from ccgpu.train.__main__ import main\nassert main(['--help']) == 0\nassert 'torch' not in sys.modules\n"
        "assert main(['backends']) == 0\n"
    )
    assert answer.startswith("usage: ccgpu COMMAND")
    assert "\n  numba_cpu " in answer


def test_the_wheel_has_what_is_read_beside_the_modules(environment):
    """The CUDA sources and the page of `train.attention`."""
    answer = environment(
        "from ccgpu.kernels.cuda import configurations\n"
        "from ccgpu.train import attention\n"
        "print(len(configurations.source(configurations.configuration('forward', 'f32', 1, 64, "
        "configurations.Limits((9, 0), 227 * 1024, 132, 50 * 2**20)))) > 1000, "
        "'__DATA__' in attention.PAGE.read_text())\n"
    )
    assert answer.split() == ["True", "True"]


def test_command_runs_from_a_checkout_with_nothing_installed():
    dependencies = sysconfig.get_paths()["purelib"]
    code = f"import sys, runpy; sys.path[:0] = ['.']; sys.path.append({dependencies!r}); sys.argv = ['x', '--help']\n"
    code += "runpy.run_module('train.cityscapes', run_name='__main__')"
    command = [sys.executable, "-I", "-S", "-c", code]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr
    assert "--data" in answer.stdout
