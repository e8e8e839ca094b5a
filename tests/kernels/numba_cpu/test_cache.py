"""The cache of the CPU kernels on disk: written once, loaded by later processes, compiled anew for changed source."""

import ast
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numba
import pytest

from ccgpu.kernels.numba_cpu import cache

ROOT = Path(__file__).resolve().parents[3]
# A process that uses only one kernel in one dtype, because that compiles in two or three seconds.
PROGRAM = """
import json, logging, sys
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("ccgpu").addHandler(handler)
logging.getLogger("ccgpu").setLevel(logging.INFO)
import numpy as np
from ccgpu.kernels import reference
from ccgpu.kernels.numba_cpu import cache, calls, plans

AFFINITY = "affinity", np.float32, np.float32
q = np.random.default_rng(0).standard_normal((1, 5, 4, 6)).astype(np.float32)
answers = []
for source in [None, *sys.argv[1:]]:
    if source is not None:
        cache.SOURCE = source
        cache.LOADED.pop(AFFINITY)
        cache.kernel_of.cache_clear()
        plans.plan_of.cache_clear()
    right = np.allclose(calls.affinity(q, q), reference.affinity(q, q), atol=1e-5)
    loaded = cache.LOADED[AFFINITY].cache_hits
    answers.append({"right": bool(right), "loaded": loaded, "compiled": 1 - loaded})
print(json.dumps([answers, said]))
"""


def run(*sources, **environment):
    """Run PROGRAM; return what it did for its own and other sources, and how often it logged that nothing is cached."""
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM, *sources],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    answers, said = json.loads(answer.stdout)
    return answers, sum(line.startswith("ccgpu: the CPU kernels are compiled anew in each process: ") for line in said)


def files_of(folder):
    """Return the names of the cached files of machine code."""
    return sorted(path.name for path in folder.rglob("*.nbc"))


def test_cached_for_later_processes_and_compiled_anew_for_other_source(tmp_path):
    (first,), complaints = run(NUMBA_CACHE_DIR=str(tmp_path))
    assert first == {"right": True, "loaded": 0, "compiled": 1}
    assert complaints == 0
    assert list(tmp_path.rglob("*.nbi"))
    files = files_of(tmp_path)
    assert len(files) == 3  # transpose, multiply and the kernel
    (second, other), complaints = run("another source", NUMBA_CACHE_DIR=str(tmp_path))
    assert second == {"right": True, "loaded": 1, "compiled": 0}
    assert other == {"right": True, "loaded": 0, "compiled": 1}
    assert complaints == 0
    assert len(set(files_of(tmp_path)) - set(files)) == 1


DAMAGES = {"empty": lambda content: b"", "half": lambda content: content[: len(content) // 2]}
DAMAGES |= {"few bytes": lambda content: content[:3], "garbage": lambda content: bytes(reversed(content))}


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["*.nbi", "*.nbc"])
def test_damaged_files_are_compiled_anew_and_replaced(tmp_path, ending):
    """The kernels themselves, in processes: every file gets a damage of its own."""
    run(NUMBA_CACHE_DIR=str(tmp_path))
    for path, damage in zip(sorted(tmp_path.rglob(ending)), itertools.cycle(DAMAGES.values()), strict=False):
        path.write_bytes(damage(path.read_bytes()))
    (mended,), _ = run(NUMBA_CACHE_DIR=str(tmp_path))
    assert mended == {"right": True, "loaded": 0, "compiled": 1}
    (again,), _ = run(NUMBA_CACHE_DIR=str(tmp_path))
    assert again == {"right": True, "loaded": 1, "compiled": 0}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("ending", [".nbi", ".nbc"])
def test_any_damage_counts_as_no_cache(tmp_path, monkeypatch, damage, ending):
    """A function of one addition compiles at once."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def add(x):
        return x + 1

    def callback():
        return cache._callback(add, numba.int64(numba.int64))

    assert callback().ctypes(3) == 4
    for path in tmp_path.rglob(f"*{ending}"):
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    mended = callback()
    assert mended.ctypes(3) == 4
    assert not mended.cache_hits
    loaded = callback()
    assert loaded.ctypes(3) == 4
    assert loaded.cache_hits


def test_a_full_disk_is_no_reason_not_to_compute(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile._save_data", full)
    assert cache._callback(lambda x: x + 1, numba.int64(numba.int64)).ctypes(3) == 4


def add(x):
    return x + 1


def add_to(number):
    """Return `add`, compiled for a type of numbers or loaded."""
    return cache._callback(add, number(number))


def test_processes_that_save_at_once_do_not_take_each_others_code(tmp_path, monkeypatch):
    """Both have read the index before either has written it."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    add_to(numba.int64)
    (index,) = tmp_path.rglob("*.nbi")
    of_the_first = index.read_bytes()
    index.unlink()
    add_to(numba.float64)
    index.write_bytes(of_the_first)
    loaded = add_to(numba.int64)
    assert loaded.ctypes(3) == 4
    assert loaded.cache_hits
    compiled = add_to(numba.float64)
    assert compiled.ctypes(0.5) == 1.5
    assert not compiled.cache_hits


def test_code_that_could_not_be_saved_is_not_taken_for_older_code(tmp_path, monkeypatch):
    """The index was out of date, and the process was killed or the disk was full before its code was written."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    add_to(numba.int64)
    (index,) = tmp_path.rglob("*.nbi")
    index.unlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("numba.core.caching.IndexDataCacheFile._save_data", full)
        assert add_to(numba.float64).ctypes(0.5) == 1.5
    again = add_to(numba.float64)
    assert again.ctypes(0.5) == 1.5
    assert not again.cache_hits


@pytest.fixture(scope="module")
def without_a_folder():
    """The result of a process in which Numba finds no folder for its cache: it may only look in zip archives."""
    pytest.importorskip("numba", minversion="0.62", reason="earlier versions always look in all places")
    return run(NUMBA_CACHE_LOCATOR_CLASSES="ZipCacheLocator", NUMBA_CACHE_DIR="")


@pytest.mark.slow
def test_without_a_folder_the_kernels_run_and_the_log_says_so(without_a_folder):
    (answer,), complaints = without_a_folder
    assert answer["right"]
    assert answer["loaded"] == 0
    assert complaints > 0


@pytest.mark.slow
def test_without_a_folder_the_log_says_so_once(without_a_folder):
    _, complaints = without_a_folder
    assert complaints == 1


def imported_by(name):
    """Return the files of kernels/numba_cpu that a module imports, directly or not, and its own file."""
    folder, package, files, waiting = ROOT / "kernels" / "numba_cpu", "ccgpu.kernels.numba_cpu", set(), [name]
    while waiting:
        name = waiting.pop().replace(".", "/")
        (file,) = (path for path in (folder / f"{name}.py", folder / name / "__init__.py") if path.exists())
        if file in files:
            continue
        files.add(file)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith(package):
                inside = node.module.removeprefix(package).lstrip(".")
                names = [f"{inside}.{alias.name}".lstrip(".") for alias in node.names]
                are_files = [(folder / f"{name.replace('.', '/')}.py").exists() for name in names]
                waiting += names if all(are_files) or not inside else [inside]
    return {file.relative_to(folder).as_posix() for file in files}


def test_source_covers_all_files_that_the_kernels_import(monkeypatch):
    """cache.py itself is left out, because Numba compares its modification time."""
    texts, read = set(), Path.read_bytes

    def read_and_note(path):
        texts.add(path.relative_to(ROOT / "kernels" / "numba_cpu").as_posix())
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_and_note)
    assert cache._source() == cache.SOURCE
    assert texts >= imported_by("cache") - {"cache.py"}


def test_source_changes_with_each_file(monkeypatch):
    read = Path.read_bytes
    for changed in ("vectors", "matrices", "lines", "attention", "stages", "tickets"):
        end = f"{changed}.py"
        monkeypatch.setattr(Path, "read_bytes", lambda path, end=end: read(path) + b" " * (path.name == end))
        assert cache._source() != cache.SOURCE


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.timeout(60)
def test_a_process_forked_while_a_kernel_is_compiled_can_compile():
    """By another thread, which the child does not have: nobody would ever unlock its copy of the lock."""
    began = threading.Event()

    def compile_for_a_while():
        with cache._compiling:
            began.set()
            time.sleep(0.5)

    other = threading.Thread(target=compile_for_a_while)
    other.start()
    began.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if cache._compiling.acquire(timeout=5) else 1)
    other.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
