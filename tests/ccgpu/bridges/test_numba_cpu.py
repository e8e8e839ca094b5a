"""The backend `numba_cpu` with many threads, forks and data loaders; on torch's tensors; and when it cannot run."""

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import ccgpu
from ccgpu.bridges import numba_cpu
from ccgpu.bridges.call import Call
from ccgpu.kernels.numba_cpu import calls, workers
from tests.ccgpu.bridges import data_loading
from tests.ccgpu.problems import layouts
from tests.forked import run_forked
from tests.kernels.numba_cpu.problems import cut_up

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 120  # until a process counts as hanging
TEAM = workers.team_of(torch._C.__file__)


def python(*arguments, **environment):
    """Run Python in the checkout; the test fails if the process fails or hangs."""
    answer = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    return answer


def program(text, **environment):
    return python("-c", textwrap.dedent(text), **environment)


# Threads and processes ------------------------------------------------------------------------------------------------


def attend(arrays, threads):
    q, k, v, dlse = arrays
    out, lse = calls.forward(q, k, v, threads=threads)
    return (out, lse, *calls.backward(v, q, k, v, out, lse, dlse, threads=threads))


@pytest.mark.timeout(SECONDS)
def test_eight_threads_at_once(monkeypatch):
    """Each has its own map size and dtype; all take helpers from one pool, which does not exist when they start."""
    cut_up(monkeypatch, SMALL=0)
    monkeypatch.setattr(workers, "_pool", None)
    generator = np.random.default_rng(0)
    problems = []
    for number in range(8):
        sizes, dtype = (7 + 3 * number, 31 - 2 * number), (np.float32, np.float64)[number % 2]
        shapes = [(2, 8, *sizes), (2, 8, *sizes), (2, 16 + number, *sizes), (2, *sizes)]
        problems.append([generator.standard_normal(shape).astype(dtype) for shape in shapes])
    alone = [attend(arrays, threads=1) for arrays in problems]
    start, wrong, done = threading.Barrier(8), [], []

    def work(number):
        start.wait()
        for _ in range(6):
            results = attend(problems[number], threads=1 + number % 4)
            if not all(np.array_equal(a, b) for a, b in zip(results, alone[number], strict=True)):
                wrong.append(number)
        done.append(number)

    callers = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(SECONDS / 2)
    assert sorted(done) == list(range(8))
    assert not wrong


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_workers_of_a_data_loader(method):
    if method == "fork" and not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    assert python("-m", "tests.ccgpu.bridges.data_loading", method).stdout.strip() == "same"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_in_children_of_children():
    """Children are forked while the pool has threads, which they do not inherit, and the parent keeps computing."""
    answer = program(
        """
        import os
        from tests.ccgpu.bridges.data_loading import attend
        import torch

        expected, parent = attend(3), os.getpid()
        for generation in range(3):
            child = os.fork()
            same = all(torch.equal(expected, attend(3)) for _ in range(5))
            if child:
                _, status = os.waitpid(child, 0)
                same = same and status == 0
                if os.getpid() == parent:
                    print("same" if same else "different", flush=True)
                os._exit(not same)
        os._exit(not same)
        """
    )
    assert answer.stdout.strip() == "same"


def answers(dtype, threads, layout):
    """Return all results of the op and its stages, computed by a number of torch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, c, 13, 19, generator=generator).to(dtype) for c in (16, 16, 48))
        q, k, v = (layouts(x, layout).requires_grad_() for x in (q, k, v))
        out, lse = ccgpu.cca(q, k, v, return_lse=True, backend="numba_cpu")
        energies = ccgpu.affinity(q, k, backend="numba_cpu")
        weighted = ccgpu.aggregate(energies.detach(), v, backend="numba_cpu")
        results = out, lse, energies, weighted
        gradients = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in results]
        return [x.detach() for x in (*results, *torch.autograd.grad(results, (q, k, v), gradients))]
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(TEAM is None, reason="torch is not linked with an OpenMP library that has GNU's functions")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_openmp_threads_and_the_pool_give_the_same_bits(monkeypatch, layout, dtype):
    cut_up(monkeypatch, SMALL=0, SHEET_BYTES=2000)
    alone = answers(dtype, 1, layout)
    for threads in (2, 3, 5, 2):
        for a, b in zip(alone, answers(dtype, threads, layout), strict=True):
            assert torch.equal(a, b), f"{threads} threads"
    monkeypatch.setattr(numba_cpu, "_team", lambda: None)
    for a, b in zip(alone, answers(dtype, 3, layout), strict=True):
        assert torch.equal(a, b), "the pool"


@pytest.mark.timeout(SECONDS)
def test_many_threads_with_a_team_each(monkeypatch):
    cut_up(monkeypatch, SMALL=0)
    q = torch.randn(2, 16, 21, 23)
    alone = ccgpu.cca(q, q, q, backend="numba_cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    start, same = threading.Barrier(8), []

    def work():
        start.wait()
        same.extend(torch.equal(alone, ccgpu.cca(q, q, q, backend="numba_cpu")) for _ in range(20))

    callers = [threading.Thread(target=work) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(same) == 160
    assert all(same)


def test_a_system_that_gives_fewer_threads():
    answer = program(
        """
        from tests.ccgpu.bridges.data_loading import attend

        print(attend(3).double().sum().item().hex())
        """,
        OMP_THREAD_LIMIT="1",
    )
    assert answer.stdout.strip() == data_loading.attend(3).double().sum().item().hex()


MAPPED = Path("/proc/self/maps")


@pytest.mark.skipif(TEAM is None or not MAPPED.exists(), reason="this system does not say what OpenMP library runs")
def test_an_openmp_library_that_replaces_the_one_of_torch(tmp_path):
    """torch's operations run on its threads, and so does cca: no thread is begun for it."""
    lines = (line.split() for line in MAPPED.read_text().splitlines())
    libraries = {line[-1] for line in lines if Path(line[-1]).name.startswith("libgomp")}
    if not libraries:
        pytest.skip("torch is linked with another OpenMP library than GNU's")
    # Under another name, which is also written inside: otherwise it counts as torch's own, which is then not loaded.
    linked = Path(max(libraries, key=lambda path: "torch" in path))
    name = linked.name[:-1] + "x"
    other = tmp_path / name
    other.write_bytes(linked.read_bytes().replace(linked.name.encode() + b"\0", name.encode() + b"\0"))
    answer = program(
        """
        import os
        import torch
        from tests.ccgpu.bridges.data_loading import THREADS, attend

        def threads():
            return len(os.listdir("/proc/self/task"))

        torch.set_num_threads(THREADS)
        torch.randn(2000, 500).exp()
        before = threads()
        attend(3)
        print(threads() - before, len({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}))
        """,
        LD_PRELOAD=str(other),
    )
    assert answer.stdout.split() == ["0", "2"]


def test_in_a_thread_that_outlives_the_main_one():
    """Python's thread pools accept no more work then."""
    answer = program(
        """
        import threading, time
        from tests.ccgpu.bridges.data_loading import attend
        import torch

        expected = attend(3)

        def work():
            threading.main_thread().join()
            time.sleep(0.2)
            print("same" if torch.equal(expected, attend(3)) else "different")

        threading.Thread(target=work).start()
        """
    )
    assert answer.stdout.strip() == "same"


# Torch's tensors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_torch_says_how_many_threads(threads, monkeypatch):
    teams = []

    def parallel(function, argument, count, flags):
        teams.append(count)
        TEAM.parallel(function, argument, count, flags)

    cut_up(monkeypatch, SMALL=0)
    monkeypatch.setattr(numba_cpu, "_team", lambda: workers.Team(parallel, TEAM.number))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    q = torch.randn(1, 3, 4, 5, requires_grad=True)
    ccgpu.cca(q, q, q, backend="numba_cpu").sum().backward()
    assert teams == ([] if threads == 1 else [threads, threads])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_torch_says_how_many_threads_where_it_has_no_openmp(threads, monkeypatch):
    submitted = []

    class Pool:
        def submit(self, function):
            submitted.append(function)
            return threading.Timer(0, function)  # never started, but it can be cancelled

    cut_up(monkeypatch, SMALL=0)
    monkeypatch.setattr(numba_cpu, "_team", lambda: None)
    monkeypatch.setattr(workers, "_pool", Pool())
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    q = torch.randn(1, 3, 4, 5, requires_grad=True)
    out = ccgpu.cca(q, q, q, backend="numba_cpu")
    assert len(submitted) == threads - 1
    out.sum().backward()
    assert len(submitted) == 2 * (threads - 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_are_written_to_torchs_memory(layout, dtype):
    """In torch's layouts, also for inputs that require gradients."""
    q, k, v = (layouts(torch.randn(2, c, 5, 7).to(dtype), layout).requires_grad_() for c in (16, 16, 32))
    out, lse = numba_cpu.forward(q, k, v, 1.0)
    gradients = numba_cpu.backward(torch.ones_like(out), q, k, v, out, lse, torch.zeros_like(lse), 1.0)
    for result, like in zip((out, *gradients), (v, q, k, v), strict=True):
        assert result.dtype == dtype
        assert result.stride() == like.stride()
        assert not result.requires_grad
    assert lse.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_tensors_on_misaligned_memory(layout):
    """Such tensors come from torch.frombuffer, for example on part of a file."""
    x = torch.frombuffer(bytearray(4 * 320 + 1), dtype=torch.float32, offset=1)
    x = x.view(1, 4, 5, 16).movedim(-1, 1) if layout == "channels_last" else x.view(1, 1, 20, 16)
    x.copy_(torch.randn(x.shape))
    torch.testing.assert_close(ccgpu.cca(x, x, x, backend="numba_cpu"), ccgpu.cca(x, x, x, backend="cpu"))


# When it can run, and when it is faster -------------------------------------------------------------------------------


def test_why_not_on_other_devices():
    assert numba_cpu.why_not(Call(torch.device("cpu"))) is None
    reason = next(status.reason for status in ccgpu.backends("meta") if status.name == "numba_cpu")
    assert reason == "it runs CPU tensors, and these are on meta"


ANSWER = """
    import torch, ccgpu

    status = next(b for b in ccgpu.backends("cpu") if b.name == "numba_cpu")
    print(status.available, status.reason)
    torch.set_num_threads(1)
    q = torch.randn(1, 3, 4, 5, requires_grad=True)
    for _ in range(3):
        ccgpu.cca(q, q, q).sum().backward()
    print(torch.equal(ccgpu.cca(q, q, q), ccgpu.cca(q, q, q, backend="cpu")))
    try:
        ccgpu.cca(q, q, q, backend="numba_cpu")
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("before", "environment", "reason"),
    [
        ("", {"NUMBA_DISABLE_JIT": "1"}, "Numba compiles nothing, because NUMBA_DISABLE_JIT is set"),
        (
            "import sys; sys.modules['numba'] = None",
            {},
            "Numba cannot be used (import of numba halted; None in sys.modules); install a release of numba for this ",
        ),
    ],
    ids=["disabled", "missing"],
)
def test_why_not_without_numba(before, environment, reason):
    """By default torch's matrix products run, and one warning says so; asked for by name, it raises."""
    environment = {"CCGPU_BACKEND": "", **environment}
    answer = run_forked(f"{before}\n{textwrap.dedent(ANSWER)}", **environment)
    assert answer.returncode == 0, answer.stderr
    status, equal, error = answer.stdout.splitlines()
    assert status.startswith(f"False {reason}")
    assert equal == "True"
    assert error.startswith(f"cca: backend='numba_cpu' cannot run this call: {reason}")
    warnings = [line for line in answer.stderr.splitlines() if "numba_cpu" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"ccgpu: backend 'numba_cpu' cannot run, a slower one does: {reason}")
