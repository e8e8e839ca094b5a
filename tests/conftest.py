import gc
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.error_table import HEADING, TABLES, report

if not torch.cuda.is_available():
    # Numba looks at this when numba.cuda is first imported: its kernels then run in a simulator, on NumPy arrays.
    os.environ.setdefault("NUMBA_ENABLE_CUDASIM", "1")
    # Each thread of a simulated block is a Python thread that waits for its turn: this makes the turns short.
    sys.setswitchinterval(1e-5)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keep the garbage collector from what collecting tests builds up: modules and thousands of tests, which stay.

    It would look through them again and again, most of all where a test or what it calls collects garbage itself.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """On a worker of pytest-xdist: hand the tables over."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["error_tables"] = [table.contents() for table in TABLES]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Where pytest-xdist shares the tests out: take a worker's tables, unless it died before it gave any."""
    for table, contents in zip(TABLES, getattr(node, "workeroutput", {}).get("error_tables", ()), strict=False):
        table.merge(contents)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the tables of errors that the tests of values recorded."""
    lines = report()
    if lines:
        terminalreporter.section(HEADING)
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(autouse=True, scope="session")
def _caches_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the cache of checked files out of the user's folder, also in the processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CCGPU_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _files_need_not_outlast_a_power_cut() -> Iterator[None]:
    """Spare the disk: nothing waits until the files of tests are on it, and those removed soon never get there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session")
def cuda_on_cpu() -> ModuleType:
    """The module tests/cuda_on_cpu/device.py: compiles CUDA sources for this CPU and launches them."""
    name = "cuda_on_cpu_device"
    if name not in sys.modules:
        path = Path(__file__).resolve().parent / "cuda_on_cpu" / "device.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    module = sys.modules[name]
    try:
        module.compiler()
    except module.NoCompiler as reason:
        pytest.skip(str(reason))
    return module
